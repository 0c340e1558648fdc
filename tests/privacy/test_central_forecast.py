"""What a run will cost is told before it starts, and whether that means anything."""

from __future__ import annotations

import math

import pytest

from fedipfs.privacy.central import forecast


@pytest.mark.parametrize(("z", "expected"), [(1, 54), (2, 20.7), (4, 8.6), (8, 3.8)])
def test_epsilon_of_fifty_rounds(z, expected):
    told = forecast(z, 50, 1e-5, 1000)
    assert told.epsilon_prv == pytest.approx(expected, rel=0.01)
    assert told.epsilon_prv <= told.epsilon_rdp < 1.1 * told.epsilon_prv


def test_it_is_the_gaussian_mechanisms_own():
    """Balle & Wang 2018, "Improving the Gaussian Mechanism", theorem 8, at sqrt(rounds) / z."""
    from scipy.stats import norm

    told = forecast(4.0, 50, 1e-5, 1000)
    mu, epsilon = math.sqrt(50) / 4.0, told.epsilon_prv
    delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-5, rel=0.01)


def test_a_run_that_means_something_is_told_in_one_line():
    told = forecast(4.0, 50, 1e-5, 1000, per_round=1000, values=10_000)
    assert told.text.startswith(
        f"client-level: after 50 rounds epsilon = {told.epsilon_prv:.3g} at delta = 1e-05 (prv; rdp"
    )
    assert told.text.endswith("; a round's noise is 0.4 times as long as the longest update")
    assert "\n" not in told.text
    assert not told.warnings
    assert not told.meaningless


def test_a_large_epsilon_says_nothing():
    told = forecast(1.0, 50, 1e-5, 1000)
    assert told.meaningless
    assert "epsilon = 54" in told.warnings[0]
    assert "raise privacy.noise_multiplier" in told.warnings[0]


@pytest.mark.parametrize(("delta", "clients", "warned"), [(0.1, 10, True), (0.09, 10, False)])
def test_delta_must_be_below_one_client(delta, clients, warned):
    told = forecast(8.0, 5, delta, clients)
    assert told.meaningless == warned
    if warned:
        assert "privacy.delta=0.1 is not below 1/10" in told.warnings[0]


def test_with_few_partners_the_noise_drowns_what_they_learn():
    told = forecast(4.0, 50, 1e-5, 10, values=4810)
    assert told.text.endswith("a round's noise is 27.7 times as long as the longest update")
    (warning,) = told.warnings
    assert "with 10 clients a round and 4810 values" in warning
    assert "is 3.92 times as long as all updates together can be" in warning
    assert not forecast(4.0, 50, 1e-5, 1000, per_round=1000, values=4810).meaningless


def test_adaptive_clipping_costs_no_more_privacy_and_some_noise():
    fixed, adaptive = (
        forecast(4.0, 50, 1e-5, 100, values=650, count_stddev=stddev) for stddev in (None, 2.1)
    )
    assert adaptive.epsilon_prv == fixed.epsilon_prv
    assert "is 1.02 times" in fixed.text
    assert "is 3.34 times" in adaptive.text
