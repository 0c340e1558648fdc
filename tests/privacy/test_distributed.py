"""From updates to a noisy sum: exact without noise, bounded always, and what it is said to cost."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedipfs.errors import BadUpdate, ConfigError
from fedipfs.privacy import accounting, rdp, skellam
from fedipfs.privacy.distributed import (
    Parameters,
    decode,
    encode,
    epsilon,
    gaussian_equivalent,
)
from fedipfs.privacy.noise import generator

SEED = bytes(range(32))
KEY = bytes(16)


def planned(dimension=300, clip=1.0, noise=1.0, survivors=7, cohort=10, scale=None) -> Parameters:
    return Parameters.chosen(
        dimension=dimension,
        clip=clip,
        noise_multiplier=noise,
        survivors=survivors,
        cohort=cohort,
        scale=scale,
    )


def clipped(update: np.ndarray, clip: float) -> np.ndarray:
    norm = np.linalg.norm(update)
    return update * min(1.0, clip / norm) if norm else update


def summed(contributions) -> np.ndarray:
    return np.sum(list(contributions), axis=0, dtype=np.uint32)


# ---- the sum


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 600),
    st.floats(1e-3, 1e3),
    st.integers(1, 12),
    st.sampled_from(["f4", "f8"]),
    st.integers(0, 99),
)
def test_without_noise_the_sum_is_that_of_clipped_updates(dimension, clip, clients, dtype, number):
    rng = np.random.default_rng(number)
    lengths = rng.exponential(2 * clip, (clients, 1)) / math.sqrt(dimension)
    updates = (rng.normal(size=(clients, dimension)) * lengths).astype(dtype)
    parameters = planned(dimension, clip, 0.0, 1, clients)
    total = summed(encode(update, parameters, SEED) for update in updates)
    assert total.shape == (parameters.size,)
    expected = np.sum([clipped(update.astype("f8"), clip) for update in updates], axis=0)
    error = np.abs(decode(total, parameters, SEED) - expected)
    # rotated errors of less than a step each, and those of single precision
    steps = clients * 6 / parameters.scale
    assert error.max() <= steps + 1e-6 * clip * clients


def test_rounding_is_right_on_average_and_within_a_step():
    parameters = planned(2, 1.0, 0.0, 1, 1, scale=4.0)
    update = np.array([0.3, -0.2])
    rng = generator(KEY)
    found = np.stack([decode(encode(update, parameters, SEED, rng), parameters, SEED)
                      for _ in range(4000)])  # fmt: skip
    np.testing.assert_allclose(found.mean(axis=0), update, atol=0.01)
    assert np.abs(found - update).max() <= math.sqrt(2) / 4


def test_the_order_of_clients_does_not_matter():
    parameters = planned(50)
    rng = np.random.default_rng(0)
    parts = [encode(rng.normal(size=50), parameters, SEED) for _ in range(4)]
    sums = {summed(order).tobytes() for order in itertools.permutations(parts)}
    assert len(sums) == 1


def test_secret_noise_differs_and_a_key_repeats_it():
    parameters = planned(50)
    update = np.ones(50)
    assert (encode(update, parameters, SEED) != encode(update, parameters, SEED)).any()
    one, other = (encode(update, parameters, SEED, generator(KEY)) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_the_update_is_left_alone():
    update = np.full(50, 3.0)
    encode(update, planned(50), SEED)
    assert (update == 3.0).all()


# ---- the noise


@pytest.mark.parametrize("clients", [7, 10])
def test_each_survivor_adds_its_share(clients):
    parameters = planned(16_384, 2.0, 1.5, 7, 10)
    rng = generator(KEY)
    zero = np.zeros(16_384, "f4")
    noise = decode(summed(encode(zero, parameters, SEED, rng) for _ in range(clients)),
                   parameters, SEED)  # fmt: skip
    deviation = 2.0 * 1.5 * math.sqrt(clients / 7)
    assert noise.std() == pytest.approx(deviation, rel=0.02)
    assert stats.kstest(noise / deviation, "norm").pvalue > 1e-4


def test_the_noise_of_a_sum_is_skellam():
    parameters = planned(16_384, 1.0, 0.5, 3, 3, scale=16.0)
    rng = generator(KEY)
    zero = np.zeros(16_384)
    drawn = [summed(encode(zero, parameters, SEED, rng) for _ in range(3)) for _ in range(6)]
    values = np.concatenate(drawn).view(np.int32)
    k = np.arange(-60, 61)
    expected = stats.skellam.pmf(k, 32, 32) * values.size
    counts = np.bincount(values + 60, minlength=121)
    common = expected > 20
    rest = [counts[~common].sum(), expected[~common].sum()]
    assert stats.chisquare([*counts[common], rest[0]], [*expected[common], rest[1]]).pvalue > 1e-4


# ---- the bound


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 300), st.floats(0.5, 300), st.integers(0, 10**6))
def test_a_rounded_update_is_never_longer_than_the_bound(dimension, scale, number):
    parameters = planned(dimension, 1.0, 0.0, 1, 2, scale=scale)
    rng = np.random.default_rng(number)
    shape = rng.choice([0.0, 1.0, 1e6], size=dimension)
    update = rng.normal(size=dimension) * shape + rng.choice([0.0, 1.0])
    integers = encode(update, parameters, SEED, generator(KEY)).view(np.int32).astype("f8")
    assert np.linalg.norm(integers) <= parameters.bound
    assert np.abs(integers).sum() <= (integers @ integers) * (1 + 1e-12)


def test_the_bound_is_the_papers():
    parameters = planned(1024, 1.0, 0.0, 1, 1, scale=100.0)
    assert parameters.bound == pytest.approx(
        math.sqrt(100**2 + 1024 / 4 + 1.0 * (100 + math.sqrt(1024) / 2))
    )
    assert parameters.inflation == pytest.approx(parameters.bound / 100)


def test_rounding_is_tried_again_until_it_fits():
    parameters = planned(1, 1.0, 0.0, 1, 1, scale=1.9)  # 1.9 becomes 2 or 1; 2.4 is the bound
    assert 2 < parameters.bound < 3
    small = planned(1, 1.0, 0.0, 1, 1, scale=0.1)  # 0.1 becomes 1 or 0; 0.9 is the bound
    assert small.bound < 1
    assert not any(encode(np.ones(1), small, SEED).any() for _ in range(50))


# ---- the parameters


@pytest.mark.parametrize(
    ("clip", "noise", "survivors", "cohort"),
    [(1.0, 1.0, 7, 10), (0.1, 8.0, 67, 100), (10.0, 1.0, 50, 100_000), (1e-4, 0.3, 2, 3)],
)
@pytest.mark.parametrize("dimension", [1, 10, 77_938, 1_200_000])
def test_the_scale_is_fine_and_safe(dimension, clip, noise, survivors, cohort):
    parameters = planned(dimension, clip, noise, survivors, cohort)
    assert 1 < parameters.inflation < 1.0006
    assert math.log2(parameters.scale).is_integer()
    assert parameters.largest < 2**31
    assert parameters.variance / survivors <= skellam.MOST_VARIANCE


def test_a_crowd_gets_coarser_steps_and_does_not_wrap():
    parameters = planned(1_200_000, 1.0, 1.0, 7, 1_000_000)
    assert parameters.scale < planned(1_200_000, 1.0, 1.0, 7, 10).scale
    assert parameters.largest < 2**31
    with pytest.raises(ConfigError, match=r"sum of 3000000000 clients .* wrap around"):
        planned(1_200_000, 1.0, 1.0, 7, 3_000_000_000)


def test_equal_updates_of_a_whole_cohort_do_not_wrap():
    parameters = planned(100, 1.0, 0.0, 1, 1000, scale=2.0**20)
    update = np.eye(1, 100)[0]
    one = encode(update, parameters, SEED).view(np.int32).astype("i8")
    assert np.abs(1000 * one).max() < parameters.largest < 2**31
    total = (1000 * one).astype(np.uint32)
    np.testing.assert_allclose(decode(total, parameters, SEED), 1000 * update, atol=0.01)
    with pytest.raises(ConfigError, match=r"may reach .* wrap around modulo 2\^32; leave"):
        planned(100, 1.0, 0.0, 1, 1000, scale=2.0**25)


def test_largest_is_seldom_reached_by_noise():
    parameters = planned(16_384, 1.0, 4.0, 2, 8)
    rng = generator(KEY)
    zero = np.zeros(16_384)
    values = summed(encode(zero, parameters, SEED, rng) for _ in range(8)).view(np.int32)
    assert 3 * math.sqrt(parameters.variance * 4) < np.abs(values).max() < parameters.largest


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dimension": 0}, "dimension 0: "),
        ({"clip": 0.0}, "clip 0.0: "),
        ({"clip": math.nan}, "clip nan: "),
        ({"noise": -1.0}, "noise_multiplier -1.0: "),
        ({"noise": math.inf}, "noise_multiplier inf: "),
        ({"survivors": 0}, "survivors 0: "),
        ({"survivors": 11}, "survivors 11: not from 1 to the cohort of 10"),
        ({"scale": -2.0}, "scale -2.0: "),
        ({"scale": 1e6}, "variance of 1.43e\\+11.* leave scale"),
    ],
)
def test_parameters_are_checked(changed, message):
    with pytest.raises(ConfigError, match=message):
        planned(**changed)


@pytest.mark.parametrize("changed", [{"scale": 1e300}, {"noise": 1e300}, {"clip": 1e300}])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_absurd_numbers_are_refused_too(changed, noise):
    with pytest.raises(ConfigError, match="leave scale"):
        planned(**{"scale": 1e10, "noise": noise} | changed)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(bad):
    update = np.ones(50)
    update[7] = bad
    with pytest.raises(BadUpdate, match="not finite"):
        encode(update, planned(50), SEED)


def test_misuse():
    parameters = planned(50)
    with pytest.raises(ValueError, match=r"an update of shape \(49,\), not \(50,\)"):
        encode(np.ones(49), parameters, SEED)
    with pytest.raises(ValueError, match="uint32, not int64"):
        decode(np.zeros(64, "i8"), parameters, SEED)
    with pytest.raises(ValueError, match="50 rotated values come as 64"):
        decode(np.zeros(50, "u4"), parameters, SEED)


# ---- what it costs


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 8.0])
@pytest.mark.parametrize("dimension", [10, 77_938, 1_200_000])
def test_epsilon_is_a_gaussians_to_three_digits(noise, dimension):
    parameters = planned(dimension, 1.0, noise, 7, 10)
    gaussian = np.asarray(skellam.ORDERS) / (2 * noise**2)
    for rounds in (1, 50):
        theirs, _ = rdp.converted(rounds * gaussian, 1e-5, skellam.ORDERS)
        assert theirs <= epsilon([(parameters, 7)] * rounds, 1e-5) <= theirs * 1.001


def test_more_survivors_cost_less_and_rounds_add_up_in_any_order():
    parameters = planned(noise=4.0)
    costs = [epsilon([(parameters, m)] * 5, 1e-5) for m in (5, 7, 8, 10)]
    assert costs == sorted(costs, reverse=True)
    rounds = [(parameters, 7), (parameters, 9), (planned(noise=2.0), 8)]
    found = [epsilon(order, 1e-5) for order in itertools.permutations(rounds)]
    assert found == pytest.approx([found[0]] * 6)
    assert epsilon(rounds, 1e-5) < epsilon([(parameters, 7), (parameters, 7), rounds[2]], 1e-5)
    # ten tenths more noise is a noise multiplier larger by the root
    larger = planned(noise=4.0 * math.sqrt(10 / 7))
    assert costs[3] == pytest.approx(epsilon([(larger, 7)] * 5, 1e-5), rel=1e-3)


def test_a_replaced_update_is_twice_as_far():
    half, whole = planned(noise=4.0), planned(noise=8.0)
    assert epsilon([(whole, 7)], 1e-5, replaced=True) == pytest.approx(
        epsilon([(half, 7)], 1e-5), rel=1e-4
    )
    assert gaussian_equivalent(whole, 7, replaced=True) == pytest.approx(
        gaussian_equivalent(whole, 7) / 2, rel=1e-4
    )


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize("noise", [1.0, 8.0])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_ledger_can_count_it_as_a_gaussian(noise, replaced, accountant):
    parameters = planned(1_200_000, 1.0, noise, 7, 10)
    equivalent = gaussian_equivalent(parameters, 8, replaced=replaced)
    plain = noise * math.sqrt(8 / 7) / (2 if replaced else 1)
    assert plain * 0.999 < equivalent < plain
    spent = accounting.epsilon([(equivalent, 1.0, 20)], 1e-5, accountant)
    gaussian = accounting.epsilon([(plain, 1.0, 20)], 1e-5, accountant)
    assert gaussian < spent < gaussian * 1.003


def test_nothing_costs_nothing_and_no_noise_everything():
    silent = planned(noise=0.0)
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([(silent, 7)], 1e-5) == math.inf
    assert gaussian_equivalent(silent, 7) == 0.0


@pytest.mark.parametrize("survivors", [0, 11])
def test_survivors_are_of_the_cohort(survivors):
    with pytest.raises(ConfigError, match=f"survivors {survivors}: not from 1 to the cohort"):
        epsilon([(planned(), survivors)], 1e-5)
    with pytest.raises(ConfigError, match="survivors"):
        gaussian_equivalent(planned(), survivors)


@pytest.mark.parametrize("delta", [0, 1, math.nan])
def test_a_delta_is_between_zero_and_one(delta):
    with pytest.raises(ConfigError, match="delta"):
        epsilon([(planned(), 7)], delta)
