"""Tasks that train in seconds, on data that come with scikit-learn."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedipfs import data
from fedipfs.data import Dataset
from fedipfs.tasks.base import Task


class Digits(Task):
    """Handwritten digits of 8 x 8 pixels, a perceptron with one hidden layer.

    `hidden` is that layer's width; 64 gives 4,810 parameters. With `norm` batch normalisation
    follows it, 128 parameters more.
    """

    def __init__(self, hidden: int = 64, norm: bool = False) -> None:
        self.hidden, self.norm = hidden, norm

    def data(self, *, root: str | None, fallback: str) -> Dataset:
        return data.load("digits", root=root, fallback=fallback)

    def inputs(self, array: NDArray[Any]) -> Tensor:
        """(N, 8, 8) uint8, 0 to 16, to (N, 8, 8) float32, -1 to 1."""
        return torch.tensor(array, dtype=torch.float32).div_(8).sub_(1)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, self.hidden),
            *([nn.BatchNorm1d(self.hidden)] if self.norm else []),
            nn.ReLU(),
            nn.Linear(self.hidden, 10),
        )


class BreastCancer(Task):
    """Benign or malignant from 30 measurements, a perceptron with one hidden layer."""

    def __init__(self, hidden: int = 16) -> None:
        self.hidden = hidden

    def data(self, *, root: str | None, fallback: str) -> Dataset:
        return data.load("breast_cancer", root=root, fallback=fallback)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(30, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 2))
