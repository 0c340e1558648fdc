"""Values and numbers as integers: what comes back, what is refused, what is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import BadUpdate, WrongVector
from fedipfs.secagg import Parameters, decode, decode_numbers, encode, encode_numbers, fixed
from fedipfs.secagg.quantize import suggest

KEY = bytes(range(32))


def parameters(clients: int = 10, values: int = 1000, **options) -> Parameters:
    return Parameters.choose(clients, values, numbers=("weight",), **options)


def add(vectors) -> np.ndarray:
    return np.sum(vectors, axis=0, dtype=np.uint32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 32768, 100_000])
def test_the_weighted_mean_comes_back(size, dtype):
    terms = parameters(values=size)
    random = np.random.default_rng(1)
    updates = [(random.standard_normal(size) * 0.1).astype(dtype) for _ in range(7)]
    weights = random.integers(100, 600, 7)
    coded = [
        encode(terms, update, {"weight": weight / 600}, weight / 600)
        for update, weight in zip(updates, weights, strict=True)
    ]
    found = decode(terms, add([each.vector for each in coded]), 7, per="weight")
    expected = np.average(np.stack(updates).astype(np.float64), axis=0, weights=weights)
    assert found.values.dtype == np.float32
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=6e-6)
    assert found.numbers["weight"] == pytest.approx(weights.sum() / 600, abs=1e-8)
    assert (found.clipped, found.suggestion) == (0, None)


def test_rounding_is_right_on_average_and_never_off_by_a_step():
    terms = parameters(clients=3, values=200_000, bits=4)
    step = 2 / 15
    for value in (-0.9, -0.33, 0.0, 0.05, 0.77):
        vector = encode(terms, np.full(200_000, value), {"weight": 1}).vector[:200_000]
        back = vector * step - 1
        assert np.abs(back - value).max() < step
        assert back.mean() == pytest.approx(value, abs=5 * step / 2 / math.sqrt(200_000))


@settings(max_examples=80)
@given(
    st.integers(1, 28),
    st.floats(1e-6, 1e6),
    st.floats(0, 1),
    st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=9),
)
def test_no_value_leaves_its_bits(bits, clip, weight, values):
    terms = parameters(clients=10, values=len(values), bits=bits, clip=clip)
    scaled = np.array(values) * clip
    vector = encode(terms, scaled, {"weight": 0}, weight).vector[: len(values)]
    assert int(vector.max()) < 2**bits
    expected = np.clip(scaled, -clip, clip) * weight
    back = vector * (2 * clip / (2**bits - 1)) - clip
    assert np.abs(back - expected).max() <= 2 * clip / (2**bits - 1) * (1 + 1e-6)


def test_extreme_values_of_all_clients_do_not_overflow():
    terms = parameters(clients=16, values=2, bits=28)
    for value in (1.0, -1.0, 1e30, -1e30):
        vectors = [encode(terms, np.full(2, value), {"weight": 1}).vector for _ in range(16)]
        found = decode(terms, add(vectors), 16)
        np.testing.assert_allclose(found.values, math.copysign(16, value), rtol=1e-6)


@pytest.mark.parametrize("clip", [1e-30, 1e30])
def test_the_least_and_the_largest_clip(clip):
    terms = parameters(clients=3, values=3, bits=30, clip=clip)
    vectors = [encode(terms, np.array([-clip, 0, clip]), {"weight": 1}).vector for _ in range(3)]
    found = decode(terms, add(vectors), 3).values / clip
    np.testing.assert_allclose(found, [-3, 0, 3], atol=1e-6)


def test_rounding_can_be_repeated_and_otherwise_is_not():
    terms, update = parameters(), np.full(1000, 1e-7, np.float32)
    same = [encode(terms, update, {"weight": 1}, key=KEY).vector for _ in range(2)]
    np.testing.assert_array_equal(*same)
    other = encode(terms, update, {"weight": 1}).vector
    assert (other != same[0]).any()


def test_clipped_values_are_counted_and_another_clip_suggested():
    terms = parameters(values=2000, clip=0.5)
    update = np.zeros(2000)
    update[:10] = 0.9  # beyond 0.5, 0.5 %
    update[10:13] = -1.9  # beyond 0.5, 1
    update[13] = 0.5  # not beyond
    coded = encode(terms, update, {"weight": 1})
    assert coded.clipped == 13
    found = decode(terms, add([coded.vector] * 3), 3)
    assert found.clipped == pytest.approx(13 / 2000, abs=1e-9)
    assert found.suggestion == 2.0
    assert set(found.numbers) == {"weight"}
    np.testing.assert_allclose(found.values[[0, 10, 13]], [1.5, -1.5, 1.5], atol=1e-5)


def test_any_number_of_values_may_be_clipped():
    # Told as shares: counts of large models, summed over many clients, would pass 32 bits.
    terms = parameters(clients=100, values=1 << 16, bits=8)
    vector = encode(terms, np.full(1 << 16, 1e9, np.float32), {"weight": 1}).vector
    found = decode(terms, add([vector] * 100), 100)
    assert (found.clipped, found.suggestion) == (1.0, 256.0)


def test_suggestions():
    assert suggest(1.0, [0.001, 0.0]) is None
    assert suggest(1.0, [0.0011, 0.001]) == 2.0
    assert suggest(0.25, [0.5, 0.4, 0.3]) == 2.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    update = np.zeros(1000, np.float32)
    update[700] = bad
    with pytest.raises(BadUpdate, match="not finite: training diverged"):
        encode(parameters(), update, {"weight": 1})


def test_misuse_of_encode():
    terms = parameters()
    for values, numbers, weight, message in (
        (np.zeros(999), {"weight": 1}, 1.0, "1000 flat values expected"),
        (np.zeros((10, 100)), {"weight": 1}, 1.0, "1000 flat values expected"),
        (np.zeros(1000), {}, 1.0, "numbers"),
        (np.zeros(1000), {"weight": 1, "loss": 2}, 1.0, "numbers"),
        (np.zeros(1000), {"weight": 1}, 1.5, "weight=1.5"),
        (np.zeros(1000), {"weight": 1}, -0.5, "weight=-0.5"),
        (np.zeros(1000), {"weight": 1}, math.nan, "weight=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(terms, values, numbers, weight)


def test_a_sum_of_another_shape_or_of_nothing():
    terms = parameters()
    for total in (np.zeros(terms.dimension - 1, np.uint32), np.zeros(terms.dimension, np.int64)):
        with pytest.raises(WrongVector, match="uint32 expected"):
            decode(terms, total, 3)
    nothing = encode(terms, np.zeros(1000), {"weight": 0}).vector
    with pytest.raises(BadUpdate, match="the clients' weight sums up to 0"):
        decode(terms, nothing, 1, per="weight")


# Numbers


@settings(max_examples=150)
@given(st.sampled_from([3, 4, 5, 10, 100, 1000, 4096]), st.data())
def test_sums_of_numbers_are_exact(clients, data):
    limit = 2**31 // clients - 1
    whole = data.draw(st.lists(st.integers(-limit, limit), min_size=1, max_size=clients))
    coded = [fixed.encode("n", value, clients) for value in whole]
    assert all(len(each) == fixed.limbs(clients) for each in coded)
    sums = np.sum(np.array(coded, np.uint64), axis=0)
    assert int(sums.max()) < 2**32
    assert fixed.decode(sums.tolist(), clients) == sum(whole)


@given(st.floats(-1e6, 1e6))
def test_fractions_are_exact_to_the_last_bit(value):
    found = fixed.decode(fixed.encode("n", value, 10), 10)
    assert abs(found - value) <= 2.0**-33


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**31, -(2.0**31) / 10])
def test_numbers_that_could_overflow_are_refused(value):
    with pytest.raises(BadUpdate, match=r"loss=.* cannot be summed over 10 clients"):
        fixed.encode("loss", value, 10)


def test_numbers_beside_another_encoding():
    terms = Parameters.choose(5, 16, encoding="other", bits=32, numbers=("weight", "loss"))
    assert terms.dimension == 16 + 2 * fixed.limbs(5)
    vectors = [
        np.concatenate(
            [
                np.full(16, 2**32 - 1, np.uint32),
                encode_numbers(terms, {"weight": 3, "loss": -0.25}),
            ]
        )
        for _ in range(5)
    ]
    total = add(vectors)
    assert decode_numbers(terms, total) == {"weight": 15, "loss": -1.25}
    assert (total[:16] == 2**32 - 5).all()
