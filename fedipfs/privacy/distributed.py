"""Distributed differential privacy: many small noises that only their sum shows.

A client clips its update x to the norm C, rotates it (see `rotation`), scales it by s, rounds it to
integers at random, adds its share of Skellam noise and reduces modulo 2^32; secure aggregation
shows the server the sum alone. Nobody need trust the server with less noise than the whole:
Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning
with Secure Aggregation", algorithms 1 and 2, with the noise of Agarwal, Kairouz and Liu 2021, "The
Skellam Mechanism for Differentially Private Federated Learning".

What is protected is a client, all of it: two sums are neighbours when one client's contribution is
zero in one of them. A client of the sum that takes its own noise off sees what the others added, so
against `k` that pool what they know count k survivors fewer, in `survivors` and in `epsilon`.

The rounded vector's norms are bounded by a check on the integers themselves, so floating-point
errors before it can cost accuracy, never privacy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fedipfs.errors import BadUpdate, ConfigError
from fedipfs.privacy import rdp, rotation, skellam
from fedipfs.privacy.noise import generator

BITS = 32

_RETRY = 0.5  # -log of beta = exp(-1/2), the paper's choice
_INFLATION = 1e-4  # of the squared norm by rounding: epsilon then is a Gaussian's to three digits
_WRAPS = 2.0**-40  # probability that any of the sum's values wraps around, at most
_MOST_TRIES = 1000
_TILE = 1 << 16  # values that are worked on at once: half a MiB


@dataclass(frozen=True)
class Parameters:
    """What clients and server agree on. `chosen` finds the scale.

    Attributes:
        dimension: Values of an update.
        clip: L2 norm C to which every update is clipped.
        noise_multiplier: Standard deviation of the sum's noise over C, when `survivors` add theirs;
            0 for tests only.
        survivors: How many clients' noise must be in a sum, at least: the threshold of the secure
            aggregation, less those who may pool what they know.
        cohort: How many clients are in a sum at most.
        scale: Integer steps that an update's value of 1 is divided into.

    Raises ConfigError for values out of range, for a scale with which a sum may wrap around modulo
    2^32, and for one whose noise is larger than can be drawn.
    """

    dimension: int
    clip: float
    noise_multiplier: float
    survivors: int
    cohort: int
    scale: float

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ConfigError(f"dimension {self.dimension}: an update has a value at least")
        for name, value in (("clip", self.clip), ("scale", self.scale)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} {value!r}: not a positive, finite number")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(f"noise_multiplier {self.noise_multiplier!r}: not 0 or more")
        if not 1 <= self.survivors <= self.cohort:
            raise ConfigError(
                f"survivors {self.survivors}: not from 1 to the cohort of {self.cohort} clients"
            )
        if not self.variance / self.survivors <= skellam.MOST_VARIANCE:
            raise ConfigError(
                f"scale {self.scale:g}: a client's noise would have a variance of "
                f"{self.variance / self.survivors:.3g}, and {skellam.MOST_VARIANCE:.3g} is the "
                f"most; leave scale to be chosen, or lower noise_multiplier"
            )
        if not self.largest < 2 ** (BITS - 1):
            raise ConfigError(
                f"scale {self.scale:g}: a sum of {self.cohort} clients may reach "
                f"{self.largest:.3g} and wrap around modulo 2^{BITS}; leave scale to be chosen, "
                f"or lower noise_multiplier or the cohort"
            )

    @classmethod
    def chosen(
        cls,
        *,
        dimension: int,
        clip: float,
        noise_multiplier: float,
        survivors: int,
        cohort: int,
        scale: float | None = None,
    ) -> Parameters:
        """The parameters with the given scale, or with the least power of two that is fine enough.

        Fine enough is where rounding lengthens a squared norm by 1e-4 of itself; if a sum could
        wrap around with that, the largest with which none can. Raises ConfigError as the class.
        """

        def scaled(scale: float) -> Parameters:
            return cls(dimension, clip, noise_multiplier, survivors, cohort, scale)

        if scale is not None:
            return scaled(scale)
        if not 0 < clip < math.inf:
            raise ConfigError(f"clip {clip!r}: not a positive, finite number")
        size = rotation.padded(max(1, dimension))
        exponent = math.ceil(-math.log2(clip))  # a step as long as the norm, nearly
        while _bound(2.0**exponent * clip, size) > math.sqrt(1 + _INFLATION) * 2.0**exponent * clip:
            exponent += 1
        while True:
            try:
                return scaled(2.0**exponent)
            except ConfigError:
                if 2.0**exponent * clip < 1:
                    raise
                exponent -= 1

    @property
    def size(self) -> int:
        """Values of an encoded update: the dimension and the rotation's padding."""
        return rotation.padded(self.dimension)

    @property
    def bound(self) -> float:
        """L2 norm of an update that is scaled and rounded, at most."""
        return _bound(self.scale * self.clip, self.size)

    @property
    def inflation(self) -> float:
        """By which factor rounding makes an update's largest norm longer: noise that it costs."""
        return self.bound / (self.scale * self.clip)

    @property
    def variance(self) -> float:
        """Of the noise of each value of the sum, in squared steps, when `survivors` add theirs."""
        deviation = self.scale * self.noise_multiplier * self.clip
        return deviation * deviation

    @property
    def largest(self) -> float:
        """What a value of the sum exceeds in size with a probability of 2^-40 at most.

        Over all values, whose sizes before noise are bounded by the sum of the clients' norms, and
        by Hoeffding's inequality over the signs of the rotation: that of a coordinate of the
        rotated sum is sub-Gaussian with variance (n s C)^2 / block, and rounding adds less than 1 a
        client. The noise is bounded by Bernstein's inequality, for steps of 1.
        """
        odds = math.log(4 * self.size / _WRAPS)
        length = rotation.block(self.dimension)
        spread = self.scale * self.clip * math.sqrt(2 * odds / length) + 1
        variance = self.variance * self.cohort / self.survivors
        noise = odds / 3 + math.sqrt((odds / 3) ** 2 + 2 * odds * variance)
        return self.cohort * min(self.bound, spread) + (noise if variance else 0.0)


