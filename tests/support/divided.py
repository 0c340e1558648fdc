"""A task that trains over several processes, and goes wrong at one of them if asked to."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import torch
from torch import nn

from fedipfs.data import Dataset, Examples
from fedipfs.errors import DataError
from fedipfs.tasks import Task

RNG = np.random.default_rng(0)
DATA = Examples(RNG.normal(size=(50, 6)).astype(np.float32), RNG.integers(0, 3, 50))


class Net(nn.Module):
    """Layers of several shapes, tied and unused weights among them; some of `large`."""

    def __init__(self, norm: bool, large: bool, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.normed = nn.BatchNorm1d(5) if norm else nn.LayerNorm(5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 5))
            if large
            else nn.Linear(5, 5)
            for _ in range(2)
        )
        self.again = nn.Linear(5, 5)
        self.again.weight = self.first_tied = nn.Parameter(torch.randn(5, 5) / 2)
        self.idle = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.normed(self.first(x)) @ self.first_tied
        for block in self.blocks:
            x = torch.tanh(block(x)) + x
        return self.last(self.dropout(torch.tanh(self.again(x))))


class Divided(Task):
    """`wrong`: what happens at the last rank before its first loss."""

    def __init__(
        self, wrong: str = "", norm: bool = False, large: bool = False, dropout: float = 0.0
    ) -> None:
        self.wrong, self.net = wrong, (norm, large, dropout)

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Net(*self.net)

    def data(self, *, root: str | None, fallback: str) -> Dataset:
        return Dataset("divided", DATA, DATA)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        last = int(os.environ.get("WORLD_SIZE", 1)) - 1
        if self.wrong and int(os.environ.get("RANK", 0)) == last:
            if self.wrong == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.wrong == "stuck":
                time.sleep(60)
            elif self.wrong == "data":
                raise DataError("row 7 is no number")
            elif self.wrong == "environment":
                raise ValueError(" ".join(name for name in os.environ if "FEDIPFS" in name))
            raise ValueError(f"{self.wrong}\nand a second line")
        return super().loss(output, target)
