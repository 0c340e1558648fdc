"""Centered clipping: the mean of the updates, each drawn near the direction of the last round."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedipfs.exchange import StoredArrays, specs_of
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.delta import moved
from fedipfs.strategies.gram import gram
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.options import positive, whole
from fedipfs.strategies.rfa import distances_from
from fedipfs.tasks import Task
from fedipfs.tasks.names import trained


class CenteredClipping(StoreStrategy):
    """w_{t+1} = w_t + v_L, where v_0 = w_t - w_{t-1} is what the last round did (0 in the first),
    v_{i+1} = v_i + (1/K) sum_k (d_k - v_i) min(1, tau / ||d_k - v_i||) and d_k = w_k - w_t.

    `tau` is the radius, L = `iterations`. Karimireddy et al. 2021, "Learning from History for
    Byzantine Robust Optimization", equation (CC) in section 4.2. There the d_k are the clients'
    momenta; here, as in federated use, what they trained. All clients count the same. Norms are
    over floating-point tensors.

    This is for what the `task` trains, without a task for all floating-point tensors. Buffers
    (BatchNorm) are a mean of the updates alone, with the weights that these have in v_L, which
    are above 0: to go on where v_0 went could make a variance negative.
    """

    def __init__(
        self,
        *args: Any,
        tau: float = 10.0,
        iterations: int = 5,
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._trained = None if task is None else list(trained(task.model()))
        self.tau = positive("tau", tau)
        self.iterations = whole("iterations", iterations, 1)
        self.before: StoredArrays | None = None  # w_t of the last round, and what came of it
        self.after: StoredArrays | None = None

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        origin, before = self.origin(updates), self.before
        if self.after is None or self.after.cid != self.model.cid:
            before = None  # the run did not go on from what came of the last round
        tensors = [update.arrays.weights for update in updates]
        rows = [*tensors, *([before.weights] if before else [])]
        start = np.zeros(len(rows))
        start[len(tensors) :] = -1.0  # v_0 = -(w_{t-1} - w_t)
        weights, clipped = centered_clip(
            gram(rows, origin.weights), start, len(tensors), self.tau, self.iterations
        )
        self._notes["updates"] = [
            {"node": update.node, "weight": float(weight), "clipped": bool(cut)}
            for update, weight, cut in zip(updates, weights, clipped, strict=False)
        ]
        parameters, buffers = moved(self.model.weights, self._trained)
        mean = Mean(specs_of(self.model).values())
        mean.add(origin.weights, 1.0 - float(weights.sum()), parameters)
        for row, weight in zip(rows, weights.tolist(), strict=True):
            if weight:  # that of w_{t-1} is often 0
                mean.add(row, weight, parameters)
        for update, weight in zip(tensors, weights.tolist(), strict=False):
            mean.add(update, weight, buffers)
        self.before, self.after = origin, mean.store(self.model)
        return self.after


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
