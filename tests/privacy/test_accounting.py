"""Epsilon against dp-accounting, Opacus and closed forms, and the searches that rest on it."""

from __future__ import annotations

import json
import math
import re
import warnings
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from fedipfs.errors import ConfigError
from fedipfs.privacy import prv, rdp
from fedipfs.privacy.accounting import (
    ACCOUNTANTS,
    MOST_STEPS,
    Event,
    epsilon,
    merged,
    most_steps,
)

VECTORS = json.loads((Path(__file__).parent / "vectors/dp_accounting.json").read_text())
TYPICAL = (Event(1.0, 0.01, 1000),)


def opacus(accountant: type, history, delta: float, **options: float) -> float:
    spent = accountant()
    spent.history = [tuple(event) for event in history]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(spent.get_epsilon(delta, **options))


def gaussian(sigma: float, delta: float) -> float:
    """Balle and Wang 2018, "Improving the Gaussian Mechanism", theorem 8, solved for epsilon."""

    def exceeded(e: float) -> float:
        terms = [norm.logcdf(0.5 / sigma - e * sigma), e + norm.logcdf(-0.5 / sigma - e * sigma)]
        return logsumexp(terms, b=[1, -1]) - math.log(delta)

    return brentq(exceeded, 0, 0.5 / sigma**2 + 14 / sigma, xtol=1e-12) if exceeded(0) > 0 else 0


# ---- against others


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: str(case["history"]))
def test_dp_accounting_says_the_same(case):
    ours = epsilon(case["history"], case["delta"])
    assert ours == pytest.approx(case["pld"], abs=1e-3)
    assert ours > case["pld"] - 1e-4  # above the truth, which its grid misses by less than 1e-4
    whole = np.isin(rdp.ORDERS, range(2, 64))
    curve = rdp.curve(merged(case["history"]))[whole]
    found, _ = rdp.converted(curve, case["delta"], np.asarray(rdp.ORDERS)[whole])
    assert found == pytest.approx(case["rdp"], rel=1e-6)
    assert ours <= epsilon(case["history"], case["delta"], "rdp") <= found


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: str(case["history"]))
def test_opacus_rdp_says_the_same_and_never_less(case):
    theirs = opacus(RDPAccountant, case["history"], case["delta"])
    ours = epsilon(case["history"], case["delta"], "rdp")
    assert ours <= theirs + 1e-7
    best = rdp.converted(rdp.curve(merged(case["history"])), case["delta"])[1]
    if best in RDPAccountant.DEFAULT_ALPHAS:
        assert ours == pytest.approx(theirs, abs=1e-7)


@pytest.mark.parametrize(
    "history",
    [
        [(1.0, 0.01, 1000)],
        [(0.6, 0.02, 300)],
        [(8.0, 0.1, 5000)],
        [(1.0, 0.01, 500), (2.0, 0.05, 200)],
    ],
    ids=str,
)
def test_opacus_prv_says_the_same_less_its_error(history):
    ours = epsilon(history, 1e-5)
    assert 0 < opacus(PRVAccountant, history, 1e-5) - ours < 0.013


def test_a_finer_opacus_prv_comes_closer():
    fine = opacus(PRVAccountant, TYPICAL, 1e-5, eps_error=5e-4, delta_error=1e-9)
    assert -1e-5 < fine - epsilon(TYPICAL, 1e-5) < 6e-4


def test_the_facts_page():
    assert epsilon(TYPICAL, 1e-5, "rdp") == pytest.approx(2.101, abs=1e-3)
    assert epsilon(TYPICAL, 1e-5) == pytest.approx(1.828, abs=1e-3)  # 1.838 less Opacus' 0.01
    for noise_multiplier, expected in ((1, 54), (2, 20.7), (4, 8.6), (8, 3.8)):
        found = epsilon([(noise_multiplier, 1, 50)], 1e-5)
        assert found == pytest.approx(expected, abs=0.5 if noise_multiplier == 1 else 0.06)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9, 1e-13, 1e-20])
@pytest.mark.parametrize(("sigma", "steps"), [(0.1, 1), (0.7, 1), (3, 1), (3, 50), (400, 7)])
def test_plain_gaussians_are_as_the_analytic_mechanism_says(sigma, steps, delta):
    exact = gaussian(sigma / math.sqrt(steps), delta)
    ours = epsilon([(sigma, 1, steps)], delta)
    assert exact - 1e-9 <= ours <= exact + max(1e-4, 1e-6 * exact)


