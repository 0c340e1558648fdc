"""The safetensors header: which tensor lies where.

The format is that of https://github.com/huggingface/safetensors: eight bytes of little-endian
header length N, N bytes of JSON padded with spaces to a multiple of eight, then the tensors'
bytes without holes. Tensors are ordered as the reference library orders them (widest dtype first,
then by name), so for equal tensors our files equal the library's byte for byte.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fedipfs.errors import WeightsError

MAX_HEADER = 4 << 20  # bytes: about 40,000 tensors; reading takes up to 25 times as much memory
_REMEMBERED = 64 << 10  # bytes of a header whose meaning is kept for the next file

# Name in the file -> NumPy dtype, in the reference library's order of precedence.
DTYPES: dict[str, np.dtype[Any]] = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODE = {dtype: code for code, dtype in DTYPES.items()}
_FLOATS = ("F64", "F32", "BF16", "F16")
_RANK = {code: rank for rank, code in enumerate(DTYPES)}


class TensorSpec(NamedTuple):
    """A tensor without its values: `dtype` is the safetensors code, such as "F32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def elements(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)


def is_float(spec: TensorSpec) -> bool:
    """Whether a tensor holds floating-point numbers, bfloat16 included."""
    return spec.dtype in _FLOATS


def code_of(dtype: np.dtype[Any], name: str) -> str:
    """The safetensors code of a dtype; WeightsError, naming tensor `name`, where there is none."""
    code = _CODE.get(dtype.newbyteorder("<"))
    if code is None:
        raise WeightsError(
            f"tensor {name!r} has dtype {dtype}, which cannot be stored; "
            f"convert it to one of {', '.join(DTYPES)}"
        )
    return code


def spec_of(name: str, array: np.ndarray) -> TensorSpec:
    """The spec of `array`; WeightsError for a dtype that safetensors has no code for."""
    return TensorSpec(name, code_of(array.dtype, name), tuple(int(n) for n in array.shape))


def canonical(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """`specs` in file order."""
    return sorted(specs, key=lambda spec: (_RANK[spec.dtype], spec.name))


def encode_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header, length prefix and padding included, of a file that holds `specs`.

    `metadata` is written first, its keys sorted; without any there is no `__metadata__`.
    """
    ordered = tuple(canonical(specs))
    if metadata:
        return _encode(ordered, metadata)
    return (_encode_again if len(ordered) <= 1000 else _encode)(ordered)


def _encode(ordered: tuple[TensorSpec, ...], metadata: Mapping[str, str] | None = None) -> bytes:
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for spec in ordered:
        if spec.name in entries or spec.name == "__metadata__":
            raise WeightsError(f"tensor name {spec.name!r} is used twice or reserved; rename it")
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise WeightsError(f"tensor name {error.object!r} is not valid Unicode") from None
    text += b" " * (-len(text) % 8)
    if 8 + len(text) > MAX_HEADER:
        raise WeightsError(
            f"{len(entries)} tensors need a safetensors header of {8 + len(text)} bytes; at most "
            f"{MAX_HEADER} can be read back: use shorter names or split the model"
        )
    return len(text).to_bytes(8, "little") + text


_encode_again = lru_cache(maxsize=4)(_encode)  # every update of a run has the same header


def header_length(prefix: bytes) -> int:
    """Length in bytes of the whole header, from a file's first eight bytes."""
    if len(prefix) < 8:
        raise WeightsError("not a safetensors file: shorter than its eight-byte prefix")
    length = 8 + int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER:
        raise WeightsError(f"safetensors header of {length} bytes; at most {MAX_HEADER} are read")
    return length


class Header(NamedTuple):
    """What a header says: specs and absolute byte offsets in file order, and its metadata."""

    entries: tuple[tuple[TensorSpec, int], ...]
    metadata: Mapping[str, str]


def decode_header(header: bytes, file_size: int) -> tuple[tuple[TensorSpec, int], ...]:
    """The entries of `read_header`."""
    return read_header(header, file_size).entries


def read_header(header: bytes, file_size: int) -> Header:
    """The header of a file of `file_size` bytes.

    Accepts any well-formed safetensors file, in any tensor order and with metadata; raises
    WeightsError for one with holes, overlaps, unknown dtypes or sizes that do not add up.
    Memory: at most 25 times the header's bytes.
    """
    read = _remembered if len(header) <= _REMEMBERED else _decode
    return read(header, file_size)


def _decode(header: bytes, file_size: int) -> Header:
    _refuse_nesting(header[8:])
    try:
        entries = json.loads(header[8:].decode(), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise WeightsError(f"safetensors header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise WeightsError("safetensors header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError("safetensors __metadata__ is not a map of strings to strings")
    found = sorted((_entry(name, entry) for name, entry in entries.items()), key=lambda f: f[1:])
    position = 0
    for spec, start, end in found:
        if start != position or end - start != spec.nbytes:
            raise WeightsError(f"tensor {spec.name!r} overlaps, leaves a hole or has a wrong size")
        position = end
    if len(header) + position != file_size:
        raise WeightsError(
            f"safetensors file has {file_size} bytes, its header says {len(header) + position}"
        )
    entries_at = tuple((spec, len(header) + start) for spec, start, _ in found)
    return Header(entries_at, MappingProxyType(metadata))


_remembered = lru_cache(maxsize=8)(_decode)  # the updates of a cohort all have the same header


def _refuse_nesting(text: bytes) -> None:
    """Count lists and objects before parsing: nested ones take 45 times their text in memory.

    A tensor's shortest entry has three in 50 bytes. What strings hold does not count.
    """
    unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = (match.group() for match in re.finditer(rb'"[^"]*"', unescaped))
    if 16 * (_openings(unescaped) - sum(map(_openings, strings))) > len(text) + 64:
        raise WeightsError("safetensors header has more lists and objects than tensors need")


def _openings(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [start, end]} if (
            code in DTYPES and all(_is_size(n) for n in (*shape, start, end)) and len(shape) <= 64
        ):
            return TensorSpec(name, code, tuple(shape)), start, end
    raise WeightsError(f"safetensors entry for {name!r} is malformed or has an unknown dtype")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table
