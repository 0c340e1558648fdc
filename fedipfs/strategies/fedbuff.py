"""Asynchronous aggregation: the model moves on as soon as a few clients have answered."""

from __future__ import annotations

from typing import Any

from fedipfs.exchange import StoredArrays, specs_of
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.delta import moved
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.options import not_negative, positive, whole, within_round
from fedipfs.tasks import Task
from fedipfs.tasks.names import trained


class FedBuff(StoreStrategy):
    """w_{t+1} = w_t + eta sum_i (n_i / sum_j n_j) s(tau_i) (w_i - b_i), over a buffer of K updates.

    b_i is the model that client i began with, tau_i the number of models since then, and
    s(tau) = (1 + tau)^(-alpha) makes late updates count less. Nguyen et al. 2022, "Federated
    Learning with Buffered Asynchronous Aggregation", Algorithm 1, with clients weighted by
    examples. With K the whole cohort and eta = 1 nothing is ever late, and it is FedAvg.

    This is for what the `task` trains, without a task for all floating-point tensors. Buffers
    (BatchNorm) are averaged over the updates, by examples: their variances must not be negative.

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
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if buffer_size is None:
            buffer_size = (per_round + 1) // 2
        if max_staleness is not None:
            whole("max_staleness", max_staleness, 0)
        self.buffer_size = within_round("buffer_size", buffer_size, per_round)
        self.min_successes = min(self.min_successes, buffer_size)
        self.server_learning_rate = positive("server_learning_rate", server_learning_rate)
        self.staleness_exponent = not_negative("staleness_exponent", staleness_exponent)
        self.max_staleness = max_staleness
        self._trained = None if task is None else list(trained(task.model()))

    def is_late(self, server_round: int, asked: int) -> bool:
        """Whether an update that was asked for in round `asked` is too late for this one."""
        return self.max_staleness is not None and server_round - asked > self.max_staleness

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        total = sum(update.examples for update in updates)
        mean = Mean(specs_of(self.model).values())
        parameters, buffers = moved(self.model.weights, self._trained)
        mean.add(self.model.weights, 1.0, parameters)
        members = []
        for update in updates:
            assert update.arrays.base is not None
            late = server_round - (update.arrays.asked or server_round)
            scale = (1.0 + late) ** -self.staleness_exponent
            weight = self.server_learning_rate * scale * update.examples / total
            mean.add(update.arrays.weights, weight, parameters)
            mean.add(update.arrays.base.weights, -weight, parameters)
            mean.add(update.arrays.weights, update.examples, buffers)
            members.append({"node": update.node, "staleness": late, "weight": weight})
        self._notes = {"buffer": members}
        return mean.store(self.model)
