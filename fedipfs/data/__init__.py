"""Real data: MNIST, and the sets that come with scikit-learn. NumPy arrays, no torch.

`load` gives a Dataset, `partition` divides one over clients.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedipfs.data import bundled, mnist
from fedipfs.data.base import Dataset, Examples
from fedipfs.data.partitions import partition
from fedipfs.errors import ConfigError, DataError

__all__ = ["NAMES", "Dataset", "Examples", "load", "partition"]

NAMES = ("mnist", "digits", "breast_cancer")


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    fallback: str = "digits",
    mirrors: Sequence[str] = mnist.MIRRORS,
) -> Dataset:
    """The data set called `name`, one of NAMES.

    `root` is the folder with MNIST's files, None to look in $FEDIPFS_DATA and the user's cache
    and then to download from `mirrors`; the other sets come with scikit-learn and ignore it.
    Where MNIST cannot be had, `fallback="digits"` gives real but smaller handwritten digits in
    MNIST's shape, with a note that says so, and `fallback="error"` raises DataError. A `root`
    without the files, or files that are damaged, are a DataError with either.
    Raises ConfigError for an unknown name or fallback.
    """
    if fallback not in ("digits", "error"):
        raise ConfigError(f"data.fallback={fallback} is unknown; choose digits or error")
    if name == "digits":
        return bundled.digits()
    if name == "breast_cancer":
        return bundled.breast_cancer()
    if name != "mnist":
        raise ConfigError(f"data set {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if root is not None:
        return mnist.read(mnist.at(Path(root)))
    try:
        paths = mnist.anywhere(mirrors)
    except DataError as error:
        if fallback == "error":
            raise
        return bundled.digits_as_mnist(
            "MNIST WAS NOT FOUND AND COULD NOT BE DOWNLOADED: this run uses scikit-learn's 1,797"
            " handwritten digits (8 x 8) instead, and its results are not MNIST results; to use"
            f" MNIST put its four files in a folder and give data.root=FOLDER ({error})"
        )
    return mnist.read(paths)
