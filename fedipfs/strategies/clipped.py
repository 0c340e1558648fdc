"""The sum of clipped updates, and the noise that hides what any one client adds to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fedipfs.errors import Diverged, EdgeError
from fedipfs.exchange import StoredArrays
from fedipfs.strategies.delta import delta
from fedipfs.strategies.stack import each_piece
from fedipfs.weights import Tensors, TensorSpec


class ClippedSum:
    """sum_k min(1, C / ||d_k||_2) d_k,  d_k = w_k - b_k, over the tensors `specs`, in float64.

    b_k is the model that client k was sent. Memory: two models of float32, whatever the number of
    updates, and one leaf (1 MiB) a thread. Reading an update raises BadUpdate for NaN or infinite
    values, and what reading a block raises.
    """

    def __init__(self, specs: Iterable[TensorSpec], clip_norm: float) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._clip_norm = clip_norm
        self.sums = {name: np.zeros(spec.elements) for name, spec in self._specs.items()}
        self.count = 0  # updates
        self.fitting = 0  # those not longer than C

    def add(self, update: StoredArrays, length: float) -> None:
        """Add an update of this `length`; if it cannot be read the sums are of no more use."""
        base = base_of(update).weights
        factor = self._clip_norm / max(length, self._clip_norm)

        def add(name: str, start: int) -> None:
            change = delta(update.weights, base, name, start)
            change *= factor
            self.sums[name][start : start + change.size] += change

        for _ in each_piece(update.weights, list(self._specs.values()), add):
            pass
        self.count += 1
        self.fitting += length <= self._clip_norm

    def noised_mean(
        self, base: Tensors, deviation: float, source: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """base + (sum + N(0, deviation^2 I)) / count, flat, in the dtypes of `base`.

        Gives the sums up. Raises Diverged for values beyond the range of a dtype.
        """
        values = {}
        for name, spec in self._specs.items():
            sums = self.sums.pop(name)
            values[name] = np.empty(spec.elements, spec.numpy_dtype)
            for start in base.piece_starts(spec):
                piece = base.piece(name, start).astype(np.float64)
                place = slice(start, start + piece.size)
                noised = sums[place] + source.normal(0, deviation, piece.size)
                with np.errstate(over="ignore"):
                    values[name][place] = piece + noised / self.count
                if not np.isfinite(values[name][place]).all():
                    raise Diverged(
                        f"the noised mean of tensor {name!r} is beyond the range of {spec.dtype}; "
                        "lower privacy.clip_norm or privacy.noise_multiplier"
                    )
        return values


def base_of(update: StoredArrays) -> StoredArrays:
    """The model that `update` answers."""
    if update.base is None:
        raise EdgeError("updates are clipped as they are read: run the strategy on a CidGrid")
    return update.base


def length(update: StoredArrays, specs: Sequence[TensorSpec]) -> float:
    """||d_k||_2 over the tensors `specs`: one pass."""
    base = base_of(update).weights

    def square(name: str, start: int) -> float:
        return float(np.square(delta(update.weights, base, name, start)).sum())

    return math.sqrt(math.fsum(each_piece(update.weights, specs, square)))
