"""MNIST: 60,000 and 10,000 handwritten digits, 28 x 28 grey values (LeCun, Cortes, Burges).

The four IDX files, plain or gzip, are looked for where the user says, then in `$FEDIPFS_DATA`,
then in the user's cache; last, they are downloaded into the cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedipfs.data import cache, idx
from fedipfs.data.base import Dataset, Examples
from fedipfs.data.download import fetch
from fedipfs.errors import DataError

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
SUBFOLDER = Path("MNIST") / "raw"


@dataclass(frozen=True)
class IdxFile:
    """One of the files. `sha256` and `size` are those of the plain bytes: the same whoever
    compressed them, and compression differs between copies in circulation."""

    name: str
    sha256: str
    size: int


FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        47_040_016,
    ),
    IdxFile(
        "train-labels-idx1-ubyte",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        60_008,
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        7_840_016,
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        10_008,
    ),
)


def at(root: Path) -> list[Path]:
    """The paths of the four files in `root`, where the user says they are; else DataError."""
    paths = _find(root)
    if paths is None:
        names = ", ".join(file.name for file in FILES)
        raise DataError(
            f"data.root={root} does not hold MNIST: {names} (each plain or .gz) are expected"
            f" there or in {root / SUBFOLDER}; correct data.root, or leave it out to download"
        )
    return paths


def anywhere(mirrors: Sequence[str] = MIRRORS) -> list[Path]:
    """The paths of the four files wherever they are found first, else after a download.

    With $FEDIPFS_OFFLINE set nothing is downloaded. Raises DataError with all that was tried.
    """
    kept, named = cache.folder(), os.environ.get("FEDIPFS_DATA")
    for place in ([Path(named)] if named else []) + [kept]:
        paths = _find(place)
        if paths is not None:
            return paths
    tried = [f"FEDIPFS_DATA={named} lacks the files" if named else "FEDIPFS_DATA is not set"]
    tried.append(f"{kept / SUBFOLDER} lacks them")
    if os.environ.get("FEDIPFS_OFFLINE"):
        raise DataError("; ".join([*tried, "FEDIPFS_OFFLINE forbids a download"]))
    try:
        return _download(kept / SUBFOLDER, mirrors)
    except DataError as error:
        raise DataError("; ".join([*tried, str(error)])) from error


def _find(root: Path) -> list[Path] | None:
    for folder in (root / SUBFOLDER, root):
        paths = [path for file in FILES if (path := _either(folder, file.name))]
        if len(paths) == len(FILES):
            return paths
    return None


def _either(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _download(folder: Path, mirrors: Sequence[str]) -> list[Path]:
    for file in FILES:
        if _either(folder, file.name) is None:  # an interrupted download goes on
            urls = [f"{mirror}{file.name}.gz" for mirror in mirrors]
            fetch(urls, folder / file.name, sha256=file.sha256, size=file.size)
    return at(folder)


def read(paths: Sequence[Path]) -> Dataset:
    """The data set in the four files, in the order of FILES.

    Inputs (N, 28, 28) uint8, 0 is paper and 255 ink; targets 0 to 9. Raises DataError.
    """
    return Dataset("mnist", _examples(*paths[:2]), _examples(*paths[2:]))


def _examples(images_path: Path, labels_path: Path) -> Examples:
    images, labels = idx.read(images_path), idx.read(labels_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} holds shape {images.shape}; (N, 28, 28) is expected")
    if labels.shape != images.shape[:1] or not len(labels):
        raise DataError(
            f"{labels_path} holds shape {labels.shape} where {images_path.name} holds"
            f" {len(images)} images; the files do not belong together"
        )
    if labels.max() > 9:
        raise DataError(f"{labels_path} holds label {labels.max()}; MNIST's go from 0 to 9")
    return Examples(images, labels.astype(np.int64))
