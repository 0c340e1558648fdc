"""Digits by fixed features and one linear layer: what little noise leaves of learning goes far.

Under differential privacy every trained value costs noise, so features that need no training are
worth more than layers (Tramer and Boneh 2021, "Differentially Private Learning Needs Better
Features (or Much More Data)"). These look at no data: they are the same for everybody.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedipfs.tasks.small import Digits
from fedipfs.tasks.vision import OnMnist

_BLOCK = 200  # images at a time: what lies between stays in the cache
_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
_EDGES = torch.stack([_SOBEL, _SOBEL.T]).unsqueeze(1)  # (2, 1, 3, 3): the gradient
_ANGLES = torch.arange(8) * (math.pi / 4)
_RAYS = torch.stack([_ANGLES.cos(), _ANGLES.sin()], dim=1)[:, :, None, None]  # (8, 2, 1, 1)


def fourier(x: Tensor, features: int, width: float) -> Tensor:
    """(N, d) to (N, features): random cosines whose products approximate a Gaussian kernel.

    k(x, y) = exp(-width^2 ||x - y||^2 / 2). Rahimi and Recht 2007, "Random Features for Large-Scale
    Kernel Machines".
    """
    directions, phases = _waves(x.shape[1], features)
    return torch.addmm(phases, x, directions, alpha=width).cos_().mul_(math.sqrt(2 / features))


@lru_cache(maxsize=4)
def _waves(inputs: int, features: int) -> tuple[Tensor, Tensor]:
    draw = np.random.RandomState(0)  # the generator whose numbers NumPy never changes
    directions = draw.standard_normal((inputs, features)).astype(np.float32)
    phases = (draw.random_sample(features) * 2 * math.pi).astype(np.float32)
    return torch.from_numpy(directions), torch.from_numpy(phases)


def orientations(pixels: Tensor) -> Tensor:
    """(N, 28, 28), 0 to 1, to (N, 392): how much edge of 8 directions is in each of 7 x 7 cells.

    Cells overlap, and each has about the same length whatever its contrast; as in Dalal and Triggs
    2005, "Histograms of Oriented Gradients for Human Detection", section 6.
    """
    edges = functional.conv2d(pixels.unsqueeze(1), _EDGES, padding=1)  # (N, 2, 28, 28)
    edges *= (edges.square().sum(dim=1, keepdim=True) + 1e-12).pow_(-0.25)  # squares in length
    rays = functional.conv2d(edges, _RAYS).relu_().square_()
    cells = functional.avg_pool2d(rays, 6, 4, padding=1)  # (N, 8, 7, 7)
    return _unit((cells / (cells.norm(dim=1, keepdim=True) + 0.05)).flatten(1))


def _unit(x: Tensor) -> Tensor:
    """Each row less its mean, in length 1."""
    x = x - x.mean(dim=1, keepdim=True)
    return x / (x.norm(dim=1, keepdim=True) + 1e-6)


def _head(features: int) -> nn.Module:
    """A linear layer that begins at zero; a bias would take part of every clipped gradient."""
    layer = nn.Linear(features, 10, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(layer)


class MnistFeatures(OnMnist):
    """MNIST by `features` random cosines of edge directions: 20,000 parameters."""

    def __init__(self, features: int = 2000, width: float = 1.5) -> None:
        self.features, self.width = features, width

    def inputs(self, array: NDArray[Any]) -> Tensor:
        """(N, 28, 28) uint8 to (N, features) float32."""
        found = torch.empty(len(array), self.features)
        for start in range(0, len(array), _BLOCK):
            pixels = torch.tensor(array[start : start + _BLOCK], dtype=torch.float32) / 255
            found[start : start + _BLOCK] = fourier(orientations(pixels), self.features, self.width)
        return found

    def model(self) -> nn.Module:
        return _head(self.features)


class DigitsFeatures(Digits):
    """Scikit-learn's digits by `features` random cosines of the pixels: 20,000 parameters."""

    def __init__(self, features: int = 2000, width: float = 2.0) -> None:
        self.features, self.width = features, width

    def inputs(self, array: NDArray[Any]) -> Tensor:
        """(N, 8, 8) uint8, 0 to 16, to (N, features) float32."""
        pixels = torch.tensor(array, dtype=torch.float32).flatten(1) / 16
        return fourier(_unit(pixels), self.features, self.width)

    def model(self) -> nn.Module:
        return _head(self.features)
