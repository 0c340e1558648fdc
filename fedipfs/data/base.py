"""The two nouns every data set is made of. NumPy only: loading data needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples in a fixed order.

    `inputs` has shape (N, ...) in the dtype in which the data come (uint8 images stay uint8, a
    quarter of their size as float32); `targets` has shape (N,), int64.
    """

    inputs: NDArray[np.generic]
    targets: Labels

    def __post_init__(self) -> None:
        if self.targets.ndim != 1 or len(self.inputs) != len(self.targets):
            raise ValueError(
                f"inputs {self.inputs.shape} and targets {self.targets.shape} do not pair up"
            )

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set, and the name under which records mention them.

    `note` is one line that the user must see (for instance, that other data stand in for the
    ones asked for), or None.
    """

    name: str
    train: Examples
    test: Examples
    note: str | None = None
