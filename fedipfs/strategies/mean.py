"""The weighted mean of stored updates, computed without holding them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from fedipfs.errors import Diverged
from fedipfs.exchange import StoredArrays, check_finite, to_dtype
from fedipfs.strategies.stack import each_piece
from fedipfs.weights import Tensors, TensorSpec


class Mean:
    """Accumulates sum(n_k * w_k) in float64, update by update, leaf by leaf.

    Memory: two models of float32 and one leaf (1 MiB) a thread, whatever the number of updates.
    The result does not depend on the number of threads: each coordinate belongs to one leaf, and
    the updates are added to it one after another.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._sums = {
            name: np.zeros(spec.elements, np.float64) for name, spec in self._specs.items()
        }
        self._totals = dict.fromkeys(self._specs, 0.0)

    def add(self, update: Tensors, weight: float, only: Collection[str] | None = None) -> None:
        """Add `weight` times an update that has the model's structure, or the tensors `only` of it.

        Weights may be negative (to take a base off its update) as long as their sum, for each
        tensor, is above 0.
        Raises BadUpdate for NaN or infinite values, and what reading a block raises; the sums are
        of no more use then.
        """
        specs = [spec for name, spec in self._specs.items() if only is None or name in only]

        def add(name: str, start: int) -> None:
            piece = update.piece(name, start)
            check_finite(piece, name)
            sums = self._sums[name][start : start + piece.size]
            sums += np.multiply(piece, weight, dtype=np.float64)

        for _ in each_piece(update, specs, add):
            pass
        for spec in specs:
            self._totals[spec.name] += weight

    def store(self, like: StoredArrays) -> StoredArrays:
        """Put the mean into the store of `like`, with its tensor order; gives the sums up."""
        cid = like.vault.put_weights(self._specs.values(), self.pop)
        return StoredArrays(like.vault, like.vault.weights(cid), list(like), like.order)

    def pop(self, name: str) -> np.ndarray:
        """The mean of one tensor in the model's dtype; Diverged if it overflows.

        Integers are rounded to the nearest; booleans go with the majority.
        """
        spec = self._specs[name]
        mean = self._sums.pop(name)
        mean /= self._totals[name]
        values = to_dtype(mean, spec)
        if values.dtype.kind not in "iub" and not np.isfinite(values).all():
            raise Diverged(
                f"the mean of tensor {name!r} is beyond the range of {spec.dtype}, though every "
                "update is finite; the updates diverge: lower the learning rate or clip"
            )
        return values.reshape(spec.shape)
