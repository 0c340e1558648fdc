"""Skellam noise against its exact distribution, and its curve against exact divergences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import log_ndtr, logsumexp
from scipy.stats import chisquare, kstest, norm, skellam

from fedipfs.privacy import rdp
from fedipfs.privacy import skellam as noise
from fedipfs.privacy.noise import generator

KEY = bytes(16)


def log_masses(variance: float, most: int) -> np.ndarray:
    """Log probabilities of -most to most: I_k(v) exp(-v), by Perron's continued fraction."""
    ratio, logs = 0.0, np.empty(most + 200)
    for k in range(len(logs), 0, -1):
        ratio = 1 / (2 * k / variance + ratio)  # I_k / I_(k-1)
        logs[k - 1] = math.log(ratio)
    upper = np.concatenate([[0], np.cumsum(logs[:most])])
    both = np.concatenate([upper[:0:-1], upper])
    return both - logsumexp(both)


def divergence(variance: float, move: int, order: float) -> float:
    """Rényi divergence of Skellam noise and the same moved by a whole number of steps."""
    most = int(3 * order * move + 40 * math.sqrt(variance) + 200)
    masses = log_masses(variance, most)
    moved, still = masses[:-move], masses[move:]
    return float(logsumexp(order * moved + (1 - order) * still) / (order - 1))


# ---- the noise


@pytest.mark.parametrize("variance", [0.5, 3.0, 40.0, 1000.0])
def test_it_has_the_exact_distribution(variance):
    drawn = noise.sample(generator(KEY), variance, 400_000)
    assert drawn.dtype == np.int64
    most = int(12 * math.sqrt(variance) + 12)
    expected = np.exp(log_masses(variance, most)) * drawn.size
    counts = np.bincount(drawn + most, minlength=2 * most + 1)
    common = expected > 20
    found = [*counts[common], counts[~common].sum()]
    assert chisquare(found, [*expected[common], expected[~common].sum()]).pvalue > 1e-4


def test_our_exact_masses_are_scipys():
    for variance in (0.5, 3.0, 40.0):
        k = np.arange(-20, 21)
        theirs = skellam.pmf(k, variance / 2, variance / 2)
        np.testing.assert_allclose(np.exp(log_masses(variance, 400))[380:421], theirs, rtol=1e-9)


def test_shares_add_up_to_the_whole():
    rng = generator(KEY)
    total = sum(noise.sample(rng, 6.0, 300_000) for _ in range(7))
    expected = np.exp(log_masses(42.0, 60)) * total.size
    counts = np.bincount(total + 60, minlength=121)
    common = expected > 20
    assert chisquare(
        [*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]
    ).pvalue > 1e-4  # fmt: skip


@pytest.mark.parametrize("variance", [1e6, noise.MOST_VARIANCE])
def test_large_noise_is_as_good_as_gaussian(variance):
    drawn = noise.sample(generator(KEY), variance, 1_000_000)
    assert drawn.var() == pytest.approx(variance, rel=0.01)
    jittered = drawn + generator(bytes([1] * 16)).random(drawn.size) - 0.5
    assert kstest(jittered / math.sqrt(variance), "norm").pvalue > 1e-4


def test_no_noise_and_too_much():
    assert not noise.sample(generator(), 0.0, 10).any()
    for variance in (-1.0, math.nan, 2 * noise.MOST_VARIANCE):
        with pytest.raises(ValueError, match="variance of"):
            noise.sample(generator(), variance, 10)


# ---- its curve


CASES = [
    (variance, move, order)
    for variance, move, order in itertools.product(
        (0.5, 2.0, 20.0, 1e4), (1, 2, 20, 100), (2, 3, 8, 64, 256, 1.01, 1.5, 2.5, 7.3)
    )
    if order * move < 3000
]


@pytest.mark.parametrize("variance", sorted({case[0] for case in CASES}))
def test_the_curve_lies_above_every_exact_divergence(variance):
    for _, move, order in (case for case in CASES if case[0] == variance):
        exact = divergence(variance, move, order)
        bound = float(noise.curve(variance, move, move, [order])[0])
        assert exact <= bound, (move, order)
        if variance == 1e4 and move >= 20:
            assert bound == pytest.approx(exact, rel=0.005)


def test_coordinates_add_up():
    move = np.array([3, 1, 0, -2])
    for order in (2, 5, 32):
        exact = sum(divergence(9.0, abs(int(m)), order) for m in move if m)
        l2, l1 = float(np.linalg.norm(move)), float(np.abs(move).sum())
        assert exact <= noise.curve(9.0, l2, l1, [order])[0]


