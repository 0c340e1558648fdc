"""A task with tied weights: two names of one tensor, and a buffer with two names, too."""

from __future__ import annotations

import torch
from torch import nn

from fedipfs.tasks.small import Digits


class Tied(Digits):
    """`decoder.weight` is `encoder.weight`, `decoder.shift` is `encoder.shift`."""

    def model(self) -> nn.Module:
        return TiedModel()


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)
        self.decoder.weight = self.encoder.weight
        self.encoder.register_buffer("shift", torch.zeros(64))
        self.decoder.register_buffer("shift", self.encoder.shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x.flatten(1)) + self.encoder.shift
        return self.head(self.decoder(x) + self.decoder.shift)
