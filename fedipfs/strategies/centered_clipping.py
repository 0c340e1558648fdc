"""Centered clipping: the mean of the updates, each drawn near the direction of the last round."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedipfs.exchange import StoredArrays
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.gram import combination, gram
from fedipfs.strategies.options import positive, whole
from fedipfs.strategies.rfa import distances_from


class CenteredClipping(StoreStrategy):
    """w_{t+1} = w_t + v_L, where v_0 = w_t - w_{t-1} is what the last round did (0 in the first),
    v_{i+1} = v_i + (1/K) sum_k (d_k - v_i) min(1, tau / ||d_k - v_i||) and d_k = w_k - w_t.

    `tau` is the radius, L = `iterations`. Karimireddy et al. 2021, "Learning from History for
    Byzantine Robust Optimization", equation (CC) in section 4.2. There the d_k are the clients'
    momenta; here, as in federated use, what they trained. All clients count the same. Norms are
    over floating-point tensors; others follow with the same weights, rounded.
    """

    def __init__(self, *args: Any, tau: float = 10.0, iterations: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tau = positive("tau", tau)
        self.iterations = whole("iterations", iterations, 1)
        self.before: StoredArrays | None = None  # the last round's model, and what came of it
        self.after: StoredArrays | None = None

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        model, before = self.model, self.before
        if self.after is None or self.after.cid != model.cid:
            before = None  # the run did not go on from what came of the last round
        tensors = [update.arrays.weights for update in updates]
        rows = [*tensors, *([before.weights] if before else [])]
        start = np.zeros(len(rows))
        start[len(tensors) :] = -1.0  # v_0 = -(w_{t-1} - w_t)
        weights, clipped = centered_clip(
            gram(rows, model.weights), start, len(tensors), self.tau, self.iterations
        )
        self._notes["updates"] = [
            {"node": update.node, "weight": float(weight), "clipped": bool(cut)}
            for update, weight, cut in zip(updates, weights, clipped, strict=False)
        ]
        terms = [(model.weights, 1.0 - float(weights.sum()))]
        after = combination(model, [*terms, *zip(rows, weights.tolist(), strict=True)])
        self.before, self.after = model, after
        return after


def centered_clip(
    products: np.ndarray, start: np.ndarray, count: int, tau: float, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (n,) of the result, for points with Gram matrix (n, n), from `start` (n,).

    The first `count` points are averaged; also says which of them the last step clipped: (count,).
    """
    weights = start
    factors = np.ones(count)
    for _ in range(iterations):
        distances = distances_from(products, weights)[:count]
        factors = tau / np.maximum(distances, tau)
        weights = weights * (1 - factors.mean())
        weights[:count] += factors / count
    return weights, factors < 1
