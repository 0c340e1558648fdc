"""Updates relative to the model that they answer: differences, norms, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np

from fedipfs.exchange import check_finite
from fedipfs.strategies.stack import each_piece
from fedipfs.weights import Tensors, TensorSpec, is_float

_FAR = 1e140  # float64: a difference beyond counts as this, so that sums of squares stay finite


def float_specs(tensors: Tensors) -> list[TensorSpec]:
    """Specs of the floating-point tensors, in canonical order.

    Only these have a direction and a length; integers, such as the counters of batch
    normalisation, would drown the weights in a norm. Its running means and variances are floats,
    and count as weights do.
    """
    return [tensors.specs[name] for name in tensors.names if is_float(tensors.specs[name])]


def change(update: np.ndarray, base: np.ndarray) -> np.ndarray:
    """`update - base` in float64."""
    if update.dtype != np.float64:
        return np.subtract(update, base, dtype=np.float64)
    with np.errstate(over="ignore"):
        delta = np.subtract(update, base)
    return np.clip(delta, -_FAR, _FAR, out=delta)


def delta(update: Tensors, base: Tensors, name: str, start: int) -> np.ndarray:
    """One piece of `update - base` in float64, flat.

    Raises BadUpdate for NaN or infinite values, and what reading a block raises.
    """
    piece = update.piece(name, start)
    check_finite(piece, name)
    return change(piece, base.piece(name, start))


def moved(model: Tensors, trained: Collection[str] | None) -> tuple[list[str], list[str]]:
    """Names of the tensors that a step beyond the updates may change, and of the others.

    The first are those `trained`, or, where that is not known, all of floating point. The others
    are buffers, and what is averaged of them only: a variance is not to become negative.
    """
    if trained is None:
        trained = [spec.name for spec in float_specs(model)]
    chosen = set(trained)
    return (
        [name for name in model.names if name in chosen],
        [name for name in model.names if name not in chosen],
    )


def norm(update: Tensors, base: Tensors) -> float:
    """||update - base||_2 over the floating-point tensors: one pass; raises what `delta` does."""

    def square(name: str, start: int) -> float:
        return float(np.square(delta(update, base, name, start)).sum())

    return math.sqrt(math.fsum(each_piece(update, float_specs(update), square)))


class Derived(Tensors):
    """`update` with other values in its floating-point tensors, computed when they are asked for.

    `values(name, start)` gives one piece; it is cast to the tensor's dtype. Other tensors
    (counters, masks) are the update's own.
    """

    def __init__(self, update: Tensors, values: Callable[[str, int], np.ndarray]) -> None:
        self.specs = update.specs
        self._update, self._values = update, values

    def piece(self, name: str, start: int) -> np.ndarray:
        spec = self.specs[name]
        if not is_float(spec):
            return self._update.piece(name, start)
        with np.errstate(over="ignore"):  # an infinity is found by whoever checks the update
            return self._values(name, start).astype(spec.numpy_dtype, copy=False)


def scaled(update: Tensors, base: Tensors, factor: float) -> Derived:
    """base + factor * (update - base)."""

    def values(name: str, start: int) -> np.ndarray:
        return base.piece(name, start) + factor * delta(update, base, name, start)

    return Derived(update, values)
