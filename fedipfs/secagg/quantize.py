"""Values as integers that can be summed modulo 2**32, rounded up or down by chance.

A value x is clipped to [-c, c], weighted by r (0 to 1) and sent as (r x + c) / (2 c) on a grid of
2**bits points, rounded up with a probability that makes the mean exact: errors of many clients
cancel instead of adding up. Every client also tells which share of its values it clipped, or would
have clipped at 2 c, 4 c, ...; only the sums of these shares are ever seen.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedipfs.errors import BadUpdate, WrongVector
from fedipfs.secagg import fixed, masks
from fedipfs.secagg.parameters import CLIPPED, Parameters

TOO_MANY = 0.001  # share of clipped values from which on another clip is suggested


class Encoded(NamedTuple):
    """A client's vector, uint32 of `dimension` coordinates, and how many values it clipped."""

    vector: np.ndarray
    clipped: int


class Decoded(NamedTuple):
    """The sum over the survivors, or its quotient by one of the numbers.

    `values` is float32, `clipped` the share of values beyond the clip over all survivors, and
    `suggestion` a clip that fewer than 0.1 % would pass, where more do so now.
    """

    values: np.ndarray
    numbers: dict[str, float]
    clipped: float
    suggestion: float | None


def encode(
    parameters: Parameters,
    values: np.ndarray,
    numbers: Mapping[str, float],
    weight: float = 1.0,
    key: bytes | None = None,
) -> Encoded:
    """The vector to mask, for the encoding "uniform".

    `values` is flat, float32 or float64, of `parameters.values` elements; `numbers` are the
    parameters' numbers without the shares of clipped values. `weight` multiplies the clipped
    values. `key` (32 bytes) makes rounding repeatable; None takes one from `secrets`. Raises
    BadUpdate for values that are not finite and numbers too large, ValueError for misuse.
    """
    if values.shape != (parameters.values,):
        raise ValueError(f"{parameters.values} flat values expected, not {values.shape}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight}: it scales clipped values, from 0 to 1")
    vector = np.empty(parameters.dimension, np.uint32)
    counts = _quantize(values, vector, parameters, weight, key or secrets.token_bytes(32))
    shares = [count / max(len(values), 1) for count in counts]
    numbers = {**numbers, **dict(zip(CLIPPED, shares, strict=True))}
    vector[parameters.values :] = encode_numbers(parameters, numbers)
    return Encoded(vector, counts[0])


def encode_numbers(parameters: Parameters, numbers: Mapping[str, float]) -> np.ndarray:
    """The coordinates of the numbers, which follow the values in every encoding: uint32."""
    if numbers.keys() != set(parameters.numbers):
        raise ValueError(f"numbers {sorted(numbers)} given, {sorted(parameters.numbers)} expected")
    found: list[int] = []
    for name in parameters.numbers:
        found += fixed.encode(name, numbers[name], parameters.clients)
    return np.array(found, np.uint32)


def decode(
    parameters: Parameters, total: np.ndarray, survivors: int, per: str | None = None
) -> Decoded:
    """What the modular sum of `survivors` vectors says, for the encoding "uniform".

    `per` names a number to divide the values by. Raises WrongVector for another shape, and
    BadUpdate where that number is not positive.
    """
    numbers = decode_numbers(parameters, total)
    shares = [numbers.pop(name) / survivors for name in CLIPPED]
    divisor = 1.0 if per is None else numbers[per]
    if not divisor > 0:
        raise BadUpdate(f"the clients' {per} sums up to {divisor:g}: there is nothing to divide by")
    values = _dequantize(parameters, total[: parameters.values], survivors, divisor)
    return Decoded(values, numbers, shares[0], suggest(parameters.clip, shares))


def decode_numbers(parameters: Parameters, total: np.ndarray) -> dict[str, float]:
    """The sums of the numbers, in every encoding. Raises WrongVector for another shape."""
    if total.shape != (parameters.dimension,) or total.dtype != np.uint32:
        raise WrongVector(
            f"a sum of {parameters.dimension} uint32 expected, not {total.dtype} {total.shape}"
        )
    width, tail = fixed.limbs(parameters.clients), total[parameters.values :].tolist()
    return {
        name: fixed.decode(tail[at * width : (at + 1) * width], parameters.clients)
        for at, name in enumerate(parameters.numbers)
    }


def suggest(clip: float, shares: Sequence[float]) -> float | None:
    """A clip that fewer than 0.1 % of values pass, given the shares beyond clip * 1, 2, 4, ...

    None if `clip` is one; the largest that was looked at, doubled, if none of them is.
    """
    for power, share in enumerate(shares):
        if share <= TOO_MANY:
            return clip * 2**power if power else None
    return clip * 2.0 ** len(shares)


def _quantize(
    values: np.ndarray, out: np.ndarray, parameters: Parameters, weight: float, key: bytes
) -> list[int]:
    """Fill the start of `out`; counts of values beyond clip * 1, 2, 4, ..."""
    clip, unit = parameters.clip, 2.0**32  # of chance, a word is a fraction of a step
    scale = _scale(parameters) * unit
    stream = masks.Keystream(key, masks.buffer())
    room, more = np.empty(masks.TILE), np.empty(masks.TILE)
    counts = [0] * len(CLIPPED)
    for start in range(0, len(values), masks.TILE):
        tile = values[start : start + masks.TILE]
        work, chance = room[: len(tile)], more[: len(tile)]
        largest = max(float(tile.max()), -float(tile.min()))
        if not math.isfinite(largest):
            raise BadUpdate("the update has values that are not finite: training diverged")
        work[:] = tile
        if largest > clip:
            np.abs(work, out=chance)
            for power in range(len(counts)):
                counts[power] += int(np.count_nonzero(chance > clip * 2**power))
            np.clip(work, -clip, clip, out=work)
        work *= weight * scale
        chance[:] = stream.words(len(tile))
        work += chance
        work += clip * scale
        work *= 1 / unit
        out[start : start + len(tile)] = work  # cut off below the point: none is negative
    return counts


def _scale(parameters: Parameters) -> float:
    """Steps of the grid in 1.0; a hair less than fit, so that no float error makes one more."""
    return (2**parameters.bits - 1) * (1 - 2.0**-40) / (2 * parameters.clip)


def _dequantize(
    parameters: Parameters, total: np.ndarray, survivors: int, divisor: float
) -> np.ndarray:
    step = 1 / _scale(parameters) / divisor
    shift = survivors * parameters.clip / divisor
    found, room = np.empty(len(total), np.float32), np.empty(masks.TILE)
    for start in range(0, len(total), masks.TILE):
        tile = total[start : start + masks.TILE]
        work = np.multiply(tile, step, out=room[: len(tile)])
        work -= shift
        found[start : start + len(tile)] = work
    return found
