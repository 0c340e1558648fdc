"""Named tensors that are read piece by piece, wherever their values come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np
from typing_extensions import Buffer

from fedipfs.errors import WeightsError
from fedipfs.ipld import unixfs
from fedipfs.weights.layout import TensorSpec, canonical, encode_header


def chunks(
    specs: Iterable[TensorSpec],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Buffer]:
    """The leaves of a safetensors file in order: the header, then every tensor, cut every 1 MiB.

    Each tensor is asked for only when its turn comes: memory is that of one tensor.
    """
    ordered = canonical(specs)
    yield from unixfs.chunk(encode_header(ordered, metadata))
    for spec in ordered:
        array = np.ascontiguousarray(tensor(spec.name), dtype=spec.numpy_dtype)
        if array.nbytes != spec.nbytes:
            raise WeightsError(f"tensor {spec.name!r} has not the size its spec {spec} says")
        if array.size:
            yield from unixfs.chunk(array.reshape(-1).view(np.uint8).data)


class Tensors(ABC):
    """What can be added up, compared and stored without being held: tensors in pieces of 1 MiB.

    `specs` gives each tensor's dtype and shape by name. Several threads may read at once.
    """

    specs: dict[str, TensorSpec]

    @abstractmethod
    def piece(self, name: str, start: int) -> np.ndarray:
        """At most 1 MiB of a tensor from element `start`, one of `piece_starts`: flat, read-only.

        Raises what reading and decoding raise.
        """

    @cached_property
    def names(self) -> list[str]:
        """Tensor names in canonical order."""
        return [spec.name for spec in canonical(self.specs.values())]

    def tensor(self, name: str) -> np.ndarray:
        """A fresh, writable copy of one tensor."""
        spec = self.specs[name]
        flat = np.empty(spec.elements, spec.numpy_dtype)
        for start in self.piece_starts(spec):
            piece = self.piece(name, start)
            flat[start : start + piece.size] = piece
        return flat.reshape(spec.shape)

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors, in canonical order."""
        return {name: self.tensor(name) for name in self.names}

    def piece_starts(self, spec: TensorSpec) -> range:
        """Index of the first element of each piece of a tensor."""
        return range(0, spec.elements, unixfs.CHUNK // spec.numpy_dtype.itemsize)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """One tensor piece by piece, in order."""
        return (self.piece(name, start) for start in self.piece_starts(self.specs[name]))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the safetensors file that holds these tensors."""
        return len(encode_header(self.specs.values())) + sum(s.nbytes for s in self.specs.values())

    def file(self) -> Iterator[Buffer]:
        """That file's bytes, in pieces."""
        return chunks(self.specs.values(), self.tensor)
