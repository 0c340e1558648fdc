"""Krum and Multi-Krum: the updates that lie nearest to their neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedipfs.exchange import StoredArrays, check_update, specs_of
from fedipfs.strategies.base import ClientUpdate, StoreStrategy, as_model
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

    @property
    def requirement(self) -> str:
        """Where `required` comes from, for messages."""
        return f"2 f + 3 with f = strategy.num_malicious_nodes = {self.num_malicious_nodes}"

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
            square_distances(gram(tensors, self.origin(updates).weights)), self.num_malicious_nodes
        )
        chosen = [updates[i] for i in np.argsort(scores, kind="stable")[:count]]
        self._selected = [update.node for update in chosen]
        self._notes["updates"] = [
            {"node": update.node, "score": float(score), "selected": update.node in self._selected}
            for update, score in zip(updates, scores, strict=True)
        ]
        return chosen

    def _mean(self, chosen: Sequence[ClientUpdate]) -> StoredArrays:
        """The mean by examples; of a single one itself, to the last bit of its integers."""
        if len(chosen) == 1:
            check_update(chosen[0].arrays, specs_of(self.model), read=True)
            return as_model(chosen[0].arrays, self.model.vault)
        return combination(self.model, [(u.arrays.weights, u.examples) for u in chosen])


class MultiKrum(ByKrumScore):
    """w_{t+1} = sum_{k in S} n_k w_k / sum_{k in S} n_k, over the m clients S of lowest score.

    The score of k is the sum of ||w_k - w_j||^2 over the K - f - 2 updates j nearest to it, of K,
    where f = `num_malicious_nodes` and m = `num_nodes_to_select`. Ties go to the lower node id.
    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    section 4, weighted by examples as Flower's MultiKrum. Distances are over floating-point
    tensors; others are averaged with the same weights and rounded. Of less than m + f updates some
    chosen ones could be malicious however far off they are, so the round fails.
    """

    def __init__(self, *args: Any, num_nodes_to_select: int = 1, **kwargs: Any) -> None:
        # Before the others, as `required` goes by it.
        self.num_nodes_to_select = whole("num_nodes_to_select", num_nodes_to_select, 1)
        super().__init__(*args, **kwargs)

    @property
    def required(self) -> int:
        """max(2 f + 3, m + f): there are m honest ones to choose."""
        return max(super().required, self.num_nodes_to_select + self.num_malicious_nodes)

    @property
    def requirement(self) -> str:
        return (
            f"{super().requirement}, and m + f with m = strategy.num_nodes_to_select = "
            f"{self.num_nodes_to_select}"
        )

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        return self._mean(self._select(updates, self.num_nodes_to_select))


class Krum(ByKrumScore):
    """w_{t+1} = w_k, as it is, for the client k of lowest score; see MultiKrum with m = 1.

    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    section 3.
    """

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        return self._mean(self._select(updates, 1))


def krum_scores(distances: np.ndarray, malicious: int) -> np.ndarray:
    """The sum of each row's n - f - 2 smallest entries but the first, its own: (n, n) -> (n,)."""
    nearest = max(1, len(distances) - malicious - 2)
    return np.sort(distances, axis=1)[:, 1 : nearest + 1].sum(axis=1)
