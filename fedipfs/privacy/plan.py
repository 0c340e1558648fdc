"""What a run is going to cost, before it begins: two of epsilon, noise and rounds give the third.

Everything here is public. What depends on how many examples a client has, its sampling rate and
its number of steps, follows from a number that everybody may know instead, so that neither the
weights, nor their noise, nor the metrics tell the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy.optimize import brentq

from fedipfs.errors import ConfigError
from fedipfs.privacy.accounting import Event, History, epsilon, merged

_LEAST_LOG, _MOST_LOG = -5.0, 14.0  # of a noise multiplier that is looked for
_PRECISION = 1e-3  # relative
_MOST_ROUNDS = 1 << 20
_LAST_BITS = 1e-9  # relative: a plan is computed again on resume, maybe by another processor
_CARE = 10  # delta is at most 1 / (10 N): one over the number of records promises nothing


@dataclass(frozen=True)
class Work:
    """What a client does in a round.

    `steps` steps of DP-SGD at `sample_rate`, and `releases` times metrics with
    `metrics_noise_multiplier`.
    """

    sample_rate: float
    steps: int
    releases: int = 0
    metrics_noise_multiplier: float = 1.0

    def history(self, noise_multiplier: float, rounds: int) -> History:
        """What `rounds` rounds with this noise consist of."""
        metrics = Event(self.metrics_noise_multiplier, 1.0, self.releases * rounds)
        events = [Event(noise_multiplier, self.sample_rate, self.steps * rounds), metrics]
        return merged(each for each in events if each.steps)

    def cost(self, delta: float, accountant: str) -> Callable[[float, int], float]:
        """Epsilon at `delta`, by noise multiplier and rounds."""
        return lambda noise, rounds: epsilon(self.history(noise, rounds), delta, accountant)


@dataclass(frozen=True)
class Plan:
    """What was planned: all of it known now."""

    epsilon: float  # after all rounds
    noise_multiplier: float
    rounds: int


def work(
    train: Mapping[str, Any],
    *,
    examples: int,
    sample_rate: float | None = None,
    whole: bool = False,
    releases: int = 0,
    metrics_noise_multiplier: float = 1.0,
) -> Work:
    """The work that the section `train` describes at a client known to have `examples`.

    Batches of `train.batch_size` are expected, unless `sample_rate` is given; `whole` is for one
    step a round on all examples (or a batch at `sample_rate`).
    """
    if whole:
        rate = 1.0 if sample_rate is None else sample_rate
        steps = 1
    else:
        rate = min(1.0, train["batch_size"] / examples) if sample_rate is None else sample_rate
        steps = train["steps"] or train["epochs"] * math.ceil(1 / rate - 1e-9)
    return Work(rate, steps, releases, metrics_noise_multiplier)


def plan(
    cost: Callable[[float, int], float],
    *,
    rounds: int | None,
    epsilon_target: float | None,
    noise_multiplier: float | None,
    delta: float,
) -> Plan:
    """Two of `epsilon_target`, `noise_multiplier` and `rounds` give the third.

    `cost(noise_multiplier, rounds)` is the epsilon at `delta`, the less the more noise and the
    fewer rounds. With all three, they must fit. Raises ConfigError where they do not, or only one
    is given.
    """
    if sum(value is not None for value in (epsilon_target, noise_multiplier, rounds)) < 2:
        raise ConfigError(
            "privacy.epsilon, privacy.noise_multiplier and rounds: give two of them, and the third "
            "is computed"
        )
    if noise_multiplier is None:
        assert epsilon_target is not None and rounds is not None
        noise_multiplier = _least_noise(cost, epsilon_target, rounds, delta)
    elif rounds is None:
        assert epsilon_target is not None
        rounds = _most_rounds(cost, epsilon_target, noise_multiplier, delta)
    spent = cost(noise_multiplier, rounds)
    if epsilon_target is not None and spent > epsilon_target * (1 + _LAST_BITS):
        raise ConfigError(
            f"rounds={rounds} with privacy.noise_multiplier={noise_multiplier:g} cost epsilon "
            f"{spent:.3g} at delta {delta:g}, more than privacy.epsilon={epsilon_target:g}; leave "
            "one of the three out (null), and it is computed"
        )
    return Plan(spent, noise_multiplier, rounds)


def _least_noise(
    cost: Callable[[float, int], float], target: float, rounds: int, delta: float
) -> float:
    """The least noise that is enough, to a thousandth; none below exp(-5) is looked for."""

    def excess(exponent: float) -> float:
        return math.log(max(cost(math.exp(exponent), rounds), 1e-9) / target)

    high = 0.0
    while excess(high) > 0:
        high += 1
        if high > _MOST_LOG:
            raise ConfigError(
                f"no noise keeps privacy.epsilon={target:g} at delta {delta:g} over {rounds} "
                f"rounds: {cost(math.exp(_MOST_LOG), rounds):.3g} is spent on other things, such "
                "as metrics; raise epsilon or privacy.metrics_noise_multiplier, or withhold them"
            )
    low = high - 1
    while low > _LEAST_LOG and excess(low) <= 0:
        low, high = low - 1, low
    if excess(low) <= 0:
        return math.exp(low)
    found = float(brentq(excess, low, high, xtol=_PRECISION / 4))
    while excess(found) > 0:
        found += _PRECISION / 4
    return math.exp(found)


def _most_rounds(
    cost: Callable[[float, int], float], target: float, noise: float, delta: float
) -> int:
    if (one := cost(noise, 1)) > target:
        raise ConfigError(
            f"one round with privacy.noise_multiplier={noise:g} costs epsilon {one:.3g} at delta "
            f"{delta:g}, more than privacy.epsilon={target:g}; raise the noise"
        )
    low, high = 1, 2
    while cost(noise, high) <= target and high < _MOST_ROUNDS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(noise, middle) <= target else (low, middle)
    return low


def default_delta(records: int) -> float:
    """At most 1 / (10 N) for N records, as a power of ten or half of one: 1e-6 for 60,000."""
    most = 1 / (_CARE * records)
    power = 10.0 ** math.floor(math.log10(most))
    return float(f"{5 * power if 5 * power <= most else power:.0e}")
