"""The auditor against published figures, and training that is right, or wrong in a known way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.clients import trainer
from fedipfs.privacy import noise
from fedipfs.privacy.accounting import epsilon
from fedipfs.privacy.audit import audit, judge, least_epsilon, p_value
from fedipfs.privacy.base import GHOST, HOOKS, Mechanism
from fedipfs.privacy.dpsgd import PrivateGradients

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

DELTA = 1e-6
SIGMA = 2.0
CLAIM = epsilon([(SIGMA, 1.0, 1)], DELTA)  # 2.25
STEPS, RATE = 20, 0.1
CLAIM_OF_MANY = epsilon([(SIGMA, RATE, STEPS)], DELTA)  # 1.26


def engine(mechanism: Mechanism, mode: str = GHOST, steps: int = 1):
    """Training that is as good as its mechanism."""

    def train(task, model, inputs, targets):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        data = task.inputs(inputs), task.targets(targets)
        source = noise.generator()
        with PrivateGradients(task, model, optimizer, *data, mechanism, source, mode) as gradients:
            for _ in range(steps):
                gradients.fill()
                optimizer.step()

    return train


# ---- the statistic


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
    ids=["appendix D", "section 7"],
)
def test_the_bound_is_the_papers(canaries, guesses, right, delta, published):
    assert least_epsilon(right, guesses, canaries, delta, 0.95) == pytest.approx(
        published, abs=1e-3
    )


def test_without_delta_it_is_the_tail_of_randomized_response():
    tail = sum(math.comb(20, k) * 0.75**k * 0.25 ** (20 - k) for k in range(18, 21))
    assert p_value(math.log(3), 18, 20, 500, 0.0) == pytest.approx(tail)


@settings(max_examples=50)
@given(
    right=st.integers(0, 60),
    wrong=st.integers(0, 60),
    unguessed=st.integers(0, 100),
    delta=st.sampled_from([0.0, 1e-9, 1e-5, 1e-2]),
    levels=st.tuples(st.floats(0.5, 0.999), st.floats(0.5, 0.999)),
)
def test_more_right_guesses_refute_more_and_more_confidence_refutes_less(
    right, wrong, unguessed, delta, levels
):
    guesses, less, more = right + wrong, *sorted(levels)
    canaries = guesses + unguessed
    bound = least_epsilon(right, guesses, canaries, delta, less)
    assert 0 <= least_epsilon(right, guesses, canaries, delta, more) <= bound
    assert least_epsilon(right, guesses + 1, canaries + 1, delta, less) <= bound + 1e-6
    if bound > 1e-6:
        assert p_value(bound, right, guesses, canaries, delta) <= 1 - less + 1e-6
    assert p_value(bound + 1e-3, right, guesses, canaries, delta) >= 1 - less - 1e-9


def test_the_bound_is_above_the_truth_as_seldom_as_it_says():
    """Randomized response is what tells most of all that is so private."""
    truth, rng, runs = 1.0, np.random.default_rng(5), 1000
    told, times = np.unique(rng.binomial(100, 1 / (1 + math.exp(-truth)), runs), return_counts=True)
    above = [least_epsilon(int(right), 100, 100, 0.0, 0.9) > truth for right in told]
    assert 0.02 * runs < times[above].sum() < 0.1 * runs


def test_scores_that_tell_nothing_refute_nothing_and_those_that_tell_all_refute_much():
    rng = np.random.default_rng(3)
    present = rng.permutation(1000) < 500
    assert judge(rng.normal(size=1000), present, DELTA).epsilon < 0.5
    told = judge(present + 0.05 * rng.normal(size=1000), present, DELTA)
    assert told.epsilon > 5
    assert told.right == told.guesses == 1000
    turned = judge(-present.astype(float), present, DELTA)
    assert (turned.epsilon, turned.right) == (0, 0)


# ---- training


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
def test_training_that_is_right_is_not_refuted(mode):
    found = audit(engine(Mechanism(SIGMA, 1.0, 1.0, 1.0), mode), delta=DELTA)
    assert 0 < found.epsilon < CLAIM
    assert not found.contradicts(CLAIM)


FAULTS = {
    "clipping lets five times as much through": Mechanism(SIGMA / 5, 5.0, 1.0, 1.0),
    "noise for a fifth of what clipping lets through": Mechanism(SIGMA / 5, 1.0, 1.0, 1.0),
    "no clipping": Mechanism(SIGMA / 1e9, 1e9, 1.0, 1.0),
    "no noise": Mechanism(0.0, 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("mode", [GHOST, HOOKS])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_gross_fault_is_found(fault, mode):
    found = audit(engine(FAULTS[fault], mode), delta=DELTA)
    assert found.contradicts(CLAIM), found


@pytest.mark.parametrize(
    ("rate", "refuted"), [(RATE, False), (1.0, True)], ids=["as claimed", "everybody every time"]
)
def test_batches_that_are_not_drawn_are_found(rate, refuted):
    found = audit(engine(Mechanism(SIGMA, 1.0, rate, 1.0), steps=STEPS), delta=DELTA)
    assert found.contradicts(CLAIM_OF_MANY) == refuted, found


@pytest.mark.parametrize(
    ("mechanism", "refuted"),
    [
        (Mechanism(SIGMA, 1.0, RATE, 100.0), False),
        (Mechanism(SIGMA / 20, 1.0, RATE, 100.0), True),
    ],
    ids=["right", "noise a twentieth"],
)
def test_a_partner_can_audit_its_clients_whole_training(mechanism, refuted):
    config = {"batch_size": 100, "epochs": 1, "optimizer": {"name": "SGD", "lr": 0.1}}

    def train(task, model, inputs, targets):
        private = trainer.Private(mechanism, STEPS, 1000, noise.generator(), GHOST, 512)
        trainer.train(
            task, model, inputs, targets, config=config, seed=1, server_round=1, private=private
        )

    assert audit(train, delta=DELTA).contradicts(CLAIM_OF_MANY) == refuted
