"""NumPy and HDF5 files: named arrays, a row for each example. Nothing pickled is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedipfs.data.blocks import Block, Wanted, check_columns
from fedipfs.errors import ConfigError, DataError, one_line


def numpy_blocks(paths: Sequence[Path], wanted: Wanted) -> Iterator[Block]:
    """A block for each .npz file, and for each folder of .npy files, in order.

    The name of a .npy file is that of its array. Raises DataError.
    """
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        groups[path.parent if path.suffix == ".npy" else path].append(path)
    for place, members in groups.items():
        yield _guarded(place, "numpy", partial(_numpy, members, wanted), wanted)


def hdf5_blocks(paths: Sequence[Path], wanted: Wanted) -> Iterator[Block]:
    """A block for each file; arrays are named by their path in it, as "group/images".

    Raises DataError, and ConfigError where h5py is not installed.
    """
    try:
        import h5py  # noqa: F401
    except ImportError:
        raise ConfigError(
            "data.format=hdf5 needs h5py, which is not installed: pip install 'fedipfs[hdf5]'"
        ) from None
    for path in paths:
        yield _guarded(path, "hdf5", partial(_hdf5, path, wanted), wanted)


def _guarded(
    place: Path, form: str, read: Callable[[], Mapping[str, NDArray[Any]]], wanted: Wanted
) -> Block:
    try:
        found = read()
        lengths = {name: len(array) if array.ndim else None for name, array in found.items()}
        columns = {name: _column(array) for name, array in found.items()}
    except DataError:
        raise
    except Exception as error:  # whatever the libraries make of a file
        reason = one_line(error, 200) or type(error).__name__
        if "allow_pickle" in reason:
            reason = "it holds Python objects, which are not loaded; save numbers or texts"
        raise DataError(f"{place} cannot be read as {form} ({reason})") from error
    count = lengths[wanted.columns[0]]
    for name, length in lengths.items():
        if length is None:
            raise DataError(f"{place}: {name} is a single value; a row an example is expected")
        if length != count:
            raise DataError(
                f"{place}: {name} has {length} rows, and {wanted.columns[0]} has {count}; they do "
                "not belong together"
            )
    return Block(place, 1, count or 0, columns)


def _numpy(paths: Iterable[Path], wanted: Wanted) -> dict[str, NDArray[Any]]:
    paths = list(paths)
    if paths[0].suffix == ".npy":
        files = {path.stem: path for path in paths}
        check_columns(paths[0].parent, list(files), wanted.columns)
        return {name: np.load(files[name], allow_pickle=False) for name in wanted.columns}
    with np.load(paths[0], allow_pickle=False) as archive:
        check_columns(paths[0], list(archive.files), wanted.columns)
        return {name: archive[name] for name in wanted.columns}


def _hdf5(path: Path, wanted: Wanted) -> dict[str, NDArray[Any]]:
    import h5py

    with h5py.File(path, "r", locking="best-effort") as file:
        there: list[str] = []
        file.visititems(
            lambda name, item: there.append(name) if isinstance(item, h5py.Dataset) else None
        )
        names = {name: name.strip("/") for name in wanted.columns}
        check_columns(path, there, names.values())
        return {name: _dataset(file[inside]) for name, inside in names.items()}


def _dataset(found: Any) -> NDArray[Any]:
    import h5py

    if h5py.check_string_dtype(found.dtype) is not None:
        found = found.asstr()
    return np.asarray(found[()])


def _column(array: NDArray[Any]) -> Any:
    """As Arrow where there is a value each row, else as it is, in the machine's byte order."""
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.dtype.kind in "biufc":
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim != 1 or array.dtype.kind not in "biufUOM":
        return array
    return pa.array(array)
