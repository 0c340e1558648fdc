"""Rényi curves: those of the subsampled Gaussian, and what a curve means in epsilon and delta."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Event(NamedTuple):
    """`steps` releases of a sum of which each record moves at most `1 / noise_multiplier` sigmas.

    Each step samples every record with the probability `sample_rate` (Poisson sampling); 1 is the
    plain Gaussian mechanism.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


# Opacus' own, which end at 63, and more on both sides: below for an epsilon in the hundreds, above
# for one of hundredths. Beyond 1024 its binomial coefficients overflow.
ORDERS: tuple[float, ...] = (
    1.01,
    1.02,
    1.05,
    *(1 + x / 10 for x in range(1, 100)),
    *range(12, 64),
    *(round(64 * 2 ** (k / 4)) for k in range(17)),
)


@lru_cache(maxsize=1024)
def _step(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    from fedipfs.privacy.opacus_compat import compute_rdp  # it takes torch along

    curve = np.full(len(ORDERS), np.inf)
    for place, order in enumerate(ORDERS):
        try:
            curve[place] = compute_rdp(
                q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=float(order)
            )
        except (ValueError, OverflowError):  # its sum over a fractional order did not converge
            continue
    curve[np.isnan(curve)] = np.inf
    curve.setflags(write=False)
    return curve


def curve(history: Iterable[Event]) -> np.ndarray:
    """Rényi divergence of a whole history at each of ORDERS: float64; infinite where unknown.

    Mironov, Talwar and Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism",
    section 3.3, as Opacus computes it; curves of what is done to the same data add up.
    """
    total = np.zeros(len(ORDERS))
    for event in history:
        total += event.steps * _step(event.noise_multiplier, event.sample_rate)
    return total


def converted(
    divergences: np.ndarray, delta: float, orders: Iterable[float] = ORDERS
) -> tuple[float, float]:
    """The epsilon that a curve implies at `delta`, not below 0, and the order that gives it.

    Balle et al. 2020, "Hypothesis Testing Interpretations and Rényi Differential Privacy",
    theorem 21. Opacus' `get_privacy_spent` is the same formula, with a warning at the outer orders.
    """
    alpha = np.asarray(tuple(orders), np.float64)
    bounds = divergences + np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    best = int(np.argmin(bounds))
    return max(0.0, float(bounds[best])), float(alpha[best])
