"""Tensors of a model by name: what is trained, what a pattern matches, what normalises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedipfs.tasks.names import batch_norms, matching, trained


class Block(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn1 = nn.BatchNorm2d(2) if norm else nn.GroupNorm(1, 2)


def deep(blocks: int, *, all_norm: bool = True) -> nn.Module:
    model = nn.Module()
    model.stem = nn.Conv2d(1, 2, 1)
    model.layers = nn.ModuleList(Block(all_norm or i % 2 == 0) for i in range(blocks))
    model.head = nn.Linear(2, 2)
    return model


def test_trained_are_parameters_that_are_not_frozen_under_all_their_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    assert set(trained(model)) == {"0.weight", "0.bias", "1.weight", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["3.*"], ["3.weight", "3.bias"]),
        (["*.bias"], ["1.bias", "3.bias"]),
        (["3.bias", "1.*"], ["1.weight", "1.bias", "3.bias"]),
        (["3"], []),
        ([], []),
    ],
)
def test_patterns_are_the_shells(patterns, expected):
    assert matching(["1.weight", "1.bias", "3.weight", "3.bias"], patterns) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)), ["1.*"]),
        (deep(300), ["layers.*.bn1.*"]),
        (deep(4, all_norm=False), ["layers.0.bn1.*", "layers.2.bn1.*"]),
        (nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Linear(2, 2)), ["0.*", "1.*"]),
        (nn.BatchNorm1d(2), ["*"]),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), []),
    ],
)
def test_batch_norms_are_found_by_type_and_no_others(model, expected):
    patterns = batch_norms(model)
    assert patterns == expected
    found = set(matching(model.state_dict(), patterns))
    types = (nn.BatchNorm1d, nn.BatchNorm2d)
    assert found == {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, types)
        for name in module.state_dict()
    }


@pytest.mark.parametrize(
    ("target", "layers"),
    [("fedipfs.tasks.vision:Mnist", ["1.*", "4.*"]), ("fedipfs.tasks.small:Digits", ["2.*"])],
)
def test_the_tasks_have_norms_by_option_and_are_the_same_without(target, layers):
    from fedipfs import tasks

    plain, normed = tasks.load(target), tasks.load(target, {"norm": True})
    assert batch_norms(plain.model()) == []
    assert batch_norms(normed.model()) == layers
    torch.manual_seed(1)
    one = plain.model().state_dict()
    torch.manual_seed(1)
    other = normed.model().state_dict()
    rest = [each for name, each in other.items() if not matching([name], layers)]
    for expected, got in zip(one.values(), rest, strict=True):
        assert torch.equal(expected, got)
