"""What a site tells of a model: how far an example moves it, and how much noise hides that."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedipfs.privacy import noise
from fedipfs.privacy.metrics import noisy_means

KEY = bytes(range(16))
BOUNDS = {"loss": 5.0, "tiny": 1e-3}
EVERY = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))


def told(values, *, examples=10.0, noise_multiplier=0.0, source=None):
    return noisy_means(
        {name: np.array(each, np.float64) for name, each in values.items()},
        bounds=BOUNDS,
        examples=examples,
        noise_multiplier=noise_multiplier,
        source=source or noise.generator(),
    )


def test_without_noise_it_is_the_mean_of_the_bounded_values():
    got = told({"loss": [1.0, 9.0, 3.0, -2.0], "accuracy": [1, 0, 1, 1]}, examples=4)
    assert got == pytest.approx({"loss": (1 + 5 + 3 + 0) / 4, "accuracy": 0.75})


def test_the_number_that_divides_is_the_one_that_everybody_knows():
    values = {"accuracy": [1.0] * 6}
    assert told(values, examples=12) == pytest.approx({"accuracy": 0.5})
    assert told(values, examples=3) == {"accuracy": 1.0}  # in its range


@given(
    names=st.sampled_from([("loss",), ("loss", "accuracy"), ("loss", "accuracy", "tiny", "other")]),
    data=st.data(),
)
def test_an_example_moves_all_sums_together_by_one_at_most(names, data):
    """In the scale in which the noise has its multiplier as deviation."""
    count = data.draw(st.integers(0, 5))
    values = {
        name: data.draw(st.lists(EVERY, min_size=count + 1, max_size=count + 1)) for name in names
    }
    at = data.draw(st.integers(0, count))
    less = {name: each[:at] + each[at + 1 :] for name, each in values.items()}
    many = 1e3  # so many that no mean leaves its range
    moved = 0.0
    before, after = told(less, examples=many), told(values, examples=many)
    for name in names:
        deviation = BOUNDS.get(name, 1.0) * math.sqrt(len(names)) / many  # of noise 1
        moved += ((after[name] - before[name]) / deviation) ** 2
    assert math.sqrt(moved) <= 1 + 1e-9


def test_an_example_can_move_them_by_one_so_that_no_noise_is_wasted():
    before, after = (told({"loss": [9.0] * n, "other": [1.0] * n}, examples=100) for n in (3, 4))
    moved = [
        (after[name] - before[name]) * 100 / (bound * math.sqrt(2))
        for name, bound in (("loss", 5.0), ("other", 1.0))
    ]
    assert np.hypot(*moved) == pytest.approx(1.0)


def test_the_noise_is_as_large_as_is_paid_for_and_each_metrics_own():
    source, multiplier, many = noise.generator(KEY), 3.0, 1000.0
    drawn = [
        told(
            {"loss": [2.5] * 1000, "accuracy": [0.5] * 1000},
            examples=many,
            noise_multiplier=multiplier,
            source=source,
        )
        for _ in range(4000)
    ]
    each = np.array([[one["loss"], one["accuracy"]] for one in drawn])
    deviation = multiplier * math.sqrt(2) * np.array([5.0, 1.0]) / many
    scaled = (each - [2.5, 0.5]) / deviation
    assert stats.kstest(scaled.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(scaled.T)[0, 1]) < 5 / math.sqrt(4000)
    assert abs(np.corrcoef(scaled[:-1, 0], scaled[1:, 0])[0, 1]) < 5 / math.sqrt(4000)


def test_who_has_nothing_tells_noise_under_the_same_names():
    nobody = told({"loss": [], "accuracy": []}, noise_multiplier=2.0, source=noise.generator(KEY))
    somebody = told({"loss": [0.0], "accuracy": [0.0]}, noise_multiplier=2.0)
    assert nobody.keys() == somebody.keys()
    assert nobody == told(
        {"loss": [0.0] * 7, "accuracy": [0.0] * 7},
        noise_multiplier=2.0,
        source=noise.generator(KEY),
    )


@given(
    values=st.lists(EVERY, max_size=6),
    multiplier=st.sampled_from([0.01, 20.0, 1e6]),
    examples=st.sampled_from([1.0, 1e6]),
)
def test_means_are_finite_and_within_their_range(values, multiplier, examples):
    got = told({"loss": values, "accuracy": values}, noise_multiplier=multiplier, examples=examples)
    assert 0 <= got["loss"] <= 5 and 0 <= got["accuracy"] <= 1
    assert {type(each) for each in got.values()} == {float}


def test_what_is_not_a_number_counts_as_the_worst_of_losses():
    assert told({"loss": [math.nan, math.inf, 1.0]}, examples=3) == {"loss": pytest.approx(11 / 3)}
