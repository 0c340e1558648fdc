"""Federated averaging over updates that stay in the store."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedipfs.errors import BadUpdate, EdgeError, FormatError, StoreError
from fedipfs.exchange import StoredArrays, check_update, specs_of
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.screen import parts, require, screen
from fedipfs.weights import TensorSpec

log = logging.getLogger(__name__)


class FedAvg(FlowerFedAvg):
    """w_{t+1} = sum_k (n_k / sum_j n_j) w_k, over the clients k that answered round t.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", Algorithm 1. Sums in float64, in the order of node ids, one update at a time: the same
    replies give the same bits in whatever order they arrive.

    Takes the arguments of `flwr.serverapp.strategy.FedAvg` and `min_successes`: fewer usable
    updates than that end the round with RunFailed. An update that is missing, damaged, of another
    structure than the model or not finite is left out; `excluded` maps its node id to the reason.

    Needs `CidGrid(..., read_updates=False)`: it looks at the values itself, while adding them.
    """

    screens_replies = True

    def __init__(self, *args: Any, min_successes: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.min_successes = min_successes
        self._excluded: dict[int, str] = {}
        self._model: dict[str, TensorSpec] = {}

    @property
    def excluded(self) -> dict[int, str]:
        """Node id -> reason, for the round aggregated last."""
        return self._excluded

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._model = specs_of(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        good, self._excluded = screen(replies, self.weighted_by_key)
        good = self._usable(good, read=False)
        mean = None
        try:
            mean = self._mean(good)
        except (BadUpdate, StoreError, FormatError):
            # Rare: an update proved bad after part of it was added. Read them all first.
            good = self._usable(good, read=True)
        self._report(server_round, len(good))
        arrays = (mean or self._mean(good)).store(_arrays(good[0]))
        contents = [reply.content for reply in good]
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def _usable(self, replies: list[Message], *, read: bool) -> list[Message]:
        usable = []
        for reply in replies:
            try:
                check_update(_arrays(reply), self._model, read=read)
            except BadUpdate as error:
                self._excluded[reply.metadata.src_node_id] = str(error)
            else:
                usable.append(reply)
        return usable

    def _report(self, server_round: int, good: int) -> None:
        for node, reason in self._excluded.items():
            log.warning("round %d: update of node %d left out: %s", server_round, node, reason)
        require(max(1, self.min_successes), good, self._excluded, f"round {server_round}")

    def _mean(self, replies: list[Message]) -> Mean:
        mean = Mean(list(self._model.values()))
        for reply in replies:
            _, (metrics,) = parts(reply)
            mean.add(_arrays(reply).weights, float(metrics[self.weighted_by_key]))  # type: ignore[arg-type]
        return mean


def _arrays(reply: Message) -> StoredArrays:
    (arrays,), _ = parts(reply)
    if not isinstance(arrays, StoredArrays):
        raise EdgeError("FedAvg reads updates from the store: run it on a CidGrid")
    return arrays