@pytest.mark.parametrize(
    ("sigma", "q", "delta"),
    [
        (0.8, 0.05, 1e-6),
        (0.58, 3e-5, 2e-10),
        (0.92, 4e-4, 4e-11),
        (0.73, 7e-4, 3e-13),
        (20, 0.3, 1e-9),
    ],
)
def test_one_step_is_as_the_hockey_stick_divergence_says(sigma, q, delta):
    def exceeded(e: float) -> float:
        x = sigma**2 * math.log((math.exp(e) - 1 + q) / q) + 0.5  # where the loss is e
        with_it = (1 - q) * norm.sf(x / sigma) + q * norm.sf((x - 1) / sigma)
        return with_it - math.exp(e) * norm.sf(x / sigma) - delta

    exact = brentq(exceeded, 1e-6, 20, xtol=1e-12)
    assert exact <= epsilon([(sigma, q, 1)], delta) <= exact + 1e-4


@pytest.mark.parametrize(
    ("history", "delta", "expected"),
    [  # dp-accounting with a grid of 1e-5: a delta that few of many rare events make
        ([(1.284, 2.7e-5, 30_180)], 8.8e-9, 0.0188),
        ([(1.1, 1e-4, 10_000)], 1e-8, 0.0526),
        ([(1.1, 1e-3, 10_000)], 1e-10, 0.6902),
    ],
)
def test_rare_events_at_a_small_delta(history, delta, expected):
    assert epsilon(history, delta) == pytest.approx(expected, abs=1e-3)


def test_what_rounding_errors_hide_is_not_taken_for_nothing():
    events = [(67.08, 2.87e-5, 6), (11.23, 1.27e-3, 2121), (2.145, 1.06e-4, 45_627)]
    for delta in (2.75e-10, 1e-13, 1e-20, 1e-40):
        assert 0.01 < epsilon(events, delta) <= epsilon(events, delta, "rdp")


@pytest.mark.parametrize(
    ("sigma", "q", "order"), [(0.6, 0.02, 1.1), (1.0, 0.01, 7.8), (8.0, 0.5, 1.9), (4.0, 0.1, 32.0)]
)
def test_the_curve_is_the_divergence(sigma, q, order):
    def integrand(x: float) -> float:
        return norm.pdf(x, scale=sigma) * (1 - q + q * math.exp((x - 0.5) / sigma**2)) ** order

    exact = math.log(quad(integrand, -20 * sigma, order + 20 * sigma, limit=500)[0]) / (order - 1)
    assert rdp.curve([(Event(sigma, q, 3))])[rdp.ORDERS.index(order)] == pytest.approx(3 * exact)


# ---- properties


mechanisms = st.tuples(
    st.sampled_from([0.4, 0.7, 1.0, 1.1, 3.0, 8.0]),
    st.sampled_from([0.001, 0.01, 0.02, 0.3, 1.0]),
)
histories = st.lists(st.tuples(mechanisms, st.integers(0, 3000)), max_size=3).map(
    lambda items: [(*mechanism, steps) for mechanism, steps in items]
)
deltas = st.sampled_from([1e-3, 1e-5, 1e-8])
accountants = st.sampled_from(ACCOUNTANTS)


