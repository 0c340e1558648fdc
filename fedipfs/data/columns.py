"""A column of a file, an Arrow array or a NumPy array, as the numbers or labels that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fedipfs.data.base import Labels
from fedipfs.data.blocks import listed

_YAML_TRUTH = ("yes", "no", "on", "off", "true", "false")


class BadValue(Exception):
    """A value that cannot be used: the number of its row in the column, and what it is."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def plain(column: Any) -> Any:
    """An Arrow column as one array without dictionary or extension; others as they are."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return column


def values(column: Any) -> NDArray[Any]:
    """The numbers in a column (N, ...); float64 as float32. Raises BadValue."""
    array = plain(column)
    if not isinstance(array, np.ndarray):
        array = _unpacked(array)
    if array.dtype.kind not in "biuf":
        raise BadValue(0, f"holds {array.dtype}, not numbers")
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32) if array.dtype.itemsize > 4 else array
    if not np.isfinite(narrow).all():
        where = np.argwhere(~np.isfinite(narrow))[0]
        value = float(array[tuple(where)])
        if np.isnan(value):
            _missing(int(where[0]))
        what = "is infinite" if np.isinf(value) else f"is {value:g}, too large for float32"
        raise BadValue(int(where[0]), what)
    return narrow


def numbers(column: Any) -> NDArray[np.float32]:
    """The numbers in a column of one each row, (N,). Raises BadValue."""
    array = values(column)
    if array.ndim != 1:
        raise BadValue(0, f"holds arrays of shape {array.shape[1:]}; name it alone in data.inputs")
    return array.astype(np.float32, copy=False)


def texts(column: Any) -> Any:
    """A column as an Arrow array of text, null where there is none: "3" for 3, "true" for True."""
    array = _one_each(column)
    if pa.types.is_null(array.type):
        return array.cast(pa.string())
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), None, array)
        whole = pc.all(pc.equal(pc.floor(array), array)).as_py()
        array = array.cast(pa.int64()) if whole is not False else array
    try:
        return array.cast(pa.string())
    except pa.ArrowException:
        raise BadValue(0, f"holds {array.type}, neither text nor numbers") from None


def labels(column: Any, classes: Sequence[str] | None) -> Labels:
    """(N,) int64: a label's place in `classes`, or the whole number that it is. Raises BadValue."""
    if classes is not None:
        names = texts(column)
        found = pc.index_in(names, value_set=pa.array(classes, pa.string()))
        if found.null_count:
            row = _first(pc.is_null(found))
            name = names[row].as_py()
            if name is None:
                raise BadValue(row, "has no label")
            hint = ""
            if {"true", "false"} & set(classes) and name.lower() in _YAML_TRUTH:
                hint = f"; write {name!r} in quotes there, YAML takes it for true or false"
            raise BadValue(row, f"{name!r:.80} is not in data.classes ({listed(classes)}){hint}")
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)
    array = _one_each(column)
    if array.null_count:
        raise BadValue(_first(pc.is_null(array)), "has no label")
    if pa.types.is_floating(array.type):
        floats = array.to_numpy(zero_copy_only=False)
        odd = ~(np.floor(floats) == floats) | (np.abs(floats) >= 2.0**53)
        if odd.any():
            row = int(np.argmax(odd))
            raise BadValue(row, f"{floats[row]:g} is not a whole number")
    elif not (pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
        what = f"{array[0].as_py()!r:.80} is no whole number" if len(array) else "is no number"
        raise BadValue(0, f"{what}; name the labels in data.classes, as [benign, malignant]")
    whole: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    if len(whole) and int(whole.min()) < 0:
        row = int(np.argmin(whole))
        raise BadValue(row, f"{int(whole[row])} is less than 0; labels count from 0")
    if len(whole) and int(whole.max()) >= 2**63:
        raise BadValue(int(np.argmax(whole)), "is too large for a label")
    return whole.astype(np.int64)


def among(column: Any, names: Sequence[str]) -> NDArray[np.bool_]:
    """(N,): whether what a row has, as text, is one of `names`. Raises BadValue."""
    found = pc.is_in(texts(column), value_set=pa.array(names, pa.string()))
    return np.asarray(found.to_numpy(zero_copy_only=False), np.bool_)


def take(column: Any, rows: NDArray[np.int64]) -> Any:
    """The column at `rows`, which are in order."""
    if len(rows) == len(column):
        return column
    return column[rows] if isinstance(column, np.ndarray) else column.take(pa.array(rows))


def _one_each(column: Any) -> Any:
    """An Arrow array of a value each row."""
    array = plain(column)
    if isinstance(array, np.ndarray):
        if array.ndim != 2 or array.shape[1] != 1:
            raise BadValue(0, f"holds {array.dtype} of shape {array.shape[1:]}, not one label each")
        array = pa.array(array[:, 0])
    return array


def _unpacked(array: Any) -> NDArray[Any]:
    kind, types = array.type, pa.types
    if len(array) and array.null_count:
        _missing(_first(pc.is_null(array)))
    if types.is_null(kind):
        return np.empty(0, np.float32)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _of_lists(array)
    if types.is_decimal(kind):
        array = array.cast(pa.float64())
    elif types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        row = next((i for i, each in enumerate(array) if not _is_number(each.as_py())), 0)
        text = array[row].as_py() if len(array) else ""
        hint = " (a decimal comma? write a point)" if _is_number(text.replace(",", ".")) else ""
        raise BadValue(row, f"{text!r:.80} is text, not a number{hint}")
    elif not (types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)):
        raise BadValue(0, f"holds {kind}, not numbers")
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _of_lists(array: Any) -> NDArray[Any]:
    """Lists of equal length, of whatever depth, as an array."""
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    if not len(lengths):
        return np.empty((0, 0), np.float32)
    length = int(lengths[0])
    if (lengths != length).any():
        row = int(np.argmax(lengths != length))
        raise BadValue(row, f"has {lengths[row]} values, and the row before it {length}")
    if length == 0:
        raise BadValue(0, "is an empty list")
    try:
        inner = values(array.flatten())
    except BadValue as error:
        raise BadValue(error.row // length, str(error)) from None
    return inner.reshape(len(lengths), length, *inner.shape[1:])


def _missing(row: int) -> None:
    raise BadValue(row, "is missing; fill it in, or leave such rows out: `... is not None`")


def _first(flags: Any) -> int:
    return int(np.argmax(flags.to_numpy(zero_copy_only=False)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
