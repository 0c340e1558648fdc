"""The data sets that come with scikit-learn: real data, no network.

Importing scikit-learn takes a second, so what it gives is kept in the user's cache.
Both are split the same way every time: of each class, every fifth example is for testing.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedipfs.data import cache
from fedipfs.data.base import Dataset, Examples, Labels

TEST_EVERY = 5


def digits() -> Dataset:
    """1,797 handwritten digits (Alpaydin and Kaynak 1998), 1,442 to train and 355 to test.

    Inputs (N, 8, 8) uint8, 0 is paper and 16 ink; targets 0 to 9.
    """
    values, targets = _kept("digits")
    train, test = _split(targets)
    images = values.astype(np.uint8).reshape(-1, 8, 8)
    return Dataset(
        "digits", Examples(images[train], targets[train]), Examples(images[test], targets[test])
    )


def digits_as_mnist(note: str) -> Dataset:
    """The same digits in MNIST's shape: (N, 28, 28) uint8, 0 is paper and 255 ink.

    Each value becomes a 3 x 3 square, and a margin of 2 is put around, as MNIST has one.
    """

    def enlarge(examples: Examples) -> Examples:
        images = (examples.inputs.astype(np.uint16) * 255 // 16).astype(np.uint8)
        images = images.repeat(3, axis=1).repeat(3, axis=2)
        return Examples(np.pad(images, ((0, 0), (2, 2), (2, 2))), examples.targets)

    small = digits()
    return Dataset(small.name, enlarge(small.train), enlarge(small.test), note)


def breast_cancer() -> Dataset:
    """569 breast masses, 30 measurements each (Wolberg, Street, Mangasarian 1995).

    Inputs (N, 30) float32, each measurement standardised by the training examples' mean and
    deviation; targets 0 malignant, 1 benign.
    """
    values, targets = _kept("breast_cancer")
    train, test = _split(targets)
    mean, deviation = values[train].mean(axis=0), values[train].std(axis=0)
    inputs = ((values - mean) / deviation).astype(np.float32)
    return Dataset(
        "breast_cancer",
        Examples(inputs[train], targets[train]),
        Examples(inputs[test], targets[test]),
    )


def _split(targets: Labels) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    test = np.zeros(len(targets), dtype=bool)
    for label in np.unique(targets):
        test[np.flatnonzero(targets == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return ~test, test


def _kept(name: str) -> tuple[NDArray[np.float64], Labels]:
    version = metadata.version("scikit-learn")
    path = cache.folder() / "scikit-learn" / f"{name}-{version}.npz"
    kept = cache.arrays(path, ("inputs", "targets"), lambda: _ask(name))
    return kept["inputs"], kept["targets"]


def _ask(name: str) -> dict[str, NDArray[Any]]:
    from sklearn import datasets

    bunch = {"digits": datasets.load_digits, "breast_cancer": datasets.load_breast_cancer}[name]()
    return {
        "inputs": np.asarray(bunch.data, dtype=np.float64),
        "targets": np.asarray(bunch.target, dtype=np.int64),
    }
