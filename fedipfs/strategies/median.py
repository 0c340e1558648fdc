"""Rules that combine every value by itself: the median and the trimmed mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedipfs.exchange import StoredArrays
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.bulyan import median_of_sorted
from fedipfs.strategies.options import below
from fedipfs.strategies.stack import combine_columns


class FedMedian(StoreStrategy):
    """[w_{t+1}]_i = median_k [w_k]_i for every value i; all clients count the same.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    Algorithm 1, option I. Integers are rounded to the nearest, booleans go with the majority.
    """

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        tensors = [update.arrays.weights for update in updates]
        return combine_columns(
            self.model, tensors, lambda block: median_of_sorted(np.sort(block, axis=1))
        )


class FedTrimmedAvg(StoreStrategy):
    """[w_{t+1}]_i = mean of the K values [w_k]_i without the c smallest and the c largest.

    c = floor(beta K); all clients count the same. Yin et al. 2018, "Byzantine-Robust Distributed
    Learning: Towards Optimal Statistical Rates", Algorithm 1, option II. Integers are rounded to
    the nearest, booleans go with the majority.
    """

    def __init__(self, *args: Any, beta: float = 0.2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = below("beta", beta, 0.5)

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        tensors = [update.arrays.weights for update in updates]
        cut = int(self.beta * len(tensors))
        self._notes["cut_each_side"] = cut

        def mean(block: np.ndarray) -> np.ndarray:
            kept = np.sort(block, axis=1)[:, cut : len(tensors) - cut]
            return kept.mean(axis=1, dtype=np.float64)

        return combine_columns(self.model, tensors, mean)
