"""Federated averaging over updates that stay in the store, and its nearest kin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedipfs.exchange import StoredArrays, specs_of
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.options import not_negative


class FedAvg(StoreStrategy):
    """w_{t+1} = sum_k (n_k / sum_j n_j) w_k, over the clients k that answered round t.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", Algorithm 1. Sums in float64, in the order of node ids, one update at a time: the same
    replies give the same bits in whatever order they arrive.
    """

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        mean = Mean(specs_of(self.model).values())
        for update in updates:
            mean.add(update.arrays.weights, self._weight(update))
        return mean.store(self.model)

    def _weight(self, update: ClientUpdate) -> float:
        return update.examples


class Average(FedAvg):
    """w_{t+1} = (1 / K) sum_k w_k, over the K clients k that answered round t.

    FedAvg in which every client counts the same, however many examples it has.
    """

    def _weight(self, update: ClientUpdate) -> float:
        return 1.0


class FedProx(FedAvg):
    """FedAvg whose clients minimise F_k(w) + (mu / 2) ||w - w_t||^2 instead of F_k(w).

    Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2. With
    `proximal_mu` = 0 it is FedAvg.
    """

    def __init__(self, *args: Any, proximal_mu: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proximal_mu = not_negative("proximal_mu", proximal_mu)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["proximal-mu"] = self.proximal_mu
        return super().configure_train(server_round, arrays, config, grid)
