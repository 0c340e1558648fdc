"""Distances between updates from one pass over them, and models that are linear in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from fedipfs.exchange import StoredArrays, check_finite, specs_of
from fedipfs.strategies.delta import change, float_specs
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.stack import each_piece
from fedipfs.weights import Tensors

_BLOCK = 8192  # columns of the updates that are multiplied at once


def gram(updates: Sequence[Tensors], model: Tensors) -> np.ndarray:
    """G[i, j] = <w_i - w, w_j - w> in float64, over the floating-point tensors: (n, n).

    From the model and not from zero, so that what all share does not cancel in distances. Memory:
    n + 1 pieces of 1 MiB a thread. Raises BadUpdate for NaN or infinite values, and what reading a
    block raises.
    """

    def product(name: str, start: int) -> np.ndarray:
        base = model.piece(name, start)
        pieces = [update.piece(name, start) for update in updates]
        for piece in pieces:
            check_finite(piece, name)
        found = np.zeros((len(pieces), len(pieces)))
        for at in range(0, base.size, _BLOCK):
            place = slice(at, at + _BLOCK)
            rows = np.stack([change(piece[place], base[place]) for piece in pieces])
            found += rows @ rows.T
        return found

    total = np.zeros((len(updates), len(updates)))
    # The pieces are shared out among threads already: with more of its own in each of them BLAS
    # takes twenty times as long. And with one, added in order, the bits are the same each time.
    with threadpool_limits(limits=1, user_api="blas"):
        for part in each_piece(model, float_specs(model), product):
            total += part
    return total


def square_distances(products: np.ndarray) -> np.ndarray:
    """||w_i - w_j||^2 from a Gram matrix: (n, n), nothing below 0, zeros on the diagonal."""
    squares = np.diagonal(products)
    found = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def combination(model: StoredArrays, terms: Iterable[tuple[Tensors, float]]) -> StoredArrays:
    """Store sum_i c_i w_i over `terms` (w_i, c_i), whose coefficients sum to 1 or any c > 0.

    One pass over those with c_i != 0; integers are rounded. Raises what Mean.add and .store raise.
    """
    mean = Mean(specs_of(model).values())
    for tensors, coefficient in terms:
        if coefficient:
            mean.add(tensors, coefficient)
    return mean.store(model)
