"""SCAFFOLD: control variates that take the clients' drift out of local training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedipfs.errors import ConfigError
from fedipfs.exchange import StoredArrays, from_numpy, specs_of, store_arrays
from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.local_sgd import check_sgd
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.options import positive
from fedipfs.tasks import Task
from fedipfs.tasks.names import trained


class Scaffold(StoreStrategy):
    """x <- x + eta_g (1/|S|) sum_i (y_i - x),  c <- c + (|S|/N) (1/|S|) sum_i (c_i+ - c_i).

    Sums are over the clients i in S that answered, N is `clients`, all there are. Client i makes
    K local steps y_i <- y_i - eta (g_i(y_i) + c - c_i) from x, and then
    c_i+ = c_i - c + (x - y_i) / (K eta), which it keeps. Karimireddy et al. 2020, "SCAFFOLD:
    Stochastic Controlled Averaging for Federated Learning", Algorithm 1 with option II. With one
    client it is SGD, and FedAvg.

    `server_learning_rate` is eta_g. Buffers (BatchNorm) have no control variate: they are
    averaged. c is an array record of its own beside the model, `control`, of the trained
    parameters; a client answers c + c_i+ - c_i in it. What a client was last heard to say,
    `taken`, tells it which of its control variates counts. Each direction carries twice FedAvg's
    bytes, and a client's own c_i is stored beside.

    Local training must be SGD without momentum; weight decay and clipped gradients are right,
    the decay being part of the objective and c_i a mean of clipped gradients.
    """

    extra_arrays: ClassVar[tuple[str, ...]] = ("control",)

    def __init__(
        self,
        *args: Any,
        clients: int,
        train: Mapping[str, Any],
        task: Task | None,
        server_learning_rate: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if task is None or clients < 1:
            raise ConfigError("strategy=scaffold needs the task and the number of all clients")
        check_sgd(train, "scaffold", momentum=False)
        self.server_learning_rate = positive("server_learning_rate", server_learning_rate)
        self.control: StoredArrays | None = None
        self.taken: dict[str, int] = {}  # node -> the last round whose control variate is in c
        self._clients, self._trained = clients, list(trained(task.model()))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if self.control is None:
            specs = specs_of(self.model)
            zeros = {name: np.zeros(specs[name].shape, specs[name].numpy_dtype)
                     for name in self._trained}  # fmt: skip
            self.control = store_arrays(self.model.vault, from_numpy(zeros))
        for message in messages:
            content = message.content.copy()
            taken = self.taken.get(str(message.metadata.dst_node_id), 0)
            content[self.configrecord_key] = ConfigRecord({**config, "control-round": taken})
            content["control"] = self.control
            message.content = content
        return messages

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        assert self.control is not None
        rate, count = self.server_learning_rate, len(updates)
        buffers = self.model.weights.specs.keys() - set(self._trained)
        model = Mean(specs_of(self.model).values())
        control = Mean(specs_of(self.control).values())
        for update in updates:
            model.add(update.arrays.weights, rate, self._trained)
            model.add(update.arrays.weights, 1.0, buffers)
            control.add(update.others["control"].weights, 1.0)
        if rate != 1:
            model.add(self.origin(updates).weights, count * (1 - rate), self._trained)
        if count < self._clients:
            control.add(self.control.weights, self._clients - count)
        combined = model.store(self.model)
        self.control = control.store(self.control)
        self.taken |= {str(each.node): each.arrays.asked or server_round for each in updates}
        return combined
