"""Krum and Multi-Krum: the updates that lie nearest to their neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedipfs.exchange import StoredArrays
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.gram import combination, gram, square_distances
from fedipfs.strategies.options import whole


class ByKrumScore(StoreStrategy):
    """A rule that goes by some of the updates; also only their metrics count.

    `required` is the least number of good updates that withstand `num_malicious_nodes` malicious
    ones; with fewer the round fails.
    """

    def __init__(self, *args: Any, num_malicious_nodes: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_malicious_nodes = whole("num_malicious_nodes", num_malicious_nodes, 0)
        self.min_successes = max(self.min_successes, self.required)
        self._selected: list[int] = []

    @property
    def required(self) -> int:
        """2 f + 3 (Blanchard et al. 2017, Proposition 2)."""
        return 2 * self.num_malicious_nodes + 3

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        arrays, _ = super().aggregate_train(server_round, replies)
        nodes = {reply.metadata.src_node_id: reply for reply in replies}
        contents = [nodes[node].content for node in self._selected]
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def _select(self, updates: Sequence[ClientUpdate], count: int) -> list[ClientUpdate]:
        """The `count` updates with the lowest Krum scores, the lowest first."""
        tensors = [update.arrays.weights for update in updates]
        scores = krum_scores(
            square_distances(gram(tensors, self.model.weights)), self.num_malicious_nodes
        )
        chosen = [updates[i] for i in np.argsort(scores, kind="stable")[:count]]
        self._selected = [update.node for update in chosen]
        self._notes["updates"] = [
            {"node": update.node, "score": float(score), "selected": update.node in self._selected}
            for update, score in zip(updates, scores, strict=True)
        ]
        return chosen


class MultiKrum(ByKrumScore):
    """w_{t+1} = sum_{k in S} n_k w_k / sum_{k in S} n_k, over the m clients S of lowest score.

    The score of k is the sum of ||w_k - w_j||^2 over the K - f - 2 updates j nearest to it, of K,
    where f = `num_malicious_nodes` and m = `num_nodes_to_select`. Ties go to the lower node id.
    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    section 4, weighted by examples as Flower's MultiKrum. Distances are over floating-point
    tensors; others are averaged with the same weights and rounded.
    """

    def __init__(self, *args: Any, num_nodes_to_select: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_nodes_to_select = whole("num_nodes_to_select", num_nodes_to_select, 1)

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        chosen = self._select(updates, self.num_nodes_to_select)
        return combination(self.model, [(u.arrays.weights, u.examples) for u in chosen])


class Krum(ByKrumScore):
    """w_{t+1} = w_k for the client k of lowest score; see MultiKrum with m = 1.

    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    section 3.
    """

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        (chosen,) = self._select(updates, 1)
        return combination(self.model, [(chosen.arrays.weights, 1.0)])


def krum_scores(distances: np.ndarray, malicious: int) -> np.ndarray:
    """The sum of each row's n - f - 2 smallest entries but the first, its own: (n, n) -> (n,)."""
    nearest = max(1, len(distances) - malicious - 2)
    return np.sort(distances, axis=1)[:, 1 : nearest + 1].sum(axis=1)
