"""Metrics that leave a site: bounded example by example, summed, noised."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def noisy_means(
    values: Mapping[str, NDArray[np.float64]],
    *,
    bounds: Mapping[str, float],
    examples: float,
    noise_multiplier: float,
    source: np.random.Generator,
) -> dict[str, float]:
    """The mean of each metric over a site's examples, from one use of the Gaussian mechanism.

    `values` are (N,) arrays, a value an example; they are clipped to [0, bound], the bound being
    1 where `bounds` has none. `examples` is what everybody knows the number to be: sums are
    divided by it, as N itself is nobody's business. An example moves the vector of k scaled sums
    by at most 1, so that this is one Event(noise_multiplier, 1.0, 1). The means are clipped to
    their range, which costs nothing.
    """
    noise = source.normal(0.0, noise_multiplier, len(values))
    unit = math.sqrt(len(values))
    means = {}
    for (name, each), drawn in zip(values.items(), noise, strict=True):
        bound = bounds.get(name, 1.0)
        known = np.nan_to_num(np.asarray(each, np.float64), nan=bound, posinf=bound, neginf=0.0)
        total = float(np.clip(known, 0.0, bound).sum() / (bound * unit)) + float(drawn)
        means[name] = min(max(total * bound * unit / examples, 0.0), bound)
    return means
