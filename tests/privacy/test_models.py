"""Models that DP-SGD can train, and each that it cannot named before anything is trained."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from zoo import (
    CLASSES,
    MODELS,
    NEED_HOOKS,
    TOKENS,
    Attentive,
    Flat,
    Noting,
    Recurrent,
    Small,
    conv,
    examples,
    mlp,
)

from fedipfs import tasks
from fedipfs.errors import ConfigError, UnsupportedModel
from fedipfs.privacy.base import GHOST, HOOKS
from fedipfs.privacy.models import WithPrivateLayers, fitting_mode, unsupported
from fedipfs.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def fit(task: Task, *, model=None, name="perceptron", count=8, mode=None):
    x, y = examples(name, count)
    return fitting_mode(task, task.model() if model is None else model, x, y, mode=mode)


def refusal(task: Task, **options) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        fit(task, **options)
    assert isinstance(caught.value, ConfigError)
    text = str(caught.value)
    assert text.startswith("privacy=dp_sgd cannot train ") and "\n" not in text
    return text


@pytest.mark.parametrize("name", MODELS)
def test_what_can_be_trained_is_clipped_the_quick_way_where_that_is_right(name):
    task = Small(MODELS[name])
    assert fit(task, name=name) == (HOOKS if name in NEED_HOOKS else GHOST)
    assert fit(task, name=name, mode=HOOKS) == HOOKS


@pytest.mark.parametrize("name", NEED_HOOKS)
def test_a_mode_that_does_not_fit_is_not_taken_because_it_was_asked_for(name):
    text = refusal(Small(MODELS[name]), name=name, mode=GHOST)
    assert "ghost:" in text and "hooks:" not in text


@pytest.mark.parametrize(
    "target",
    [
        "small:Digits",
        "small:BreastCancer",
        "vision:Mnist",
        "vision:MnistMcMahan",
        "vision:MnistLogistic",
    ],
)
def test_every_bundled_task_is_clipped_the_quick_way(target):
    task = tasks.load(f"fedipfs.tasks.{target}")
    rng = np.random.default_rng(0)
    x = {
        "Digits": rng.integers(0, 17, (6, 64)),
        "BreastCancer": rng.normal(size=(6, 30)),
    }.get(target.partition(":")[2], rng.integers(0, 256, (6, 28, 28)).astype(np.uint8))
    assert fitting_mode(task, task.model(), x, np.arange(6) % 2) == GHOST


def test_no_bundled_task_is_forgotten():
    from fedipfs.tasks import small, vision

    found = {
        f"{module.__name__.rpartition('.')[2]}:{name}"
        for module in (small, vision)
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, Task) and each.__module__ == module.__name__
    }
    (mark,) = test_every_bundled_task_is_clipped_the_quick_way.pytestmark[-1:]
    assert found - {"vision:OnMnist"} == set(mark.args[1])


# ---- layers that are named


def layered(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), middle, nn.Linear(6, CLASSES))


NAMED = {
    "1 (BatchNorm1d": lambda: layered(nn.BatchNorm1d(6)),
    "2 (BatchNorm2d": lambda: conv(nn.BatchNorm2d(4)),
    "recurrent (LSTM": lambda: Recurrent(nn.LSTM),
    "recurrent (GRU": lambda: Recurrent(nn.GRU),
    "recurrent (RNN": lambda: Recurrent(nn.RNN),
    "attention (MultiheadAttention": Attentive,
    "2 (InstanceNorm2d": lambda: conv(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
}


@pytest.mark.parametrize("layer", NAMED)
def test_a_layer_that_cannot_be_trained_is_named_with_its_kind_and_a_remedy(layer):
    task = Small(NAMED[layer])
    text = refusal(task)
    assert f"cannot train layer {layer}: " in text
    fixable = "RNN" not in layer
    assert ("privacy.replace_layers=true puts others in their place" in text) == fixable
    assert [each.partition(": ")[0] for each in unsupported(task.model())] == [f"layer {layer}"]


def test_all_such_layers_are_named_at_once():
    task = Small(
        lambda: nn.Sequential(layered(nn.BatchNorm1d(6)), nn.BatchNorm1d(CLASSES), nn.Tanh())
    )
    text = refusal(task)
    assert "layer 0.1 (BatchNorm1d" in text and "layer 1 (BatchNorm1d" in text


REPLACED = [layer for layer in NAMED if "RNN" not in layer and "InstanceNorm" not in layer]


@pytest.mark.parametrize("layer", REPLACED)
def test_with_other_layers_in_their_place_it_can_be_trained(layer):
    plain = Small(NAMED[layer])
    task = WithPrivateLayers(plain)
    assert fit(task) == GHOST
    kinds = {type(each).__name__ for each in task.model().modules()}
    assert kinds & {"GroupNorm", "DPLSTM", "DPGRU", "DPMultiheadAttention"}
    x, y = examples("perceptron", 5)
    output = task.model()(task.inputs(x))
    assert output.shape == (5, CLASSES)
    target = task.targets(y)
    assert torch.equal(task.loss(output, target), plain.loss(output, target))
    assert task.metrics(output, target) == plain.metrics(output, target)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_keep_the_names_of_their_tensors(kind):
    plain = Small(lambda: Recurrent(kind))
    mine, theirs = WithPrivateLayers(plain).model().state_dict(), plain.model().state_dict()
    assert {name: mine[name].shape for name in theirs} == {
        name: each.shape for name, each in theirs.items()
    }


# ---- what only shows when it is tried


class Centred(nn.Module):
    """Takes the mean of the batch off."""

    def forward(self, x):
        return x - x.mean(0)


class Between(nn.Module):
    """Attention from every example to every other."""

    def forward(self, x):
        return torch.softmax(x @ x.T, dim=1) @ x


MIXING = {
    "the mean of the batch taken off": lambda: layered(Centred()),
    "attention between examples": lambda: layered(Between()),
    "batch norm without parameters": lambda: layered(nn.BatchNorm1d(6, affine=False)),
    "batch norm of images without parameters": lambda: conv(nn.BatchNorm2d(4, affine=False)),
    "frozen batch norm": lambda: layered(nn.BatchNorm1d(6).requires_grad_(False)),
}


@pytest.mark.parametrize("kind", MIXING)
def test_layers_that_mix_examples_are_refused(kind):
    text = refusal(Small(MIXING[kind]))
    reasons = ("a layer mixes examples", "one example alone does not pass", "it keeps what it has")
    assert any(each in text for each in reasons)


KEEPING = {
    "running statistics": lambda: conv(nn.InstanceNorm2d(4, track_running_stats=True)),
    "a mean of what was seen": lambda: layered(Noting(lambda seen, x: seen.lerp_(x.mean(0), 0.1))),
    "the last example": lambda: layered(Noting(lambda seen, x: seen.copy_(x[-1]))),
}


@pytest.mark.parametrize("kind", KEEPING)
def test_layers_that_keep_something_of_the_examples_are_refused_and_keep_nothing(kind):
    """A buffer is sent with the weights, and no noise is added to it."""
    task = Small(KEEPING[kind])
    model = task.model()
    before = copy.deepcopy(model.state_dict())
    text = refusal(task, model=model)
    buffer = next(name for name, _ in model.named_buffers())
    assert f"without noise, in {buffer}" in text
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name])


def test_a_buffer_that_stays_is_no_hindrance():
    task = Small(lambda: layered(Noting(lambda seen, x: None)))
    assert fit(task) == GHOST


WEIGHTS = torch.tensor([1.0, 5.0, 25.0])
NO_MEANS = {
    "sum": lambda output, target: functional.cross_entropy(output, target, reduction="sum"),
    "weighted by class": lambda output, target: functional.cross_entropy(output, target, WEIGHTS),
    "worst": lambda output, target: functional.cross_entropy(
        output, target, reduction="none"
    ).max(),
    "contrast": lambda output, target: functional.cross_entropy(
        output @ output.T, torch.arange(len(output))
    ),
    "with a penalty on the mean": lambda output, target: (
        functional.cross_entropy(output, target) + output.mean(0).pow(2).sum()
    ),
}


@pytest.mark.parametrize("kind", NO_MEANS)
def test_losses_that_are_no_means_over_examples_are_refused(kind):
    assert "no mean over them" in refusal(Small(mlp, NO_MEANS[kind]))


def test_examples_that_are_sorted_by_class_hide_no_such_loss():
    task = Small(mlp, NO_MEANS["weighted by class"])
    x, y = examples("perceptron", 30)
    order = np.argsort(y, kind="stable")
    assert len(set(y[order][:5])) == 1
    with pytest.raises(UnsupportedModel, match="no mean over them"):
        fitting_mode(task, task.model(), x[order], y[order])


def test_other_means_are_losses_as_well():
    def squares(output, target):
        return functional.mse_loss(output, functional.one_hot(target, CLASSES).float())

    assert fit(Small(mlp, squares)) == GHOST
    smooth = Small(mlp, lambda o, t: functional.cross_entropy(o, t, label_smoothing=0.1))
    assert fit(smooth) == GHOST


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, CLASSES), nn.Linear(6, 2)

    def forward(self, x):
        return self.used(x)


def test_parameters_without_a_part_in_the_loss_are_named_unless_they_are_frozen():
    text = refusal(Small(Idle))
    assert "idle.weight, idle.bias: freeze them" in text and "used" not in text

    def frozen():
        model = Idle()
        model.idle.requires_grad_(False)
        return model

    assert fit(Small(frozen)) == GHOST


class Functional(nn.Module):
    """Weights that are used a second time where no layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.mix = nn.Embedding(TOKENS, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        return functional.linear(self.mix(self.read(tokens).mean(1)), self.read.weight)


@pytest.mark.parametrize("weights", ["as made", "zero", "not finite"])
def test_no_weights_hide_what_is_wrong_with_others(weights):
    """The coordinator sends them: all zero, all gradients are, and any are what they should be."""
    task = Small(Functional)
    model = task.model()
    with torch.no_grad():
        for each in model.parameters():
            if weights != "as made":
                each.fill_(0.0 if weights == "zero" else np.nan)
    refusal(task, model=model, name="tokens")


@pytest.mark.parametrize("name", ["perceptron", "tied weights", "LSTM of Opacus", "group norm"])
@pytest.mark.parametrize("weights", [0.0, np.nan, 1e30])
def test_no_weights_make_a_model_unfit_and_they_stay_as_they_are(name, weights):
    task = Small(MODELS[name])
    model = task.model()
    with torch.no_grad():
        for each in model.parameters():
            each.fill_(weights)
    fit(task, model=model, name=name)
    for each in model.parameters():
        assert each.grad is None
        assert torch.equal(each.nan_to_num(7.0), torch.full_like(each, weights).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_for_what_is_trained(dtype):
    text = refusal(Small(mlp, dtype=dtype))
    assert "0.weight, 0.bias, 2.weight, 2.bias: where sums are rounded" in text
    assert "take float32" in text


def test_double_precision_is_fine():
    assert fit(Small(mlp, dtype=torch.float64)) == GHOST


def test_dropout_is_fine_and_stays_as_it_was():
    def make():
        return nn.Sequential(
            nn.Linear(6, 8), nn.Dropout(0.5), Flat(2, 4), nn.Dropout1d(0.5), nn.Flatten(),
            nn.Linear(8, CLASSES),
        )  # fmt: skip

    task = Small(make)
    model = task.model()
    assert fit(task, model=model) == GHOST
    assert all(each.training for each in model.modules())


def test_a_model_is_tried_alike_whatever_torch_was_seeded_with_and_torch_goes_on_as_before():
    state = torch.get_rng_state()
    assert fit(Small(mlp)) == GHOST
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 100])
def test_few_examples_are_enough(count):
    assert fit(Small(mlp), count=count) == GHOST
    assert fit(Small(MODELS["tied weights"]), name="tied weights", count=count) == HOOKS
    refusal(Small(Functional), name="tokens", count=count)


def test_inputs_are_the_tasks():
    """Targets and inputs pass through the task, as in training."""

    class Shifted(Small):
        def inputs(self, array):
            return super().inputs(array)[:, :6]

        def targets(self, array):
            return torch.tensor(array - 10)

    task = Shifted(mlp)
    x, y = examples("perceptron", 8)
    wide = np.hstack([x, x])
    assert fitting_mode(task, task.model(), wide, y + 10) == GHOST
