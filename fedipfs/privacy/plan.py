"""What a run is going to cost, before it begins: two of epsilon, noise and rounds give the third.

Everything here is public. What depends on how many examples a client has, its sampling rate and
its number of steps, follows from a number that everybody may know instead, so that neither the
weights, nor their noise, nor the metrics tell the true one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedipfs.errors import ConfigError
from fedipfs.privacy.accounting import Event, History, epsilon, merged, most_steps
from fedipfs.privacy.accounting import noise_multiplier_for as least_noise

_CARE = 10  # delta is at most 1 / (10 N): one over the number of records promises nothing


@dataclass(frozen=True)
class Work:
    """What a client does in each of `rounds` rounds (None: as many as the budget allows).

    `steps` steps of DP-SGD at `sample_rate`, and `releases` times metrics with
    `metrics_noise_multiplier`.
    """

    rounds: int | None
    sample_rate: float
    steps: int
    releases: int = 0
    metrics_noise_multiplier: float = 1.0

    def history(self, noise_multiplier: float, rounds: int) -> History:
        """What `rounds` rounds with this noise consist of."""
        metrics = Event(self.metrics_noise_multiplier, 1.0, self.releases * rounds)
        events = [Event(noise_multiplier, self.sample_rate, self.steps * rounds), metrics]
        return merged(each for each in events if each.steps)


@dataclass(frozen=True)
class Plan:
    """What was planned: all of it known now."""

    epsilon: float  # after all rounds
    noise_multiplier: float
    rounds: int


def work(
    train: Mapping[str, Any],
    *,
    rounds: int | None,
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
    return Work(rounds, rate, steps, releases, metrics_noise_multiplier)


def plan(
    work: Work,
    *,
    epsilon_target: float | None,
    noise_multiplier: float | None,
    delta: float,
    accountant: str = "prv",
) -> Plan:
    """Two of `epsilon_target`, `noise_multiplier` and `work.rounds` give the third.

    With all three, they must fit. Raises ConfigError where they do not, or only one is given.
    """
    given = (epsilon_target, noise_multiplier, work.rounds)
    if sum(value is not None for value in given) < 2:
        raise ConfigError(
            "privacy.epsilon, privacy.noise_multiplier and rounds: give two of them, and the third "
            "is computed"
        )

    def cost(noise: float, rounds: int) -> float:
        return epsilon(work.history(noise, rounds), delta, accountant)

    if noise_multiplier is None:
        assert epsilon_target is not None and work.rounds is not None
        metrics = work.history(1.0, work.rounds)[:0]
        if work.releases:
            metrics = (Event(work.metrics_noise_multiplier, 1.0, work.releases * work.rounds),)
        try:
            noise_multiplier = least_noise(
                epsilon=epsilon_target,
                delta=delta,
                sample_rate=work.sample_rate,
                steps=work.steps * work.rounds,
                accountant=accountant,
                history=metrics,
            )
        except ConfigError as error:
            spent = epsilon(metrics, delta, accountant)
            hint = (
                f"; the metrics alone cost {spent:.3g}: raise privacy.metrics_noise_multiplier, or "
                "withhold them"
                if metrics
                else ""
            )
            raise ConfigError(f"{error}{hint}") from None
        return Plan(cost(noise_multiplier, work.rounds), noise_multiplier, work.rounds)
    if work.rounds is not None:
        spent = cost(noise_multiplier, work.rounds)
        if epsilon_target is not None and spent > epsilon_target:
            raise ConfigError(
                f"rounds={work.rounds} with privacy.noise_multiplier={noise_multiplier:g} cost "
                f"epsilon {spent:.3g} at delta {delta:g}, more than privacy.epsilon="
                f"{epsilon_target:g}; leave one of the three out (null), and it is computed"
            )
        return Plan(spent, noise_multiplier, work.rounds)
    assert epsilon_target is not None
    rounds = _most_rounds(work, noise_multiplier, epsilon_target, delta, accountant)
    if not rounds:
        raise ConfigError(
            f"one round with privacy.noise_multiplier={noise_multiplier:g} costs epsilon "
            f"{cost(noise_multiplier, 1):.3g} at delta {delta:g}, more than privacy.epsilon="
            f"{epsilon_target:g}; raise the noise"
        )
    return Plan(cost(noise_multiplier, rounds), noise_multiplier, rounds)


def _most_rounds(work: Work, noise: float, target: float, delta: float, accountant: str) -> int:
    if not work.releases:
        steps = most_steps(
            (), noise, work.sample_rate, epsilon=target, delta=delta, accountant=accountant
        )
        return steps // work.steps

    def fits(rounds: int) -> bool:
        return epsilon(work.history(noise, rounds), delta, accountant) <= target

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def default_delta(records: int) -> float:
    """At most 1 / (10 N) for N records, as a power of ten or half of one: 1e-6 for 60,000."""
    most = 1 / (_CARE * records)
    power = 10.0 ** math.floor(math.log10(most))
    return float(f"{5 * power if 5 * power <= most else power:.0e}")
