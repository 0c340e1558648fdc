"""SCAFFOLD's client: which of its control variates counts, and what it answers."""

from __future__ import annotations

import pytest
import torch
from flwr.app import RecordDict

from fedipfs.clients.control import Control
from fedipfs.exchange import from_torch, to_torch


def message(state: RecordDict, *, taken: int, common: float = 0.0) -> Control:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    control = Control(model, from_torch({"weight": torch.tensor([[common]])}), state, taken=taken)
    control.model = model
    return control


def train(control: Control, number: int, end: float) -> float:
    """The client's answer if its weight goes from 1 to `end` in 5 steps of rate 0.1."""
    torch.nn.init.constant_(control.model.weight, end)
    answer = control.answer(steps=5, learning_rate=0.1, server_round=number)
    return to_torch(answer)["weight"].item()


def test_option_two_by_hand():
    state = RecordDict()
    first = message(state, taken=0, common=0.25)
    assert first.correction["weight"].item() == 0.25  # c_i is 0
    assert train(first, 1, 0.5) == pytest.approx(1.0)  # (1 - 0.5) / (5 * 0.1)
    # c_i+ = c_i - c + (x - y) / (K eta) = 0 - 0.25 + 1
    second = message(state, taken=1, common=0.5)
    assert second.correction["weight"].item() == pytest.approx(0.5 - 0.75)
    assert train(second, 2, 0.0) == pytest.approx(2.0)
    third = message(state, taken=2)
    assert third.correction["weight"].item() == pytest.approx(-(0.75 - 0.5 + 2.0))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_answer_that_was_not_taken_up_is_forgotten(taken):
    state = RecordDict()
    train(message(state, taken=0), 1, 0.5)
    train(message(state, taken=1), 2, 0.0)
    again = message(state, taken=taken)
    assert again.correction["weight"].item() == pytest.approx(-1.0)  # of round 1, not 2
    assert "control-new" not in state


def test_frozen_parameters_and_buffers_have_no_control_variate():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    zeros = {name: torch.zeros_like(each) for name, each in model.state_dict().items()}
    control = Control(model, from_torch(zeros), RecordDict(), taken=0)
    assert set(control.correction) == {"0.weight", "1.weight", "1.bias"}
