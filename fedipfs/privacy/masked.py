"""Distributed noise inside secure aggregation: what a session's parameters say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedipfs.errors import BelowFloor, ConfigError
from fedipfs.privacy import distributed, rotation
from fedipfs.privacy.base import SKELLAM
from fedipfs.privacy.distributed import Parameters
from fedipfs.privacy.rdp import Event
from fedipfs.secagg import Parameters as Masks
from fedipfs.secagg.quantize import encode_numbers

ENCODING = SKELLAM
_OPTIONS = ("threshold", "colluders", "dropouts")  # of the section secagg
_TOLD = ("dimension", "noise_multiplier", "scale", "survivors", "pooling")


def masks_for(
    secagg: Mapping[str, Any],
    privacy: Mapping[str, Any],
    *,
    clients: int,
    values: int,
    seed: bytes = bytes(rotation.SEED_BYTES),
) -> Masks:
    """The parameters of a session whose clients add the noise of the section `privacy`.

    `values` are the model's. `pooling` clients may work together and take their own noise off
    (secagg.colluders; else as many as the session withstands): the others' is enough. `seed` is
    new for every round. Raises ConfigError.
    """
    chosen = {key: secagg[key] for key in _OPTIONS}
    shape = Masks.choose(clients, values, encoding=ENCODING, **chosen)
    pooling = shape.colluders
    if secagg["colluders"] is not None:
        pooling = min(pooling, int(secagg["colluders"] * clients))
    if shape.quorum - pooling < 1:
        raise ConfigError(
            f"privacy=distributed: of {shape.quorum} clients that are left {pooling} may collude, "
            "and nobody's noise would count; lower secagg.colluders"
        )
    noise = Parameters.chosen(
        dimension=values,
        clip=privacy["clip_norm"],
        noise_multiplier=privacy["noise_multiplier"],
        survivors=shape.quorum - pooling,
        cohort=clients,
        scale=privacy["scale"],
    )
    told = {name: getattr(noise, name) for name in _TOLD[:-1]}
    return Masks.choose(
        clients,
        noise.size,
        clip=float(noise.clip),
        encoding=ENCODING,
        details={"relative": True, "seed": seed, "pooling": pooling, **told},
        **chosen,
    )


def agreed(masks: Masks, least_pooling: int = 0) -> tuple[Parameters, bytes]:
    """The noise that a session's parameters ask of each client, and the rotation's seed.

    `least_pooling`: how many this client at least takes to pool what they know.

    Raises BelowFloor for noise that is not enough: each adds its share of what the quorum is to
    add together, so that a sum of fewer is never unmasked, and one of more has more. Raises
    ConfigError for what cannot be right.
    """
    told = dict(masks.details)
    seed = told.get("seed")
    if set(_TOLD) - told.keys() or type(seed) is not bytes or len(seed) != rotation.SEED_BYTES:
        raise BelowFloor(f"encoding={ENCODING}: the noise that each is to add is not agreed on")
    dimension, multiplier, scale, survivors, pooling = (float(told[name]) for name in _TOLD)
    noise = Parameters(int(dimension), masks.clip, multiplier, int(survivors), masks.clients, scale)
    if not noise.noise_multiplier > 0:
        raise BelowFloor("noise_multiplier=0: without noise the sum is not private")
    if not 0 <= pooling <= masks.quorum - noise.survivors:
        raise BelowFloor(
            f"survivors={noise.survivors}: a sum of {masks.quorum} can be unmasked, of whom "
            f"{pooling:g} may pool what they know, and it would have less noise than was promised"
        )
    if pooling < least_pooling:
        raise BelowFloor(f"pooling={pooling:g}: this site demands at least {least_pooling}")
    if noise.size != masks.values:
        raise BelowFloor(f"{masks.values} masked values, and noise on {noise.size}")
    return noise, seed


def epsilon(masks: Masks, survivors: list[int], delta: float) -> float:
    """What rounds with so many survivors cost each client; those who pool do not count."""
    noise, _ = agreed(masks)
    pooling = int(dict(masks.details)["pooling"])
    return distributed.epsilon([(noise, count - pooling) for count in survivors], delta)


def event(masks: Masks) -> Event:
    """What a part in one sum costs the records of a client: for the ledger of its site.

    Any record may change the update to any other, so it is the price of replacing the update.
    """
    noise, _ = agreed(masks)
    found = distributed.gaussian_equivalent(noise, noise.survivors, replaced=True)
    return Event(found, 1.0, 1)


def encode(masks: Masks, update: np.ndarray) -> np.ndarray:
    """The vector to mask: the update clipped, rounded and with this client's share of noise."""
    noise, seed = agreed(masks)
    values = distributed.encode(update, noise, seed)
    return np.concatenate([values, encode_numbers(masks, {})])


def decode(masks: Masks, total: np.ndarray) -> np.ndarray:
    """The sum of the survivors' clipped updates, with noise: float64."""
    noise, seed = agreed(masks)
    return distributed.decode(total[: noise.size], noise, seed)
