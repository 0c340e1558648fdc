"""Small models of every kind that DP-SGD can train, with tasks and examples for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedipfs.privacy.models import ModuleValidator
from fedipfs.tasks import Task

CLASSES = 3
TOKENS = 7


class Small(Task):
    """A model that `make` makes, on three classes; `loss` is that of a batch."""

    def __init__(
        self, make: Callable[[], nn.Module], loss: Any = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.make, self.own_loss, self.dtype = make, loss, dtype

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.make().to(self.dtype)

    def data(self, *, root, fallback):
        raise NotImplementedError

    def inputs(self, array):
        whole = np.issubdtype(array.dtype, np.integer)
        return torch.tensor(array) if whole else torch.tensor(array, dtype=self.dtype)

    def loss(self, output, target):
        loss = self.own_loss or functional.cross_entropy
        return loss(output, target)


class Tied(nn.Module):
    """The layer that reads tokens is also the one that names them."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.name = nn.Embedding(TOKENS, 4), nn.Linear(4, TOKENS, bias=False)
        self.name.weight = self.read.weight
        self.last = nn.Linear(TOKENS, CLASSES)

    def forward(self, tokens):
        return self.last(torch.tanh(self.name(self.read(tokens).mean(1))))


class Twice(nn.Module):
    """Passes one layer two times."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.last = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))


class Residual(nn.Module):
    """Two ways from the input, of which one passes a layer twice as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.back = nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(torch.relu(self.near(x) + self.back(torch.relu(self.far(x)))))


class Scaled(nn.Module):
    """A parameter that belongs to no layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(x * self.scale)


class Recurrent(nn.Module):
    """`kind` is a recurrent layer of torch's."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.recurrent, self.last = kind(2, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.last(self.recurrent(x.view(-1, 3, 2))[0][:, -1])


class Attentive(nn.Module):
    """Attention between three vectors of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = x.view(-1, 3, 2)
        return self.last(self.attention(x, x, x)[0].flatten(1))


class Noting(nn.Module):
    """Takes in what it has seen, by `take`, and gives back what came."""

    def __init__(self, take) -> None:
        super().__init__()
        self.take = take
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.take(self.seen, x.detach())
        return x


class Flat(nn.Module):
    """Passes a vector on as `shape`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.view(-1, *self.shape)


def fixed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The model with Opacus' layers in the place of torch's."""
    return lambda: ModuleValidator.fix(make())


def frozen(make: Callable[[], nn.Module], layer: int) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        model[layer].requires_grad_(False)  # type: ignore[index]
        return model

    return made


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def conv(norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        Flat(1, 2, 3), nn.Conv2d(1, 4, 2), norm or nn.Identity(), nn.ReLU(), nn.Flatten(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


def images(*layers: nn.Module, values: int) -> nn.Module:
    """Two channels of 1 by 3."""
    return nn.Sequential(Flat(2, 1, 3), *layers, nn.Flatten(), nn.Linear(values, CLASSES))


def tokens(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Embedding(TOKENS, 4), *more, nn.Flatten(), nn.Linear(24, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "logistic": lambda: nn.Linear(6, CLASSES),
    "perceptron": mlp,
    "without bias": lambda: nn.Linear(6, CLASSES, bias=False),
    "convolution": conv,
    "convolution in one dimension": lambda: nn.Sequential(
        Flat(2, 3), nn.Conv1d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES)
    ),
    "convolution in groups": lambda: images(nn.Conv2d(2, 4, (1, 2), groups=2), nn.ReLU(), values=8),
    "convolution with steps and gaps": lambda: images(
        nn.Conv2d(2, 3, 2, stride=2, padding=(2, 3), dilation=2, bias=False), values=24
    ),
    "convolution of the same size": lambda: images(nn.Conv2d(2, 2, 3, padding="same"), values=6),
    "transposed convolution": lambda: images(nn.ConvTranspose2d(2, 2, (1, 2)), values=8),
    "group norm": lambda: conv(nn.GroupNorm(2, 4)),
    "instance norm": lambda: conv(nn.InstanceNorm2d(4, affine=True)),
    "layer norm": lambda: nn.Sequential(mlp()[0], nn.LayerNorm(5), nn.Linear(5, CLASSES)),
    "tokens": tokens,
    "a layer on each token": lambda: tokens(nn.Linear(4, 4), nn.ReLU()),
    "a layer on a grid": lambda: nn.Sequential(
        Flat(1, 3, 2), nn.Linear(2, 4), nn.Flatten(), nn.Linear(12, CLASSES)
    ),
    "tied weights": Tied,
    "a layer twice": Twice,
    "two ways": Residual,
    "own parameter": Scaled,
    "first layer frozen": frozen(mlp, 0),
    "last layer frozen": frozen(mlp, 2),
    "LSTM of Opacus": fixed(lambda: Recurrent(nn.LSTM)),
    "GRU of Opacus": fixed(lambda: Recurrent(nn.GRU)),
    "attention of Opacus": fixed(Attentive),
}
NEED_HOOKS = ("a layer on a grid", "tied weights", "a layer twice")
WITH_TOKENS = ("tokens", "a layer on each token", "tied weights")


def examples(name: str, count: int, seed: int = 0, scale: float = 1.0):
    """Inputs (count, 6), tokens where the model `name` takes them, and targets (count,)."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, count)
    if name in WITH_TOKENS:
        return rng.integers(0, TOKENS, (count, 6)), targets
    return (scale * rng.normal(size=(count, 6))).astype(np.float32), targets
