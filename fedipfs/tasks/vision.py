"""Handwritten digits: MNIST with three models, and scikit-learn's small digits."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedipfs import data
from fedipfs.data import Dataset
from fedipfs.tasks.base import Task

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels, 1 being ink


class OnMnist(Task):
    """What the tasks on MNIST share: the data."""

    def data(self, *, root: str | None, fallback: str) -> Dataset:
        return data.load("mnist", root=root, fallback=fallback)

    def inputs(self, array: NDArray[Any]) -> Tensor:
        """(N, 28, 28) uint8 to (N, 1, 28, 28) float32, mean 0 and deviation 1 over MNIST."""
        pixels = torch.tensor(array, dtype=torch.float32).unsqueeze(1)
        return pixels.sub_(255 * MEAN).div_(255 * DEVIATION)


class Mnist(OnMnist):
    """A small CNN, 77,938 parameters.

    Strides take the place of pooling: as accurate here, in a third of the time on a CPU. With
    `norm` batch normalisation follows each convolution, 64 parameters more.
    """

    def __init__(self, norm: bool = False) -> None:
        self.norm = norm

    def model(self) -> nn.Module:
        first, second = ([nn.BatchNorm2d(n)] if self.norm else [] for n in (8, 24))
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),  # (B, 8, 14, 14)
            *first,
            nn.ReLU(),
            nn.Conv2d(8, 24, 3, stride=2, padding=1),  # (B, 24, 7, 7)
            *second,
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


class MnistMcMahan(OnMnist):
    """The CNN of McMahan et al. 2017, section 3: 1,663,370 parameters."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),  # (B, 32, 28, 28)
            nn.MaxPool2d(2),  # before the ReLU: the same result, from a quarter of the values
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, padding=2),  # (B, 64, 14, 14)
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )


class MnistLogistic(OnMnist):
    """Logistic regression on the pixels: 7,850 parameters."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