@pytest.mark.parametrize("order", [2, 4])
def test_monte_carlo_agrees(order):
    variance, move = 25.0, np.array([2, 1, 1])
    drawn = noise.sample(generator(KEY), variance, 3_000_000).reshape(-1, 3) + move
    masses = log_masses(variance, 100)
    losses = (masses[drawn - move + 100] - masses[drawn + 100]).sum(axis=1)
    found = (logsumexp((order - 1) * losses) - math.log(len(losses))) / (order - 1)
    exact = sum(divergence(variance, int(m), order) for m in move)
    assert found == pytest.approx(exact, rel=0.01)
    assert found <= noise.curve(variance, math.sqrt(6), 4, [order])[0] * 1.005


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("dimension", [1, 1000, 1_000_000])
def test_at_a_hundred_steps_epsilon_is_a_gaussians_to_three_digits(multiplier, dimension):
    l2 = 100.0 * max(1, math.sqrt(dimension) / 10)
    curve = noise.curve((l2 * multiplier) ** 2, l2, min(l2 * math.sqrt(dimension), l2**2))
    gaussian = np.asarray(noise.ORDERS) / (2 * multiplier**2)
    for rounds in (1, 50):
        ours, theirs = (
            rdp.converted(rounds * one, 1e-5, noise.ORDERS)[0] for one in (curve, gaussian)
        )
        assert theirs <= ours <= theirs * 1.001


def test_the_orders_suffice_for_the_smallest_epsilons():
    for multiplier in (10, 1000, 1e5):
        gaussian = np.asarray(noise.ORDERS) / (2 * multiplier**2)
        _, best = rdp.converted(gaussian, 1e-5, noise.ORDERS)
        assert 2 < best < noise.ORDERS[-1]
    assert list(noise.ORDERS) == sorted(set(noise.ORDERS))


def test_no_noise_hides_nothing():
    assert np.isinf(noise.curve(0.0, 1.0, 1.0)).all()
    assert not noise.curve(0.0, 0.0, 0.0).any()


# ---- the Gaussian above it


def hockey_stick_of_gaussian(multiplier: float, epsilons: np.ndarray) -> np.ndarray:
    first = log_ndtr(0.5 / multiplier - epsilons * multiplier)
    second = epsilons + log_ndtr(-0.5 / multiplier - epsilons * multiplier)
    return -np.exp(first) * np.expm1(np.minimum(second - first, 0))


@pytest.mark.parametrize("variance", [25.0, 100.0, 1e4, 1e6])
def test_the_gaussian_dominates_each_coordinates_delta(variance):
    for move in (move for move in (1, 2, 5, 10, 100, 1000) if move <= 8 * math.sqrt(variance)):
        equivalent = math.sqrt(variance) / move / math.sqrt(1 + 0.75 / variance)
        assert noise.dominating_gaussian(variance, move, move) <= equivalent
        masses = log_masses(variance, int(40 * math.sqrt(variance) + 5 * move + 50))
        moved, still = masses[:-move], masses[move:]
        losses = moved - still  # they increase, so a hockey stick is a sum over an upper tail
        above = np.exp(moved)[::-1].cumsum()[::-1]
        below = np.exp(still)[::-1].cumsum()[::-1]
        kinks = np.unique(np.concatenate([[0.0], losses[losses > 0]]))
        epsilons = np.concatenate([kinks, *(kinks[:-1] + w * np.diff(kinks) for w in (0.3, 0.7))])
        first = np.searchsorted(losses, epsilons, side="right")
        epsilons, first = epsilons[first < losses.size], first[first < losses.size]
        exact = above[first] - np.exp(epsilons) * below[first]
        seen = exact > 1e-12  # below, the differences are rounding errors
        dominating = hockey_stick_of_gaussian(equivalent, epsilons)
        assert (exact <= dominating * (1 + 1e-9))[seen].all(), move


@pytest.mark.parametrize(("variance", "l2", "l1"), [(25, 50, 50), (100, 7, 49), (1e6, 2e6, 2e7)])
def test_the_gaussian_has_three_quarters_of_a_variance_more(variance, l2, l1):
    found = noise.dominating_gaussian(variance, l2, l1)
    assert found <= math.sqrt(variance) / l2 / math.sqrt(1 + 0.75 / variance)
    orders = np.asarray((*noise.ORDERS, *rdp.ORDERS))
    curve = noise.curve(variance, l2, l1, orders)
    assert (curve <= orders / (2 * found**2) * (1 + 1e-12)).all()


def test_the_gaussian_costs_hardly_more():
    for multiplier in (0.5, 1.0, 8.0):
        l2 = 50_000.0
        found = noise.dominating_gaussian((multiplier * l2) ** 2, l2, 1000 * l2)
        assert multiplier * (1 - 1e-6) <= found <= multiplier
    assert noise.dominating_gaussian(0.0, 1.0, 1.0) == 0.0


def test_our_gaussian_is_the_textbooks():
    epsilons = np.array([0.0, 1.0])
    expected = [2 * norm.cdf(0.25) - 1, norm.cdf(0.25 - 2) - math.e * norm.cdf(-0.25 - 2)]
    np.testing.assert_allclose(hockey_stick_of_gaussian(2.0, epsilons), expected, rtol=1e-9)
