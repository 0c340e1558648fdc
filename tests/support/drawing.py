"""Digits with noise from NumPy's global generator: so the seeds of whoever trains show."""

from __future__ import annotations

import os
import time

import numpy as np
import torch
from torch import Tensor

from fedipfs.tasks.small import Digits


class Noisy(Digits):
    """As Digits. While there is a file named by `wait`, training goes on and on."""

    def __init__(self, hidden: int = 16, wait: str = "") -> None:
        super().__init__(hidden)
        self.wait = wait

    def inputs(self, array: np.ndarray) -> Tensor:
        """As Digits, and noise."""
        while self.wait and os.path.exists(self.wait):
            time.sleep(0.05)
        noise = np.random.normal(size=array.shape).astype(np.float32)
        return super().inputs(array) + torch.from_numpy(noise) / 10
