"""Arrays in, CID out, and back: a safetensors file whose UnixFS leaves follow its tensors.

Leaves are cut at every tensor boundary and then every 1 MiB, so a tensor that did not change is
the same blocks in every file that holds it: it is neither sent nor stored again.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import BinaryIO

import numpy as np
from typing_extensions import Buffer

from fedipfs.errors import WeightsError
from fedipfs.ipld import CID, unixfs
from fedipfs.store import Store
from fedipfs.weights.base import Tensors, chunks
from fedipfs.weights.layout import (
    decode_header,
    header_length,
    read_header,
    spec_of,
)
from fedipfs.weights.leaves import Leaves, StoredLeaves


def put(store: Store, tensors: Mapping[str, np.ndarray]) -> CID:
    """Store `tensors` (any shapes, see layout.DTYPES) as one safetensors file; returns its CID."""
    specs = [spec_of(name, array) for name, array in tensors.items()]
    return unixfs.build(chunks(specs, tensors.__getitem__), store.put)


def file_chunks(file: BinaryIO) -> Iterator[Buffer]:
    """The leaves of a safetensors file that exists, cut as `chunks` cuts them; memory: one leaf.

    For a file that `put` made, the same leaves and so the same CID. Raises WeightsError.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    header = prefix + file.read(header_length(prefix) - 8)
    entries = decode_header(header, size)
    yield from unixfs.chunk(header)
    for spec, _ in entries:
        for start in range(0, spec.nbytes, unixfs.CHUNK):
            yield file.read(min(unixfs.CHUNK, spec.nbytes - start))


class Weights(Tensors):
    """A stored safetensors file, read tensor by tensor; every block is verified as it is read.

    Opening reads the header only. Reads any layout, also files that others added to IPFS with
    fixed-size chunks. A file that declares over `max_bytes` is refused from its root block alone.
    `metadata` is the header's: strings by name, empty if there are none.
    Raises WeightsError (too large, not safetensors), UnixFSError, BlockNotFound, BlockCorrupt.
    """

    def __init__(self, store: Store, cid: CID, *, max_bytes: int | None = None) -> None:
        self._open(StoredLeaves(store, cid, max_bytes=max_bytes))

    @classmethod
    def over(cls, leaves: Leaves) -> Weights:
        """The file that consists of `leaves`, wherever they come from."""
        weights = cls.__new__(cls)
        weights._open(leaves)
        return weights

    def _open(self, leaves: Leaves) -> None:
        self.cid, self._leaves = leaves.cid, leaves
        self._starts = [0, *accumulate(leaves.sizes)][:-1]
        self.nbytes = sum(leaves.sizes)
        self._last: tuple[int, bytes] = (-1, b"")
        header = self._read(0, header_length(self._read(0, min(8, self.nbytes))))
        entries, self.metadata = read_header(header, self.nbytes)
        self._offsets = {spec.name: offset for spec, offset in entries}
        self.specs = {spec.name: spec for spec, _ in entries}

    @property
    def leaves(self) -> Leaves:
        """Where its bytes come from."""
        return self._leaves

    def tensor(self, name: str) -> np.ndarray:
        """A fresh, writable copy of one tensor."""
        spec = self.specs[name]
        flat = np.empty(spec.elements, spec.numpy_dtype)
        if spec.nbytes:
            target = flat.view(np.uint8)
            for start, piece in self._pieces(self._offsets[name], spec.nbytes):
                target[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
        return flat.reshape(spec.shape)

    def piece(self, name: str, start: int) -> np.ndarray:
        """At most 1 MiB of a tensor from element `start`: flat, read-only, without a copy."""
        size = self.specs[name].numpy_dtype.itemsize
        return self.span(name, start, start + unixfs.CHUNK // size)

    def span(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of a tensor, or to its end: flat, read-only."""
        spec = self.specs[name]
        first, last = (min(n, spec.elements) * spec.numpy_dtype.itemsize for n in (start, stop))
        return np.frombuffer(
            self._read(self._offsets[name] + first, last - first), spec.numpy_dtype
        )

    def file(self) -> Iterator[bytes]:
        """The stored bytes, in pieces."""
        for index in range(len(self._starts)):
            yield self._leaf(index)

    def _leaf(self, index: int) -> bytes:
        last = self._last  # read once: several threads may share a reader
        if last[0] == index:
            return last[1]
        return self._leaves.leaf(index)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, memoryview]]:
        """(position, bytes) pairs that cover `length` bytes from `offset`."""
        if offset + length > self.nbytes:
            raise WeightsError(f"{self.cid} ends inside its safetensors header or a tensor")
        done = 0
        while done < length:
            index = bisect_right(self._starts, offset + done) - 1
            inside = offset + done - self._starts[index]
            leaf = self._leaf(index)
            piece = memoryview(leaf)[inside : inside + length - done]
            # A leaf is kept only while part of it is still to be read.
            rest = inside + len(piece) < len(leaf)
            self._last = (index, leaf) if rest else (-1, b"")
            yield done, piece
            done += len(piece)

    def _read(self, offset: int, length: int) -> bytes:
        pieces = [piece for _, piece in self._pieces(offset, length)]
        if (
            len(pieces) == 1
            and isinstance(pieces[0].obj, bytes)
            and pieces[0].nbytes == len(pieces[0].obj)
        ):
            return pieces[0].obj  # aligned: no copy
        return b"".join(pieces)
