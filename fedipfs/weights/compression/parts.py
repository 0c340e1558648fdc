"""The parts of a payload: which a codec has for a model, and the file that they make up.

See docs/formats.md, "Compressed updates".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from typing_extensions import Buffer

from fedipfs.ipld import unixfs
from fedipfs.weights.base import chunks
from fedipfs.weights.compression import lossless
from fedipfs.weights.compression.dense import CODEC
from fedipfs.weights.compression.sparse import GAPS, VALUES
from fedipfs.weights.compression.spec import SPARSE, Spec
from fedipfs.weights.layout import TensorSpec, canonical, encode_header, is_float, spec_of

FORMAT = "fedipfs/update/v1"
NO_BASE = "none"
ZSTD, FRAMES, TENSOR = "zstd:", "frames:", "tensor/"

MOST_TIMES = 64  # the size of its file that a model without a base may have, beyond 1 MiB

_ENTRY = 160  # bytes that two more tensors take in a header, without their names
_SLACK = 64 << 10  # bytes of metadata


def floats(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The tensors that are compressed, in file order; others travel as they are."""
    return [spec for spec in canonical(specs) if is_float(spec)]


class Part(NamedTuple):
    """A tensor of the payload before zstd, and how many of its elements go into a frame."""

    spec: TensorSpec
    frame: int


def plan(
    spec: Spec, model: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> dict[str, Part]:
    """Every part that a payload for a model of these tensors can have, by name."""
    found = {}
    for tensor in model.values():
        piece = unixfs.CHUNK // tensor.numpy_dtype.itemsize
        if not is_float(tensor):
            found[f"raw/{tensor.name}"] = Part(tensor, piece)
        elif spec.codec in CODEC:
            for kind, part in CODEC[spec.codec].parts(tensor).items():
                packed = 2 if part.elements < tensor.elements else 1  # elements in a byte
                frame = piece // packed if kind == "values" else part.elements
                found[f"{kind}/{tensor.name}"] = Part(part, frame)
    if spec.codec in SPARSE:
        count = int(metadata["count"])
        for kind in ("gaps", "values"):
            if kind in metadata:
                found[kind] = Part(TensorSpec(kind, metadata[kind], (count,)), count)
    return {
        name: Part(part.spec._replace(name=name), max(1, part.frame))
        for name, part in found.items()
    }


def most_bytes(spec: Spec, model: Mapping[str, TensorSpec]) -> int:
    """The most that a payload for a model of these tensors may have; zstd only makes it less."""
    elements = sum(tensor.elements for tensor in model.values() if is_float(tensor))
    largest = {"count": str(spec.count(elements)), "values": VALUES[-1], "gaps": GAPS[-1]}
    parts = [part.spec for part in plan(spec, model, largest).values()]
    return len(encode_header(parts)) + sum(part.nbytes for part in parts) + _SLACK


def pack(
    spec: Spec,
    model: Mapping[str, TensorSpec],
    parts: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> list[Buffer]:
    """The file's leaves, of 1 MiB: nothing in it is ever the same in another file."""
    data = b"".join(_pack(spec, model, parts, metadata))
    if metadata["base"] == NO_BASE and inflated(model, len(data)):  # almost nothing but zeros
        data = b"".join(_pack(replace(spec, zstd=False), model, parts, metadata))
    return list(unixfs.chunk(data))


def inflated(model: Mapping[str, TensorSpec], size: int) -> bool:
    """Whether a file of `size` bytes stands for more than a stranger's may."""
    return sum(spec.nbytes for spec in model.values()) > MOST_TIMES * size + (1 << 20)


def _pack(
    spec: Spec,
    model: Mapping[str, TensorSpec],
    parts: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> Iterator[Buffer]:
    planned = plan(spec, model, metadata)
    tensors: dict[str, np.ndarray] = {}
    for name, array in parts.items():
        part = planned[name]
        tensors[name] = np.ascontiguousarray(array).reshape(part.spec.shape)
        if spec.zstd and array.size:
            size = part.frame * part.spec.numpy_dtype.itemsize
            frames = lossless.compress(tensors[name].reshape(-1).view(np.uint8).data, size)
            total = sum(map(len, frames))
            extra = 4 * len(frames) + len(name) + _ENTRY if len(frames) > 1 else len(ZSTD)
            if total + extra < part.spec.nbytes:
                del tensors[name]
                tensors[ZSTD + name] = np.frombuffer(b"".join(frames), np.uint8)
                if len(frames) > 1:
                    tensors[FRAMES + name] = np.array([len(f) for f in frames], np.uint32)
    specs = [spec_of(name, array) for name, array in tensors.items()]
    return chunks(specs, tensors.__getitem__, metadata)


def described(specs: Iterable[TensorSpec]) -> dict[str, str]:
    """Dtype and shape of each tensor as metadata, for a payload that has no base."""
    return {TENSOR + spec.name: " ".join([spec.dtype, *map(str, spec.shape)]) for spec in specs}
