"""A task with as many parameters as a test wants: 795 for each hidden value, and 10."""

from __future__ import annotations

from torch import nn

from fedipfs.tasks.vision import OnMnist


class Sized(OnMnist):
    """One hidden layer of `hidden` values."""

    def __init__(self, hidden: int = 33) -> None:
        self.hidden = hidden

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 10)
        )
