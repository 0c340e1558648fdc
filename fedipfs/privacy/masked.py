"""Distributed noise inside secure aggregation: what a session's parameters say of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedipfs.errors import BelowFloor
from fedipfs.privacy import distributed, rotation
from fedipfs.privacy.distributed import Parameters
from fedipfs.secagg import Parameters as Masks
from fedipfs.secagg.quantize import encode_numbers

ENCODING = "skellam"
_NAMES = ("dimension", "noise_multiplier", "scale", "survivors")  # those that Masks has not


def details(noise: Parameters, seed: bytes) -> dict[str, Any]:
    """What all who take part agree on, for Masks.details; `seed` is new for every round."""
    return {"seed": seed, **{name: getattr(noise, name) for name in _NAMES}}


def agreed(masks: Masks) -> tuple[Parameters, bytes]:
    """The noise that a session's parameters ask of each client, and the rotation's seed.

    Raises BelowFloor for noise that is not enough: each adds its share of what the quorum is to
    add together, so that a sum of fewer is never unmasked, and one of more has more. Raises
    ConfigError for what cannot be right.
    """
    told = dict(masks.details)
    seed = told.get("seed")
    if set(_NAMES) - told.keys() or type(seed) is not bytes or len(seed) != rotation.SEED_BYTES:
        raise BelowFloor(f"encoding={ENCODING}: the noise that each is to add is not agreed on")
    dimension, multiplier, scale, survivors = (told[name] for name in _NAMES)
    noise = Parameters(
        int(dimension), masks.clip, float(multiplier), int(survivors), masks.clients, float(scale)
    )
    if not noise.noise_multiplier > 0:
        raise BelowFloor("noise_multiplier=0: without noise the sum is not private")
    if noise.survivors > masks.quorum:
        raise BelowFloor(
            f"survivors={noise.survivors}: a sum of {masks.quorum} can be unmasked, and would have "
            "less noise than was promised"
        )
    if noise.size != masks.values:
        raise BelowFloor(f"{masks.values} masked values, and noise on {noise.size}")
    return noise, seed


def encode(masks: Masks, update: np.ndarray) -> np.ndarray:
    """The vector to mask: the update clipped, rounded and with this client's share of noise."""
    noise, seed = agreed(masks)
    values = distributed.encode(update, noise, seed)
    return np.concatenate([values, encode_numbers(masks, {})])


def decode(masks: Masks, total: np.ndarray) -> np.ndarray:
    """The sum of the survivors' clipped updates, with noise: float64."""
    noise, seed = agreed(masks)
    return distributed.decode(total[: noise.size], noise, seed)
