"""Of epsilon, noise and rounds two give the third, and what is wrong names what to change."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedipfs.errors import ConfigError
from fedipfs.privacy.accounting import Event, epsilon
from fedipfs.privacy.plan import Plan, Work, default_delta, plan, work

DELTA = 1e-5
PLAIN = Work(sample_rate=0.05, steps=20)
WITH_METRICS = replace(PLAIN, releases=2, metrics_noise_multiplier=40.0)


def planned(what: Work, *, rounds=10, target=None, noise=None, accountant="rdp") -> Plan:
    return plan(
        what.cost(DELTA, accountant),
        rounds=rounds,
        epsilon_target=target,
        noise_multiplier=noise,
        delta=DELTA,
    )


def cost(what: Work, noise: float, rounds: int, accountant="rdp") -> float:
    """Epsilon of a history that is written out."""
    history = [(noise, what.sample_rate, what.steps)] * rounds
    history += [(what.metrics_noise_multiplier, 1.0, 1)] * (rounds * what.releases)
    return epsilon(history, DELTA, accountant)


# ---- two give the third


@pytest.mark.parametrize("what", [PLAIN, WITH_METRICS], ids=["plain", "with metrics"])
@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_noise_and_rounds_give_epsilon(what, accountant):
    found = planned(what, noise=1.3, accountant=accountant)
    assert found == Plan(cost(what, 1.3, 10, accountant), 1.3, 10)


@pytest.mark.parametrize("what", [PLAIN, WITH_METRICS], ids=["plain", "with metrics"])
@pytest.mark.parametrize("target", [0.8, 3.0, 20.0])
def test_epsilon_and_rounds_give_the_least_noise(what, target):
    found = planned(what, target=target)
    assert found.rounds == 10
    assert found.epsilon == cost(what, found.noise_multiplier, 10) <= target
    assert cost(what, found.noise_multiplier * 0.998, 10) > target


@pytest.mark.parametrize("what", [PLAIN, WITH_METRICS], ids=["plain", "with metrics"])
@pytest.mark.parametrize("target", [0.8, 3.0, 20.0])
def test_epsilon_and_noise_give_the_most_rounds(what, target):
    found = planned(what, rounds=None, target=target, noise=3.0)
    assert found.epsilon == cost(what, 3.0, found.rounds) <= target
    assert cost(what, 3.0, found.rounds + 1) > target


def test_metrics_take_of_the_budget():
    noise = [planned(what, target=3.0).noise_multiplier for what in (PLAIN, WITH_METRICS)]
    assert noise[0] < noise[1]
    rounds = [
        planned(what, rounds=None, target=3.0, noise=1.5).rounds for what in (PLAIN, WITH_METRICS)
    ]
    assert rounds[0] > rounds[1]


@given(
    target=st.floats(0.01, 100),
    noise=st.floats(0.02, 1e3),
    rounds=st.integers(1, 10_000),
    each=st.floats(0.01, 10),
    other=st.floats(0, 0.01),
)
def test_what_was_computed_is_the_best_and_accepted_when_it_is_given(
    target, noise, rounds, each, other
):
    """A run that is resumed gives all three. Any cost will do that grows as epsilon does."""

    def cost(noise: float, rounds: int) -> float:
        return each * math.sqrt(rounds) / noise + other * rounds

    def found(**two) -> Plan | None:
        told = {"rounds": None, "epsilon_target": None, "noise_multiplier": None, **two}
        try:
            return plan(cost, delta=DELTA, **told)
        except ConfigError:
            return None

    spent = found(rounds=rounds, noise_multiplier=noise)
    least = found(rounds=rounds, epsilon_target=target)
    most = found(noise_multiplier=noise, epsilon_target=target)
    assert spent == Plan(cost(noise, rounds), noise, rounds)
    if least is None:
        assert cost(1e6, rounds) > target * 0.999
    else:
        assert least.epsilon <= target
        lower = least.noise_multiplier * 0.998
        assert lower < 0.01 or cost(lower, rounds) > target
    if most is None:
        assert cost(noise, 1) > target
    else:
        assert most.epsilon <= target
        assert most.rounds > 500_000 or cost(noise, most.rounds + 1) > target
    for one in filter(None, (spent, least, most)):
        told = {"epsilon_target": one.epsilon, "noise_multiplier": one.noise_multiplier}
        assert found(rounds=one.rounds, **told) == one


# ---- what does not fit


@pytest.mark.parametrize(
    ("rounds", "target", "noise"),
    [(10, None, None), (None, 3.0, None), (None, None, 1.0), (None, None, None)],
)
def test_less_than_two_are_refused(rounds, target, noise):
    with pytest.raises(ConfigError, match=r"privacy\.epsilon.*noise_multiplier and rounds.*two"):
        planned(PLAIN, rounds=rounds, target=target, noise=noise)


def test_all_three_that_fit_are_taken_with_what_they_cost():
    assert planned(PLAIN, target=50.0, noise=2.0) == planned(PLAIN, noise=2.0)


def test_all_three_that_do_not_fit_are_refused_with_the_cost_and_the_remedy():
    with pytest.raises(ConfigError) as caught:
        planned(PLAIN, target=1.0, noise=0.7)
    spent = cost(PLAIN, 0.7, 10)
    assert spent > 1
    text = str(caught.value)
    assert f"rounds=10 with privacy.noise_multiplier=0.7 cost epsilon {spent:.3g}" in text
    assert "more than privacy.epsilon=1" in text and "leave one of the three out (null)" in text


def test_a_first_round_that_costs_too_much_is_refused():
    with pytest.raises(ConfigError) as caught:
        planned(PLAIN, rounds=None, target=0.01, noise=0.5)
    assert f"costs epsilon {cost(PLAIN, 0.5, 1):.3g}" in str(caught.value)
    assert "raise the noise" in str(caught.value)


def test_metrics_that_leave_nothing_for_training_are_named():
    what = replace(WITH_METRICS, releases=100)
    with pytest.raises(ConfigError) as caught:
        planned(what, target=0.5)
    alone = epsilon([(40.0, 1.0, 1000)], DELTA, "rdp")
    assert f"{alone:.3g} is spent on other things, such as metrics" in str(caught.value)
    assert "raise epsilon or privacy.metrics_noise_multiplier, or withhold" in str(caught.value)


# ---- the work that a configuration describes


def train(**changed):
    return {"batch_size": 32, "epochs": 3, "steps": None, **changed}


@pytest.mark.parametrize(
    ("changed", "options", "rate", "steps"),
    [
        ({}, {"examples": 320}, 0.1, 30),
        ({}, {"examples": 321}, 32 / 321, 33),  # a batch that is begun is one
        ({}, {"examples": 20}, 1.0, 3),
        ({"steps": 7}, {"examples": 320}, 0.1, 7),
        ({}, {"examples": 320, "sample_rate": 0.25}, 0.25, 12),
        ({"steps": 7}, {"examples": 320, "whole": True}, 1.0, 1),
        ({}, {"examples": 320, "whole": True, "sample_rate": 0.3}, 0.3, 1),
    ],
)
def test_steps_and_rate_follow_from_what_everybody_knows(changed, options, rate, steps):
    assert work(train(**changed), **options) == Work(pytest.approx(rate), steps)


@given(batch=st.integers(1, 500), examples=st.integers(1, 10**6))
def test_an_epoch_is_as_many_steps_as_plain_training_takes(batch, examples):
    found = work(train(batch_size=batch, epochs=1), examples=examples)
    assert found.steps == -(-examples // batch)


@given(rounds=st.integers(1, 50), steps=st.integers(1, 50), releases=st.integers(0, 3))
def test_a_history_is_that_of_the_rounds_one_by_one(rounds, steps, releases):
    what = Work(0.1, steps, releases, 9.0)
    found = dict((event[:2], event.steps) for event in what.history(1.5, rounds))
    assert found.pop((1.5, 0.1)) == rounds * steps
    assert found == ({(9.0, 1.0): rounds * releases} if releases else {})


def test_metrics_with_the_noise_of_training_are_one_mechanism():
    assert Work(1.0, 3, 1, 4.0).history(4.0, 2) == (Event(4.0, 1.0, 8),)


@given(st.integers(1, 10**12))
@example(1)
@example(100_000)
@example(99_999)
@example(60_000)
def test_delta_is_at_most_a_tenth_of_one_over_the_records_and_reads_well(records):
    delta = default_delta(records)
    assert 0.19 / (10 * records) <= delta <= 1 / (10 * records)
    assert re.fullmatch(r"[15](e-\d+)?|0\.[0]*[15]", f"{delta:g}")


def test_delta_of_known_sizes():
    assert [default_delta(n) for n in (1, 60_000, 1_000, 1_437)] == [0.1, 1e-6, 1e-4, 5e-5]
