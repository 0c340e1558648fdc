"""What is learnt: a model, its loss, its metrics and its data, in one class.

`docs/tasks.md` shows a whole task in one file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedipfs.data.base import Dataset, Labels


class Task(ABC):
    """Derive from this, and name the class in `task.target`.

    `task.options` are passed to the class's constructor as keywords. As it stands the class
    suits classification: examples as float32 vectors, cross-entropy, accuracy.
    """

    #: The metric that sweeps optimise and the summary names; `task.metric` says it to the server.
    metric: ClassVar[str] = "accuracy"

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """A new model. Its weights may be random: the run's seed is set before the call."""

    @abstractmethod
    def data(self, *, root: str | None, fallback: str) -> Dataset:
        """The data set; `root` and `fallback` are `data.root` and `data.fallback`."""

    def inputs(self, array: NDArray[Any]) -> Tensor:
        """Inputs (N, ...) of the data set as the tensor that the model takes."""
        return torch.tensor(array, dtype=torch.float32)

    def targets(self, array: Labels) -> Tensor:
        """Targets (N,) of the data set as the tensor that the loss takes."""
        return torch.tensor(array)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss over a batch, a scalar; `output` is what the model gave."""
        return torch.nn.functional.cross_entropy(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor | float]:
        """Means over a batch, by name; `metric` is among them, `loss` is not."""
        return {"accuracy": (output.argmax(dim=1) == target).float().mean()}
