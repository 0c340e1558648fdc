"""Which models DP-SGD can train: examined layer by layer, then tried on a few examples."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedipfs.data.base import Labels
from fedipfs.errors import UnsupportedModel
from fedipfs.privacy import noise
from fedipfs.privacy.base import GHOST, HOOKS, Mechanism
from fedipfs.privacy.dpsgd import PrivateGradients, gaussian
from fedipfs.privacy.opacus_compat import GradSampleModule, ModuleValidator
from fedipfs.tasks import Task

log = logging.getLogger(__name__)

TRIED = 4  # examples that a model is tried on
_WITH_MANY = (nn.RNN, nn.RNNCellBase, nn.Bilinear)
_MANY = "Opacus knows layers with one input and one output"
_OPACUS = 1e-6  # what it adds to a norm
_FINE = (torch.float32, torch.float64)
_TOLERANCE = 1e-3  # relative; float32 differs by 1e-6, a wrong gradient by its own size


class WithPrivateLayers(Task):
    """`task` with layers that DP-SGD can train in the place of some that it cannot.

    GroupNorm for BatchNorm, whose statistics mix the examples of a batch; Opacus' own LSTM, GRU
    and attention for torch's, with the same names of tensors (and a second one for some).
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def model(self) -> nn.Module:
        return ModuleValidator.fix(self._task.model())

    def data(self, *, root: str | None, fallback: str) -> Any:
        return self._task.data(root=root, fallback=fallback)

    def inputs(self, array: NDArray[Any]) -> Tensor:
        return self._task.inputs(array)

    def targets(self, array: Labels) -> Tensor:
        return self._task.targets(array)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self._task.loss(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> Any:
        return self._task.metrics(output, target)


def fitting_mode(
    task: Task,
    model: nn.Module,
    inputs: NDArray[Any],
    targets: Labels,
    *,
    mode: str | None = None,
    telling: bool = True,
) -> str:
    """GHOST, or HOOKS where a layer needs it: how `model`'s gradients are clipped.

    Tried on some of the examples given: the clipped sum must be that of each example's own
    gradient. So a loss that is no mean over examples, a layer that mixes them or keeps something of
    them, or a gradient that Opacus has wrong is found before training. It is tried with weights of
    its own: those that came, all zero perhaps, could hide what is wrong with others. With `mode`
    only that one is tried.

    An error's text may hold a label: it is in the message only with `telling`, else in the log.

    Raises UnsupportedModel, which names the layers.
    """
    if problems := unsupported(model):
        fixable = any(type(each) in ModuleValidator.FIXERS for each in model.modules())
        remedy = "privacy.replace_layers=true puts others" if fixable else "choose others"
        raise UnsupportedModel(
            f"privacy=dp_sgd cannot train {'; '.join(problems)}; {remedy} in their place"
        )
    trained = [(name, each) for name, each in model.named_parameters() if _trained(each)]
    if coarse := [name for name, each in trained if each.dtype not in _FINE]:
        raise UnsupportedModel(
            f"privacy=dp_sgd cannot train {', '.join(coarse)}: where sums are rounded to less than "
            "float32, an example moves them by more than the noise is made for; take float32"
        )
    picked = np.unique(np.linspace(0, len(targets) - 1, TRIED).astype(int))  # not one class alone
    x, y = task.inputs(inputs[picked]), task.targets(targets[picked])
    reasons = []
    for candidate in (GHOST, HOOKS) if mode is None else (mode,):
        if (reason := _difference(task, model, x, y, candidate)) is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    told = "; ".join(reasons)
    if not telling:
        log.error("privacy=dp_sgd cannot train this model: %s", told)
        told = "the site's own log says why"
    raise UnsupportedModel(f"privacy=dp_sgd cannot train this model ({told})")


def unsupported(model: nn.Module) -> list[str]:
    """Name, kind and reason of each layer that Opacus says it cannot handle."""
    found = []
    model.train()
    for name, layer in model.named_modules():
        if not any(each.requires_grad for each in layer.parameters(recurse=False)):
            continue
        validator = ModuleValidator.VALIDATORS.get(type(layer), GradSampleModule.validate)
        problems = [_MANY] if isinstance(layer, _WITH_MANY) else validator(layer)
        if problems:
            why = " ".join(str(problems[0]).split()).partition(". ")[0]
            found.append(f"layer {name or '(the model itself)'} ({type(layer).__name__}: {why})")
    return found


def _difference(task: Task, model: nn.Module, x: Tensor, y: Tensor, mode: str) -> str | None:
    """Why the clipped sum of these examples is not what it must be; None if it is."""
    before = {name: each.clone() for name, each in model.named_buffers()}
    with _steady(model):
        try:
            own = [_gradient(task, model, x[i : i + 1], y[i : i + 1]) for i in range(len(y))]
        except Exception as problem:
            return f"one example alone does not pass ({_line(problem)})"
        named = [(name, each) for name, each in model.named_parameters() if _trained(each)]
        if idle := [name for name, each in named if each.grad is None]:
            return f"no part in the loss have {', '.join(idle)}: freeze them (requires_grad=False)"
        gradients = torch.stack(own)
        norms = torch.linalg.vector_norm(gradients, dim=1) + _OPACUS
        plain = torch.optim.SGD([each for _, each in named], lr=1.0)
        errors = []
        for clip in (float(norms.median()) / 2, float(norms.max()) * 2):  # most shortened; none
            wanted = gradients.T @ (clip / norms).clamp(max=1.0)
            step = Mechanism(0.0, clip, 1.0, 1.0)
            private = PrivateGradients(task, model, plain, x, y, step, noise.generator(), mode)
            try:
                with private:
                    private.fill(np.arange(len(y)))
                    error = torch.linalg.vector_norm(_flat(model) - wanted)
            except Exception as problem:
                return _line(problem)
            finally:
                model.zero_grad()
            errors.append(float(error) / (clip * len(y)))
        changed = [name for name, each in model.named_buffers() if not each.equal(before[name])]
    if changed:
        return f"it keeps what it has seen of the examples, without noise, in {', '.join(changed)}"
    if not all(error <= _TOLERANCE for error in errors):
        return (
            "the gradient of a batch is not the sum of its examples' gradients: a layer mixes "
            "examples, or the loss is no mean over them"
        )
    return None


def _gradient(task: Task, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    task.loss(model(x), y).backward()
    return _flat(model)


def _flat(model: nn.Module) -> Tensor:
    """All gradients as one vector in float64."""
    trained = [each for each in model.parameters() if _trained(each)]
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    return torch.cat([each.detach().flatten().double() for each in grads])


def _trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


@contextmanager
def _steady(model: nn.Module) -> Iterator[None]:
    """Training mode without dropout, which would draw anew for every pass; weights at random."""
    model.train()
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    values = [each.detach().clone() for each in tensors]
    source = noise.generator()
    for weight in model.parameters():
        if weight.is_floating_point():
            inputs = max(1, weight[0].numel()) if weight.dim() > 1 else 1
            weight.data.copy_(gaussian(source, weight, inputs**-0.5))
    drops = [each for each in model.modules() if isinstance(each, nn.modules.dropout._DropoutNd)]
    for each in drops:
        each.eval()
    try:
        yield
    finally:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data.copy_(value)
        for each in drops:
            each.train()


def _line(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
