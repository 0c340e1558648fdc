"""Local training: the plain torch loop that every client runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedipfs.data.base import Labels
from fedipfs.errors import ConfigError, DataError
from fedipfs.tasks import Task, evaluate, optim
from fedipfs.tasks.evaluation import find_device

__all__ = ["evaluate", "train"]


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
) -> dict[str, float]:
    """Train `model` in place on one client's examples.

    `inputs` (N, ...) and `targets` (N,) are as the task's data set has them; `config` is the
    `train` section of the configuration. `config["steps"]`, if given, is the number of batches,
    else `config["epochs"]` passes are made over the examples, shuffled anew each time. Shuffling
    and dropout follow from `seed`: the same arguments give the same weights.

    With `proximal_mu` the objective gains mu/2 * ||w - w0||^2, w0 being the weights that the
    model comes with (FedProx: Li et al. 2020, equation 2); the loss reported does not include it.

    Returns `train_loss`, the mean over the examples in the order seen, each measured before the
    step on its batch; `num-examples`, N; and `steps`. Raises ConfigError and DataError.
    """
    count = len(targets)
    if not count:
        raise DataError("a client has no training examples; give each client some")
    batch_size = _positive(config, "batch_size")
    if config.get("steps") is not None:
        steps = _positive(config, "steps")
    else:
        steps = _positive(config, "epochs") * -(-count // batch_size)
    clip_norm = config.get("clip_norm")
    if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
        raise ConfigError(f"train.clip_norm={clip_norm} must be above 0, or null for none")
    place = find_device(config.get("device", "cpu"))

    _seed_everything(seed, place)
    shuffle = torch.Generator().manual_seed(seed)
    model.train()
    if place.type != "cpu":
        model.to(place)
    optimizer = optim.optimizer(model.parameters(), config["optimizer"])
    optim.apply_schedule(optimizer, config.get("schedule"), server_round=server_round)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained] if proximal_mu else []
    x, y = task.inputs(inputs).to(place), task.targets(targets).to(place)

    losses: list[Tensor] = []  # tensors: asking for a number would wait for the device
    sizes: list[int] = []
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            order = torch.randperm(count, generator=shuffle).to(place)
            batches = list(order.split(batch_size))[::-1]
        batch = batches.pop()
        loss = task.loss(model(x[batch]), y[batch])
        for parameter in trained:
            parameter.grad = None
        loss.backward()
        for parameter, origin in zip(trained, start, strict=False):
            if parameter.grad is not None:  # the proximal term's gradient
                parameter.grad.add_(parameter.detach() - origin, alpha=proximal_mu)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip_norm)
        optimizer.step()
        losses.append(loss.detach())
        sizes.append(len(batch))
    optimizer.zero_grad()
    if place.type != "cpu":
        model.cpu()
    weights = torch.tensor(sizes, dtype=torch.float64)
    total = torch.stack(losses).to("cpu", torch.float64).dot(weights)
    return {"train_loss": total.item() / sum(sizes), "num-examples": count, "steps": steps}


def _seed_everything(seed: int, place: torch.device) -> None:
    """As torch.manual_seed, which takes a quarter of a millisecond on a machine without CUDA."""
    torch.default_generator.manual_seed(seed)
    if place.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"train.{key}={value} must be a whole number, 1 or more")
    return value
