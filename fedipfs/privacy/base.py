"""The words of the room, without what is slow to import."""

from __future__ import annotations

from typing import NamedTuple

SKELLAM = "skellam"  # the encoding of masked vectors with noise: see masked.py
# How gradients are clipped example by example; see dpsgd.PrivateGradients.
GHOST, HOOKS = "ghost", "hooks"


class Mechanism(NamedTuple):
    """One step of DP-SGD.

    A Poisson batch at `sample_rate`, each example's gradient clipped to `clip_norm` (L2), noise
    of `noise_multiplier` times that added to their sum, and the sum divided by `batch_size`, the
    expected one.
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    batch_size: float
