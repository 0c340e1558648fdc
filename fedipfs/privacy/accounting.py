"""What a history of noisy releases of the same data costs, in epsilon at a given delta.

Two accountants, both upper bounds. `prv` composes the distributions of the privacy loss and is
tight to about 3e-4 for a delta of 1e-9 or more, and for a smaller one unless epsilon is small too;
`rdp` composes Rényi divergences, as Opacus' RDPAccountant does, and serves to check the other.
Opacus' third, `gdp`, is a central limit approximation whose epsilon lies below the true one, so it
is not offered.

Epsilon is that of (epsilon, delta)-differential privacy when one record is added or removed. The
order in which a history's events happened does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from numbers import Integral, Real

from fedipfs.errors import ConfigError
from fedipfs.privacy import prv, rdp
from fedipfs.privacy.rdp import Event

__all__ = [
    "ACCOUNTANTS",
    "MOST_STEPS",
    "Event",
    "History",
    "epsilon",
    "merged",
    "most_steps",
]

History = tuple[Event, ...]
ACCOUNTANTS = ("prv", "rdp")
MOST_STEPS = 10_000_000  # of one mechanism


def merged(history: Iterable[tuple[float, float, int]]) -> History:
    """The history with equal mechanisms added up, sorted: the same for every order of spending.

    Raises ConfigError for a noise multiplier that is not positive and finite (1e-100 to 1e100), a
    sample rate outside (0, 1], or steps that are not a whole number from 0 to MOST_STEPS.
    """
    steps: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, count in history:
        _check_mechanism(noise_multiplier, sample_rate)
        _check_steps(count)
        key = (float(noise_multiplier), float(sample_rate))
        steps[key] = steps.get(key, 0) + int(count)
        _check_steps(steps[key])
    return tuple(Event(*key, steps[key]) for key in sorted(steps) if steps[key])


def epsilon(
    history: Iterable[tuple[float, float, int]], delta: float, accountant: str = "prv"
) -> float:
    """An upper bound of epsilon at `delta`; 0.0 for no steps.

    Of `prv` the smaller of both bounds: its own is infinite above 500, where it is not computed.
    Raises ConfigError for numbers that no mechanism can have and for an unknown accountant.
    """
    _check_target(delta, accountant)
    return _epsilon(merged(history), float(delta), accountant)


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float, accountant: str) -> float:
    if not history:
        return 0.0
    bound, _ = rdp.converted(rdp.curve(history), delta)
    return bound if accountant == "rdp" else min(bound, prv.epsilon(history, delta))


def most_steps(
    history: Iterable[tuple[float, float, int]],
    noise_multiplier: float,
    sample_rate: float,
    *,
    epsilon: float,
    delta: float,
    accountant: str = "prv",
) -> int:
    """How many more steps of a mechanism keep `epsilon` after `history`: 0 to MOST_STEPS.

    `epsilon` above accepts the count, and refuses one more; beyond 10,000 steps, one in 10,000
    more. Raises ConfigError as that does.
    """
    _check_target(delta, accountant, epsilon)
    _check_mechanism(noise_multiplier, sample_rate)
    mechanism = (float(noise_multiplier), float(sample_rate))
    return _most_steps(merged(history), mechanism, float(epsilon), float(delta), accountant)


@lru_cache(maxsize=4096)
def _most_steps(
    history: History, mechanism: tuple[float, float], cap: float, delta: float, accountant: str
) -> int:
    done = sum(event.steps for event in history if event[:2] == mechanism)
    most = MOST_STEPS - done

    def fits(steps: int) -> bool:
        return _epsilon(merged((*history, (*mechanism, steps))), delta, accountant) <= cap

    # The looser bound costs no time, and where it ends is not far below the end.
    low = 0 if accountant == "rdp" else _most_steps(history, mechanism, cap, delta, "rdp")
    if not low and not fits(0):
        return 0
    high = min(2 * low + 1, most)
    while fits(high):
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > 1 + low // 10_000:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check_mechanism(noise_multiplier: float, sample_rate: float) -> None:
    if not (_is_number(noise_multiplier) and 1e-100 <= noise_multiplier <= 1e100):
        raise ConfigError(
            f"noise_multiplier {noise_multiplier!r}: not a positive, finite number (1e-100 to "
            f"1e100); it is the noise's standard deviation over the clipping norm"
        )
    if not (_is_number(sample_rate) and 0 < sample_rate <= 1):
        raise ConfigError(
            f"sample_rate {sample_rate!r}: not in (0, 1]; it is the batch size over the number of "
            f"records"
        )


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 0 <= steps <= MOST_STEPS:
        raise ConfigError(f"steps {steps!r}: not a whole number from 0 to {MOST_STEPS}")


def _check_target(delta: float, accountant: str, epsilon: float = 1.0) -> None:
    if not (_is_number(delta) and 0 < delta < 1):
        raise ConfigError(
            f"delta {delta!r}: not between 0 and 1; choose it below 1 / (number of records)"
        )
    if not (_is_number(epsilon) and 0 < epsilon < math.inf):
        raise ConfigError(f"epsilon {epsilon!r}: not a positive, finite number")
    if accountant not in ACCOUNTANTS:
        raise ConfigError(f"accountant {accountant!r}: choose one of {', '.join(ACCOUNTANTS)}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
