"""Asynchronous aggregation: the model moves on as soon as a few clients have answered."""

from __future__ import annotations

from typing import Any

from fedipfs.errors import ConfigError
from fedipfs.exchange import StoredArrays, specs_of
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.mean import Mean


class FedBuff(StoreStrategy):
    """w_{t+1} = w_t + eta sum_i (n_i / sum_j n_j) s(tau_i) (w_i - b_i), over a buffer of K updates.

    b_i is the model that client i began with, tau_i the number of models since then, and
    s(tau) = (1 + tau)^(-alpha) makes late updates count less. Nguyen et al. 2022, "Federated
    Learning with Buffered Asynchronous Aggregation", Algorithm 1, with clients weighted by
    examples. With K the whole cohort and eta = 1 nothing is ever late, and it is FedAvg.

    `buffer_size` is K, null for half of clients.per_round, which says how many clients train at a
    time; `server_learning_rate` eta; `staleness_exponent` alpha, 0.5 in the paper. A round is one
    buffer; a client takes part at most once in it. Updates over `max_staleness` models late are
    left out (null: none).
    """

    asynchronous = True

    def __init__(
        self,
        *args: Any,
        per_round: int,
        buffer_size: int | None = None,
        server_learning_rate: float = 1.0,
        staleness_exponent: float = 0.5,
        max_staleness: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if buffer_size is None:
            buffer_size = (per_round + 1) // 2
        if type(buffer_size) is not int or not 1 <= buffer_size <= per_round:
            raise ConfigError(
                f"strategy.buffer_size={buffer_size} must be a whole number from 1 to "
                f"clients.per_round={per_round}, the clients that train at a time"
            )
        for name, value in (
            ("server_learning_rate", server_learning_rate),
            ("staleness_exponent", staleness_exponent),
        ):
            if type(value) not in (int, float) or not 0 <= value < 1e6:
                raise ConfigError(f"strategy.{name}={value} must be a number of at least 0")
        if max_staleness is not None and (type(max_staleness) is not int or max_staleness < 0):
            raise ConfigError(
                f"strategy.max_staleness={max_staleness} must be a whole number, or null for any"
            )
        self.buffer_size = buffer_size
        self.min_successes = min(self.min_successes, buffer_size)
        self.server_learning_rate = float(server_learning_rate)
        self.staleness_exponent = float(staleness_exponent)
        self.max_staleness = max_staleness

    def is_late(self, server_round: int, asked: int) -> bool:
        """Whether an update that was asked for in round `asked` is too late for this one."""
        return self.max_staleness is not None and server_round - asked > self.max_staleness

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        total = sum(update.examples for update in updates)
        mean = Mean(specs_of(self.model).values())
        mean.add(self.model.weights, 1.0)
        members = []
        for update in updates:
            assert update.arrays.base is not None
            late = server_round - (update.arrays.asked or server_round)
            scale = (1.0 + late) ** -self.staleness_exponent
            weight = self.server_learning_rate * scale * update.examples / total
            mean.add(update.arrays.weights, weight)
            mean.add(update.arrays.base.weights, -weight)
            members.append({"node": update.node, "staleness": late, "weight": weight})
        self._notes = {"buffer": members}
        return mean.store(self.model)
