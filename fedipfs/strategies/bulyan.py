"""Bulyan: Krum's choice, then a trimmed mean around the median of each value."""

from __future__ import annotations

import numpy as np

from fedipfs.exchange import StoredArrays
from fedipfs.strategies.base import ClientUpdate
from fedipfs.strategies.krum import ByKrumScore
from fedipfs.strategies.stack import combine_columns


class Bulyan(ByKrumScore):
    """[w_{t+1}]_i = mean of the K - 4 f values [w_k]_i nearest to their median, k in S.

    S are the K - 2 f clients of lowest Krum score (see MultiKrum), f = `num_malicious_nodes`, and
    all count the same. Of two values as near, the smaller one is taken. El Mhamdi et al. 2018, "The
    Hidden Vulnerability of Distributed Learning in Byzantium", section 4; S is chosen at once, as
    Flower's Bulyan does, and not one by one.
    """

    @property
    def required(self) -> int:
        """4 f + 3 (El Mhamdi et al. 2018, section 4)."""
        return 4 * self.num_malicious_nodes + 3

    @property
    def requirement(self) -> str:
        return f"4 f + 3 with f = strategy.num_malicious_nodes = {self.num_malicious_nodes}"

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        chosen = self._select(updates, len(updates) - 2 * self.num_malicious_nodes)
        keep = len(updates) - 4 * self.num_malicious_nodes
        tensors = [update.arrays.weights for update in sorted(chosen, key=lambda u: u.node)]
        return combine_columns(self.model, tensors, lambda block: nearest_to_median(block, keep))


def nearest_to_median(values: np.ndarray, keep: int) -> np.ndarray:
    """The mean of the `keep` values of each row nearest to the row's median: (size, n) -> (size,).

    In sorted order they stand side by side. The window of them moves on from the smallest value
    as long as the one that it would take in is nearer than the one that it would leave.
    """
    ordered = np.sort(values, axis=1)
    middle = median_of_sorted(ordered)[:, None]
    left, entered = ordered[:, : ordered.shape[1] - keep], ordered[:, keep:]
    first = (middle - left > entered - middle).sum(axis=1)
    window = np.take_along_axis(ordered, first[:, None] + np.arange(keep), axis=1)
    return window.mean(axis=1, dtype=np.float64)


def median_of_sorted(ordered: np.ndarray) -> np.ndarray:
    """The median of each row of (size, n), sorted, in float64: (size,)."""
    count = ordered.shape[1]
    return ordered[:, (count - 1) // 2 : count // 2 + 1].mean(axis=1, dtype=np.float64)
