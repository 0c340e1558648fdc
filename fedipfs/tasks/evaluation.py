"""How good a model is on some examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedipfs.data.base import Labels
from fedipfs.errors import ConfigError, DataError
from fedipfs.tasks.base import Task


def evaluate(
    task: Task,
    model: torch.nn.Module,
    inputs: NDArray[Any],
    targets: Labels,
    *,
    batch_size: int,
    device: str = "cpu",
) -> dict[str, float]:
    """The mean loss and the task's metrics over all examples, whatever the batch size.

    Batch means are weighted by examples and added as float64. `device` is cpu, cuda or auto; the
    model is back on the CPU afterwards. Raises ConfigError and DataError.
    """
    count = len(targets)
    if not count:
        raise DataError("there are no examples to evaluate on; give some, or do not evaluate")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"evaluate.batch_size={batch_size} must be a whole number, 1 or more")
    place = find_device(device)
    model.to(place).eval()
    totals: dict[str, float] = {}
    with torch.inference_mode():
        for begin in range(0, count, batch_size):
            part = slice(begin, begin + batch_size)
            target = task.targets(targets[part]).to(place)
            output = model(task.inputs(inputs[part]).to(place))
            means = {"loss": task.loss(output, target), **task.metrics(output, target)}
            for name, mean in means.items():
                totals[name] = totals.get(name, 0.0) + float(mean) * len(target)
    model.cpu()
    return {name: total / count for name, total in totals.items()}


def evaluate_each(
    task: Task,
    model: torch.nn.Module,
    inputs: NDArray[Any],
    targets: Labels,
    *,
    batch_size: int,
    device: str = "cpu",
) -> dict[str, NDArray[np.float64]]:
    """As `evaluate`, but loss and metrics of each example alone: (N,) arrays."""
    place = find_device(device)
    model.to(place).eval()
    found: dict[str, list[float]] = {}
    with torch.inference_mode():
        for begin in range(0, len(targets), batch_size):
            part = slice(begin, begin + batch_size)
            target = task.targets(targets[part]).to(place)
            output = model(task.inputs(inputs[part]).to(place))
            for i in range(len(target)):
                one, wanted = output[i : i + 1], target[i : i + 1]
                means = {"loss": task.loss(one, wanted), **task.metrics(one, wanted)}
                for name, value in means.items():
                    found.setdefault(name, []).append(float(value))
    model.cpu()
    return {name: np.array(values, np.float64) for name, values in found.items()}


def find_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or for `auto` whichever of them is there; else ConfigError."""
    if name not in ("cpu", "cuda", "auto"):
        raise ConfigError(f"train.device={name} is unknown; choose cpu, cuda or auto")
    available = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("train.device=cuda, but no CUDA device is available; choose cpu or auto")
    return torch.device("cuda" if available else "cpu")
