"""The same piece of many updates at once, for rules that look at each value across clients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from fedipfs.errors import Diverged
from fedipfs.exchange import StoredArrays, check_finite, specs_of, to_dtype
from fedipfs.weights import Tensors, TensorSpec, is_float

_BLOCK = 4096  # columns: with a hundred updates in float64 they stay in the processor's cache
_INLINE = 1 << 20  # bytes: for a smaller model threads cost more than they bring

T = TypeVar("T")


def each_piece(
    model: Tensors, specs: Sequence[TensorSpec], work: Callable[[str, int], T]
) -> Iterator[T]:
    """`work(name, start)` for every piece of the tensors `specs`, in order, by a few threads."""
    places = [(spec.name, start) for spec in specs for start in model.piece_starts(spec)]
    if sum(spec.nbytes for spec in specs) <= _INLINE:
        yield from (work(*place) for place in places)
    else:
        # Hashing, sorting and reading release the GIL.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            yield from pool.map(lambda place: work(*place), places)


def columns(
    updates: Sequence[Tensors], name: str, start: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """One piece of a tensor in all n updates: (where in the piece, (size, n) array) by blocks.

    Values have the tensor's dtype, in float64 if that is no float32. Memory: n pieces of 1 MiB.
    Raises BadUpdate for NaN or infinite values, and what reading a block raises.
    """
    pieces = [update.piece(name, start) for update in updates]
    for piece in pieces:
        check_finite(piece, name)
    dtype = np.float32 if pieces[0].dtype == np.float32 else np.float64
    for at in range(0, pieces[0].size, _BLOCK):
        place = slice(at, at + _BLOCK)
        block = np.empty((pieces[0][place].size, len(pieces)), dtype)
        for index, piece in enumerate(pieces):
            block[:, index] = piece[place]
        yield place, block


def combine_columns(
    model: StoredArrays, updates: Sequence[Tensors], rule: Callable[[np.ndarray], np.ndarray]
) -> StoredArrays:
    """Store the model whose values are `rule` of the updates' values, (size, n) -> (size,).

    Integers are rounded to the nearest, booleans go with the majority. Memory: one tensor, and n
    pieces of 1 MiB a thread, whatever the model. Raises what `columns` raises, and Diverged for
    values beyond the range of the model's dtype.
    """
    specs = specs_of(model)

    def tensor(name: str) -> np.ndarray:
        spec = specs[name]
        flat = np.empty(spec.elements, spec.numpy_dtype)

        def fill(name: str, start: int) -> None:
            for place, block in columns(updates, name, start):
                with np.errstate(over="ignore"):
                    values = to_dtype(rule(block), spec)
                if is_float(spec) and not np.isfinite(values).all():
                    raise Diverged(
                        f"the combined values of tensor {name!r} are beyond the range of "
                        f"{spec.dtype}, though every update is finite; lower the learning rate"
                    )
                flat[start + place.start :][: values.size] = values

        for _ in each_piece(model.weights, [spec], fill):
            pass
        return flat.reshape(spec.shape)

    cid = model.vault.put_weights(specs.values(), tensor)
    return StoredArrays(model.vault, model.vault.weights(cid), list(model), model.order)