def _bound(norm: float, size: int) -> float:
    """L2 norm after stochastic rounding: Kairouz et al. 2021, theorem 1, with beta = exp(-1/2)."""
    return math.sqrt(norm * norm + size / 4 + math.sqrt(2 * _RETRY) * (norm + math.sqrt(size) / 2))


def encode(
    update: np.ndarray, parameters: Parameters, seed: bytes, rng: np.random.Generator | None = None
) -> np.ndarray:
    """One client's contribution to the sum: (parameters.size,) uint32.

    `update` is (dimension,) float32 or float64, `seed` 32 bytes that all clients of a round share,
    and that may be public. `rng` is secret and draws rounding and noise; None, the default, takes
    a fresh one. Raises BadUpdate for NaN or infinite values.
    """
    if update.shape != (parameters.dimension,):
        raise ValueError(f"an update of shape {update.shape}, not ({parameters.dimension},)")
    rng = generator() if rng is None else rng
    norm = math.sqrt(sum(_square(update[tile].astype(np.float64)) for tile in _tiles(update.size)))
    if not math.isfinite(norm):
        raise BadUpdate("the update is not finite: training diverged; lower the learning rate")
    # Single precision errs by about 1e-7 of the norm, far less than rounding to steps does.
    clipped = update * min(1.0, parameters.clip / norm) if norm else update
    rotated = rotation.rotate(clipped.astype(np.float32), seed)
    encoded = _rounded(rotated, parameters, rng).view(np.uint32)
    share = parameters.variance / parameters.survivors
    if share:
        for tile in _tiles(encoded.size):
            part = encoded[tile]
            part += skellam.sample(rng, share, part.size).astype(np.uint32)
    return encoded


def _rounded(rotated: np.ndarray, parameters: Parameters, rng: np.random.Generator) -> np.ndarray:
    """Each value in steps, int32, rounded up or down and right on average, within the bound.

    Tried again until it is: a try succeeds with a probability of 1 - exp(-1/2) at least.
    """
    steps = np.empty(rotated.size, np.int32)
    for _ in range(_MOST_TRIES):
        square = 0.0
        for tile in _tiles(steps.size):
            part = rotated[tile].astype(np.float64)
            part *= parameters.scale
            part += rng.random(part.size, dtype=np.float32)
            square += _square(np.floor(part, out=part))
            steps[tile] = part
        if square <= parameters.bound**2:
            return steps
    raise RuntimeError(f"no rounding of the update within {parameters.bound:g} steps")


def _tiles(size: int) -> Iterator[slice]:
    return (slice(at, at + _TILE) for at in range(0, size, _TILE))


def _square(values: np.ndarray) -> float:
    return float(values @ values)


def decode(total: np.ndarray, parameters: Parameters, seed: bytes) -> np.ndarray:
    """The sum of the clients' clipped updates, with noise: (dimension,) float64.

    `total` (size,) uint32 is the sum of their contributions modulo 2^32, however many they are.
    """
    if total.dtype != np.uint32:
        raise ValueError(f"a sum modulo 2^{BITS} is uint32, not {total.dtype}")
    steps = total.view(np.int32).astype(np.float64)
    values = rotation.unrotate(steps, seed, parameters.dimension)
    values /= parameters.scale
    return values


def epsilon(
    rounds: Iterable[tuple[Parameters, int]], delta: float, *, replaced: bool = False
) -> float:
    """Upper bound of what a client's part in all `rounds` costs, each with its actual survivors.

    Before a run, count `parameters.survivors` a round. `replaced`: see `gaussian_equivalent`. 0.0
    for no rounds, infinite without noise. Raises ConfigError for a delta outside (0, 1) and for
    survivors that are not from 1 to the cohort.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta!r}: not between 0 and 1; choose it below 1 / clients")
    curves = [
        skellam.curve(*_noise(parameters, survivors, replaced)) for parameters, survivors in rounds
    ]
    return rdp.converted(np.sum(curves, axis=0), delta, skellam.ORDERS)[0] if curves else 0.0


def gaussian_equivalent(parameters: Parameters, survivors: int, *, replaced: bool = False) -> float:
    """Noise multiplier of a plain Gaussian that costs at least as much as one sum; 0 for no noise.

    For a ledger that adds up Gaussians: Event(gaussian_equivalent(...), 1.0, 1) a round. Without
    `replaced` it protects a client that takes part or does not. With it, a client that sends
    another update instead, from which two sums differ by twice the norm: that is what a site's
    ledger needs for its records, because any record may change the site's update to any other.
    What `skellam.dominating_gaussian` says of the accountants holds. Raises ConfigError as above.
    """
    return skellam.dominating_gaussian(*_noise(parameters, survivors, replaced))


def _noise(parameters: Parameters, survivors: int, replaced: bool) -> tuple[float, float, float]:
    """Variance of a sum's noise, and the norms L2 and L1 by which two sums differ, in steps."""
    if not 1 <= survivors <= parameters.cohort:
        raise ConfigError(
            f"survivors {survivors}: not from 1 to the cohort of {parameters.cohort} clients"
        )
    l2 = parameters.bound * (2 if replaced else 1)
    l1 = min(l2 * math.sqrt(parameters.size), l2**2)  # no integer is larger than its square
    return parameters.variance * survivors / parameters.survivors, l2, l1
