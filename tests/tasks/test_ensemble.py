"""Votes worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedipfs import tasks
from fedipfs.errors import ConfigError
from fedipfs.tasks.ensemble import Ensemble
from fedipfs.tasks.small import Digits


class Says(nn.Module):
    """Answers the logarithms of these probabilities, plus a constant, for every input."""

    def __init__(self, *shares: float, constant: float = 0.0, dtype=torch.float32) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.tensor(shares, dtype=dtype).log() + constant)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.shares.expand(len(inputs), -1)


TWO = torch.zeros(2, 3)


def shares(ensemble: Ensemble) -> list[float]:
    ensemble.eval()
    with torch.no_grad():
        answer = ensemble(TWO)
    assert answer.shape == (2, len(ensemble.members[0].shares))
    assert torch.equal(answer[0], answer[1])
    return answer[0].exp().tolist()


def test_soft_voting_is_the_weighted_mean_of_probabilities():
    members = [Says(0.9, 0.1), Says(0.4, 0.6, constant=5.0)]
    assert shares(Ensemble(members, [1, 1])) == pytest.approx([0.65, 0.35])
    assert shares(Ensemble(members, [1, 3])) == pytest.approx([0.525, 0.475])
    assert shares(Ensemble(members, [30, 10])) == pytest.approx([0.775, 0.225])
    assert shares(Ensemble(members, [0, 2])) == pytest.approx([0.4, 0.6])


def test_hard_voting_counts_who_ranks_a_class_first():
    members = [Says(0.9, 0.05, 0.05), Says(0.3, 0.6, 0.1), Says(0.45, 0.55, 1e-9)]
    voted = shares(Ensemble(members, [1, 1, 1], "hard"))
    assert voted == pytest.approx([1 / 3, 2 / 3, 1e-6], rel=1e-4)
    assert shares(Ensemble(members, [6, 3, 1], "hard")) == pytest.approx([0.6, 0.4, 0], abs=2e-6)
    # soft, the first member's certainty tells
    assert shares(Ensemble(members, [1, 1, 1]))[0] == pytest.approx((0.9 + 0.3 + 0.45) / 3)


def test_of_equal_logits_the_first_class_gets_the_vote():
    assert shares(Ensemble([Says(0.5, 0.5)], [1], "hard")) == pytest.approx([1, 0], abs=2e-6)


def test_losses_stay_finite_where_everybody_is_wrong_and_sure():
    sure = Says(1.0, 1e-38)
    with torch.no_grad():
        sure.shares.copy_(torch.tensor([200.0, -200.0]))  # e^-400 is 0 in float32
    for voting in ("soft", "hard"):
        output = Ensemble([sure, sure], [1, 1], voting)(TWO)
        loss = nn.functional.cross_entropy(output, torch.tensor([1, 1]))
        assert math.isfinite(loss.item())
        assert loss.item() > 10


def test_a_task_evaluates_it_as_it_does_a_model():
    class Tiny(tasks.Task):
        def model(self):
            raise NotImplementedError

        def data(self, *, root, fallback):
            raise NotImplementedError

    ensemble = Ensemble([Says(0.9, 0.1), Says(0.4, 0.6)], [1, 1])
    found = tasks.evaluate(
        Tiny(), ensemble, np.zeros((4, 3), "f4"), np.array([0, 0, 1, 0]), batch_size=3
    )
    assert found["accuracy"] == pytest.approx(0.75)
    expected = -(3 * math.log(0.65) + math.log(0.35)) / 4
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(lambda w: sum(w) > 0),
    st.integers(0, 2**31),
    st.sampled_from(["soft", "hard"]),
)
def test_what_it_answers_are_log_probabilities(weights, seed, voting):
    generator = torch.Generator().manual_seed(seed)
    members = [Says(*(torch.rand(4, generator=generator) + 1e-3).tolist()) for _ in weights]
    assert math.fsum(shares(Ensemble(members, weights, voting))) == pytest.approx(1, rel=1e-5)


def test_an_ensemble_of_one_is_its_member():
    torch.manual_seed(0)
    model = Digits().model()
    inputs = torch.randn(5, 8, 8)
    expected = model(inputs).log_softmax(dim=1)
    torch.testing.assert_close(Ensemble([model], [3.0])(inputs), expected)


def test_members_of_different_width_and_precision_vote_together():
    members = [Digits(4).model(), Digits(32).model(), Says(*[0.1] * 10, dtype=torch.float64)]
    answer = Ensemble(members, [1, 1, 1])(torch.zeros(3, 8, 8))
    assert answer.shape == (3, 10)
    assert answer.exp().sum(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_its_state_is_that_of_its_members_and_their_weights():
    ensemble = Ensemble([Digits(4).model(), Digits(8).model()], [3, 1])
    names = set(ensemble.state_dict())
    inner = list(Digits().model().state_dict())
    assert names == {"weights"} | {f"members.{i}.{name}" for i in (0, 1) for name in inner}
    assert ensemble.weights.tolist() == [0.75, 0.25]
    other = Ensemble([Digits(4).model(), Digits(8).model()], [1, 1])
    other.load_state_dict(ensemble.state_dict())
    torch.testing.assert_close(other(torch.ones(2, 8, 8)), ensemble(torch.ones(2, 8, 8)))


@pytest.mark.parametrize(
    ("count", "weights", "voting", "says"),
    [
        (0, [], "soft", "0 members"),
        (2, [1.0], "soft", "2 members has 1 weights"),
        (2, [1.0, -1.0], "soft", "at least 0"),
        (2, [0.0, 0.0], "soft", "not all 0"),
        (1, [math.nan], "soft", "at least 0"),
        (1, [math.inf], "soft", "at least 0"),
        (1, [1.0], "loud", "voting=loud is unknown; choose soft or hard"),
    ],
)
def test_what_cannot_vote_is_refused(count, weights, voting, says):
    with pytest.raises(ConfigError, match=says):
        Ensemble([Says(0.5, 0.5) for _ in range(count)], weights, voting)


def test_members_that_do_not_answer_classes_are_refused():
    class Number(nn.Module):
        def forward(self, inputs):
            return inputs.sum(dim=1)

    with pytest.raises(ConfigError, match="members vote on classes"):
        Ensemble([Number()], [1])(TWO)
