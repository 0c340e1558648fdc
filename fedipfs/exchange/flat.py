"""A model's floating-point tensors as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedipfs.exchange.arrays import StoredArrays, specs_of
from fedipfs.weights import TensorSpec, is_float

_PIECE = 1 << 17  # values


def flat_specs(base: StoredArrays) -> list[TensorSpec]:
    """The tensors that are in the vector, in canonical order; integers are not."""
    specs = specs_of(base)
    return [specs[name] for name in base.weights.names if is_float(specs[name])]


def flat_size(base: StoredArrays) -> int:
    """Values of the vector."""
    return sum(spec.elements for spec in flat_specs(base))


def flatten(base: StoredArrays, values: Callable[[str, TensorSpec], np.ndarray]) -> np.ndarray:
    """The vector, float32 or, if a tensor is wider, float64: `values` of each tensor."""
    specs = flat_specs(base)
    wide = any(spec.numpy_dtype.itemsize > 4 for spec in specs)
    vector = np.empty(flat_size(base), np.float64 if wide else np.float32)
    start = 0
    for spec in specs:
        vector[start : start + spec.elements] = values(spec.name, spec).reshape(-1)
        start += spec.elements
    return vector


def moved_by(base: StoredArrays, vector: np.ndarray, *, relative: bool = True) -> StoredArrays:
    """`base` with the vector added, or in its place; stored where `base` is.

    Tensors that are not in the vector stay as they are.
    """
    places, start = {}, 0
    for spec in flat_specs(base):
        places[spec.name] = slice(start, start + spec.elements)
        start += spec.elements
    specs = specs_of(base)

    def tensor(name: str) -> np.ndarray:
        values = base.weights.tensor(name)
        if name in places:
            _move(values.reshape(-1), vector[places[name]], relative)
        return values

    cid = base.vault.put_weights(specs.values(), tensor)
    return StoredArrays(base.vault, base.vault.weights(cid), list(base), base.order, base=base)


def _move(values: np.ndarray, by: np.ndarray, relative: bool) -> None:
    """Add in float64, or replace, in place: so piece by piece, without a copy of a large tensor."""
    for start in range(0, len(values), _PIECE):
        part = slice(start, start + _PIECE)
        moved = by[part].astype(np.float64)
        if relative:
            moved += values[part]
        values[part] = moved.astype(values.dtype)