@settings(deadline=None, max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(histories, mechanisms, st.integers(1, 2000), deltas, accountants)
def test_more_costs_more_and_less_than_both_apart(history, mechanism, steps, delta, accountant):
    more = [(*mechanism, steps)]
    before = epsilon(history, delta, accountant)
    after = epsilon(history + more, delta, accountant)
    assume(after < 400)
    assert after >= before - 3e-4
    assert after <= epsilon(history, delta / 2, accountant) + epsilon(more, delta / 2, accountant)
    assert epsilon(history + more, delta * 2, accountant) <= after


@settings(deadline=None, max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(histories, deltas)
def test_the_tight_bound_is_the_smaller_and_not_below_a_finer_one(history, delta):
    history = merged([*history, (2.0, 0.3, 1)])
    coarse = epsilon(history, delta)
    assert 0 <= coarse <= epsilon(history, delta, "rdp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prv, "_EXCESS", 1e-6)
        assert -1e-5 <= coarse - min(prv.epsilon(history, delta), coarse) < 5e-4


@given(
    st.lists(st.tuples(st.sampled_from([(1.0, 0.1), (1.0, 0.2), (2.0, 0.1)]), st.integers(0, 9)))
)
def test_merging_keeps_every_step_and_no_order(items):
    history = [(*mechanism, steps) for mechanism, steps in items]
    found = merged(history)
    assert found == merged(reversed(history)) == merged(found)
    assert len({event[:2] for event in found}) == len(found)
    assert sum(event.steps for event in found) == sum(steps for *_, steps in history)


def test_composition_is_exact():
    rounds = [Event(1.2, 0.05, 5)] * 3
    assert epsilon(rounds, 1e-5) == epsilon([Event(1.2, 0.05, 15)], 1e-5)
    mixed = [Event(1.2, 0.05, 5), Event(2.0, 0.1, 7), Event(1.2, 0.1, 9)]
    assert len({epsilon(order, 1e-5) for order in permutations(mixed)}) == 1


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_nothing_costs_nothing(accountant):
    assert epsilon([], 1e-5, accountant) == 0.0
    assert epsilon([(1.0, 0.1, 0)], 1e-5, accountant) == 0.0


def test_what_hides_within_delta_costs_nothing():
    assert epsilon([(1e6, 1e-5, 1)], 1e-5) == 0.0
    assert epsilon([(1e6, 1e-5, 1)], 1e-5, "rdp") < 0.004  # as far as its orders reach


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_extremes_have_an_answer(accountant):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for noise in (1e-100, 0.01, 0.02, 0.05, 0.3, 1e4, 1e100):
            for rate, steps in ((1, 10), (0.9, 1000), (0.5, 7), (1e-3, 3), (1e-9, 1), (1e-300, 1)):
                assert 0 <= epsilon([(noise, rate, steps)], 1e-5, accountant) < math.inf
        assert epsilon([(1.0, 1e-4, MOST_STEPS)], 1e-5, accountant) < 3


# ---- searches


@settings(deadline=None, max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(histories, mechanisms, st.floats(0.05, 8), accountants)
def test_most_steps_is_where_epsilon_passes(history, mechanism, cap, accountant):
    steps = most_steps(history, *mechanism, epsilon=cap, delta=1e-5, accountant=accountant)

    def spent(more: int) -> float:
        return epsilon([*history, (*mechanism, more)], 1e-5, accountant)

    if steps:
        assert spent(steps) <= cap
    further = 1 + steps // 10_000
    if sum(event[2] for event in history) + steps + further <= MOST_STEPS:
        assert spent(steps + further) > cap - 3e-5


def test_searches_at_their_ends():
    cap = {"epsilon": 1.0, "delta": 1e-5}
    assert most_steps([(1.0, 1, 1)], 1.0, 0.01, **cap) == 0  # spent already
    assert most_steps([], 0.3, 1, **cap) == 0
    assert most_steps([], 1e5, 1e-3, **cap) == MOST_STEPS
    assert most_steps([(1e5, 1e-3, 10)], 1e5, 1e-3, **cap) == MOST_STEPS - 10


# ---- misuse


@pytest.mark.parametrize("bad", [0, -1.0, 1e300, math.nan, math.inf, "1", None, True])
def test_a_noise_multiplier_is_positive_and_finite(bad):
    with pytest.raises(ConfigError, match=re.escape(f"noise_multiplier {bad!r}: ")):
        epsilon([(bad, 0.1, 1)], 1e-5)
    with pytest.raises(ConfigError, match="noise_multiplier"):
        most_steps([], bad, 0.1, epsilon=1.0, delta=1e-5)


@pytest.mark.parametrize("bad", [0, -0.1, 1.1, math.nan, "0.1", None, True])
def test_a_sample_rate_is_a_probability(bad):
    with pytest.raises(ConfigError, match=f"sample_rate {bad!r}: "):
        merged([(1.0, bad, 1)])


@pytest.mark.parametrize("bad", [-1, 1.5, math.nan, MOST_STEPS + 1, "3", True])
def test_steps_are_counted(bad):
    with pytest.raises(ConfigError, match=f"steps {bad!r}: "):
        merged([(1.0, 0.1, bad)])


@pytest.mark.parametrize("bad", [0, 1, -1e-5, math.nan, "1e-5", None])
def test_a_delta_is_between_zero_and_one(bad):
    with pytest.raises(ConfigError, match=f"delta {bad!r}: "):
        epsilon(TYPICAL, bad)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, "1"])
def test_a_target_is_positive_and_finite(bad):
    with pytest.raises(ConfigError, match=f"epsilon {bad!r}: "):
        most_steps([], 1.0, 0.1, epsilon=bad, delta=1e-5)


def test_gdp_is_not_offered():
    with pytest.raises(ConfigError, match="'gdp': choose one of prv, rdp"):
        epsilon(TYPICAL, 1e-5, "gdp")
