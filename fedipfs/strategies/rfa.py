"""Robust federated averaging: the geometric median of the updates."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedipfs.exchange import StoredArrays
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.gram import combination, gram
from fedipfs.strategies.options import positive, whole


class RFA(StoreStrategy):
    """w_{t+1} = argmin_v sum_k ||v - w_k||, the geometric median of the updates.

    By the smoothed Weiszfeld algorithm from v_0 = w_t:
    v_{i+1} = sum_k b_k w_k / sum_k b_k, b_k = 1 / max(nu, ||v_i - w_k||), `iterations` times.
    Pillutla et al. 2022, "Robust Aggregation for Federated Learning", Algorithm 2.

    All clients count the same, where the paper weighs them by examples: those are only what a
    client claims, and one that claims enough would be the median. Distances, over floating-point
    tensors, come from one Gram matrix, so iterations cost nothing beside the two passes over the
    updates; other tensors are averaged with the same weights and rounded.
    """

    def __init__(self, *args: Any, iterations: int = 32, nu: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.iterations = whole("iterations", iterations, 1)
        self.nu = positive("nu", nu)

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        tensors = [update.arrays.weights for update in updates]
        weights = weiszfeld(gram(tensors, self.origin(updates).weights), self.iterations, self.nu)
        self._notes["updates"] = [
            {"node": update.node, "weight": float(weight)}
            for update, weight in zip(updates, weights, strict=True)
        ]
        return combination(self.model, zip(tensors, weights.tolist(), strict=True))


def weiszfeld(products: np.ndarray, iterations: int, nu: float) -> np.ndarray:
    """Weights (n,), which sum to 1, of the geometric median of points with Gram matrix (n, n)."""
    weights = np.zeros(len(products))  # the origin
    for _ in range(iterations):
        weights = 1 / np.maximum(nu, distances_from(products, weights))
        weights /= weights.sum()
    return weights


def distances_from(products: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """||x_k - sum_j c_j x_j|| for points x with Gram matrix (n, n): (n,)."""
    inner = products @ coefficients
    return np.sqrt(np.maximum(np.diagonal(products) - 2 * inner + coefficients @ inner, 0.0))
