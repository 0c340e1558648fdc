"""Local training: the plain torch loop that every client runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedipfs.data.base import Labels
from fedipfs.errors import ConfigError, DataError
from fedipfs.privacy.base import Mechanism
from fedipfs.tasks import Task, evaluate, optim
from fedipfs.tasks.evaluation import find_device

if TYPE_CHECKING:
    from fedipfs.privacy.dpsgd import PrivateGradients

__all__ = [
    "Losses",
    "Plan",
    "Private",
    "descend",
    "evaluate",
    "gradient",
    "make_optimizer",
    "plan",
    "seed_everything",
    "shuffled",
    "train",
]


class Private(NamedTuple):
    """How a client trains with DP-SGD: `steps` steps of `mechanism`, whatever its number of
    examples; it is known to have `examples`. See privacy/dpsgd.py for the rest."""

    mechanism: Mechanism
    steps: int
    examples: int
    source: np.random.Generator
    mode: str
    physical_batch: int


def train(
    task: Task,
    model: torch.nn.Module,
    inputs: NDArray[Any],
    targets: Labels,
    *,
    config: Mapping[str, Any],
    seed: int,
    server_round: int,
    proximal_mu: float = 0.0,
    correction: Mapping[str, Tensor] | None = None,
    private: Private | None = None,
) -> dict[str, float]:
    """Train `model` in place on one client's examples.

    `inputs` (N, ...) and `targets` (N,) are as the task's data set has them; `config` is the
    `train` section of the configuration. `config["steps"]`, if given, is the number of batches,
    else `config["epochs"]` passes are made over the examples, shuffled anew each time. Shuffling
    and dropout follow from `seed`: the same arguments give the same weights.

    With `proximal_mu` the objective gains mu/2 * ||w - w0||^2, w0 being the weights that the
    model comes with (FedProx: Li et al. 2020, equation 2); the loss reported does not include it.
    `correction` has a tensor for every trained parameter, by name, and is added to its gradient
    after clipping (SCAFFOLD: Karimireddy et al. 2020, Algorithm 1, line 10).

    Returns `train_loss`, the mean over the examples in the order seen, each measured before the
    step on its batch; `num-examples`, N; and `steps`. With `private` there is no loss, and the
    number is the one that everybody knows. Raises ConfigError and DataError.
    """
    # Under privacy no examples are as good as some: nobody is to know.
    asked = plan(config, targets) if private is None else None
    clip_norm = _clip_norm(config)
    place = find_device(config.get("device", "cpu"))

    seed_everything(seed, place)
    model.train()
    if place.type != "cpu":
        model.to(place)
    optimizer = make_optimizer(model.parameters(), config, server_round=server_round)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    terms = _in_order(model, correction, place) if correction is not None else []
    x, y = task.inputs(inputs).to(place), task.targets(targets).to(place)

    metrics: dict[str, float]
    losses = Losses()
    filling: AbstractContextManager[Gradients]
    if asked is None:
        assert private is not None
        filling = _noisy(task, model, optimizer, x, y, private)
        metrics = {"num-examples": private.examples, "steps": private.steps}
    else:
        batches = shuffled(asked.examples, asked.batch_size, seed, place)
        filling = nullcontext(_Batches(task, model, x, y, batches, losses))
        metrics = {"num-examples": asked.examples, "steps": asked.steps}
    with filling as gradients:
        descend(
            trained,
            optimizer,
            gradients,
            int(metrics["steps"]),
            clip_norm=clip_norm,
            proximal_mu=proximal_mu,
            terms=terms,
        )
    optimizer.zero_grad()
    if place.type != "cpu":
        model.cpu()
    if private is None:
        metrics["train_loss"] = losses.mean
    return metrics


class Plan(NamedTuple):
    """How much training the configuration asks of a client with so many examples."""

    examples: int
    steps: int
    batch_size: int
    clip_norm: float | None


def plan(config: Mapping[str, Any], targets: Labels) -> Plan:
    """What `config`, the `train` section, asks of these examples. ConfigError and DataError."""
    count = _count(targets)
    return Plan(count, _steps(config, count), _positive(config, "batch_size"), _clip_norm(config))


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: Mapping[str, Any], *, server_round: int
) -> torch.optim.Optimizer:
    """That of the `train` section, at the rate of this round. Raises ConfigError."""
    optimizer = optim.optimizer(parameters, config["optimizer"])
    optim.apply_schedule(optimizer, config.get("schedule"), server_round=server_round)
    return optimizer


class Gradients(Protocol):
    """What a step needs."""

    def fill(self) -> None:
        """Set the gradients of the next batch."""
        ...


def descend(
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    gradients: Gradients,
    steps: int,
    *,
    clip_norm: float | None,
    proximal_mu: float,
    terms: Sequence[Tensor],
    clip: Callable[[Sequence[Tensor], float], object] = torch.nn.utils.clip_grad_norm_,
) -> None:
    """Make `steps` steps; see `train`. `terms`: the correction of each of `trained`, or nothing."""
    start = [parameter.detach().clone() for parameter in trained] if proximal_mu else []
    for _ in range(steps):
        gradients.fill()
        for parameter, origin in zip(trained, start, strict=False):
            if parameter.grad is not None:  # the proximal term's gradient
                parameter.grad.add_(parameter.detach() - origin, alpha=proximal_mu)
        if clip_norm is not None:
            clip(trained, clip_norm)
        for parameter, term in zip(trained, terms, strict=False):
            parameter.grad = term.clone() if parameter.grad is None else parameter.grad.add_(term)
        optimizer.step()


def shuffled(
    count: int, batch_size: int, seed: int, place: torch.device | None = None
) -> Iterator[Tensor]:
    """Indices of one batch after another, in passes over the examples that are shuffled anew."""
    shuffle = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=shuffle).to(place).split(batch_size)


@dataclass
class Losses:
    """The losses of the batches seen; each is the mean over `size` examples."""

    _losses: list[Tensor] = field(default_factory=list)  # numbers would wait for the device
    _sizes: list[int] = field(default_factory=list)

    def add(self, loss: Tensor, size: int) -> None:
        self._losses.append(loss.detach())
        self._sizes.append(size)

    @property
    def total(self) -> Tensor:
        """The sum over the examples seen, a float64 scalar on the CPU."""
        weights = torch.tensor(self._sizes, dtype=torch.float64)
        return torch.stack(self._losses).to("cpu", torch.float64).dot(weights)

    @property
    def seen(self) -> int:
        return sum(self._sizes)

    @property
    def mean(self) -> float:
        """The mean over the examples seen."""
        return self.total.item() / self.seen


@dataclass
class _Batches:
    """Fills gradients batch by batch."""

    task: Task
    model: torch.nn.Module
    inputs: Tensor
    targets: Tensor
    batches: Iterator[Tensor]
    losses: Losses

    def fill(self) -> None:
        """Set the gradients to those of the mean loss over the next batch."""
        batch = next(self.batches)
        loss = self.task.loss(self.model(self.inputs[batch]), self.targets[batch])
        for parameter in self.model.parameters():
            parameter.grad = None
        loss.backward()
        self.losses.add(loss, len(batch))


def _noisy(
    task: Task,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    private: Private,
) -> PrivateGradients:
    from fedipfs.privacy.dpsgd import PrivateGradients  # it takes Opacus along

    return PrivateGradients(
        task,
        model,
        optimizer,
        inputs,
        targets,
        private.mechanism,
        private.source,
        private.mode,
        private.physical_batch,
    )


def gradient(
    task: Task,
    model: torch.nn.Module,
    inputs: NDArray[Any],
    targets: Labels,
    *,
    config: Mapping[str, Any],
    seed: int,
    batch_size: int,
    private: Private | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of the mean loss over all of one client's examples: FedSGD's answer.

    McMahan et al. 2017, section 2. It is summed over batches of `batch_size` in the order of the
    examples. The model is in training mode, so that this is the gradient of FedAvg's first step
    if that is on all examples: dropout is drawn from `seed`, and BatchNorm normalises each batch
    by itself. Of `config`, the `train` section, only `clip_norm` and `device` count. With
    `private` it is one step's noisy gradient instead, and there is no loss.

    Returns tensors named as those of `model.state_dict()`, with gradients for the parameters
    (zeros for those that are frozen or unused) and for buffers their new values; and what `train`
    returns. The parameters of `model` stay. Raises what `train` raises.
    """
    count = _count(targets) if private is None else len(targets)
    clip_norm = _clip_norm(config)
    place = find_device(config.get("device", "cpu"))
    seed_everything(seed, place)
    model.to(place).train()
    model.zero_grad()
    metrics: dict[str, float] = {"num-examples": count, "steps": 1}
    if private is None:
        metrics["train_loss"] = 0.0
        for begin in range(0, count, batch_size):
            part = slice(begin, begin + batch_size)
            x, y = task.inputs(inputs[part]).to(place), task.targets(targets[part]).to(place)
            share = task.loss(model(x), y) * (len(y) / count)
            share.backward()
            metrics["train_loss"] += share.item()
    else:
        metrics["num-examples"] = private.examples
        step = optim.optimizer(model.parameters(), {"name": "SGD", "lr": 1.0})  # is never made
        x, y = task.inputs(inputs).to(place), task.targets(targets).to(place)
        with _noisy(task, model, step, x, y, private) as gradients:
            gradients.fill()
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    model.cpu()
    answer = model.state_dict()
    for name, each in model.named_parameters(remove_duplicate=False):
        answer[name] = torch.zeros_like(each) if each.grad is None else each.grad
    model.zero_grad()
    return answer, metrics


def _in_order(
    model: torch.nn.Module, correction: Mapping[str, Tensor], place: torch.device
) -> list[Tensor]:
    named = model.named_parameters()
    return [correction[name].to(place) for name, each in named if each.requires_grad]


def _count(targets: Labels) -> int:
    if not len(targets):
        raise DataError("a client has no training examples; give each client some")
    return len(targets)


def _steps(config: Mapping[str, Any], count: int) -> int:
    if config.get("steps") is not None:
        return _positive(config, "steps")
    return _positive(config, "epochs") * -(-count // _positive(config, "batch_size"))


def _clip_norm(config: Mapping[str, Any]) -> float | None:
    clip_norm = config.get("clip_norm")
    if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
        raise ConfigError(f"train.clip_norm={clip_norm} must be above 0, or null for none")
    return clip_norm


def seed_everything(seed: int, place: torch.device) -> None:
    """As torch.manual_seed, which takes a quarter of a millisecond on a machine without CUDA."""
    torch.default_generator.manual_seed(seed)
    if place.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"train.{key}={value} must be a whole number, 1 or more")
    return value
