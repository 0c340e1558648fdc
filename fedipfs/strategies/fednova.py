"""FedNova: averages of what clients changed per step, for clients that take unlike many steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Message

from fedipfs.errors import BadUpdate, ConfigError
from fedipfs.exchange import StoredArrays, check_examples, specs_of
from fedipfs.strategies.base import ClientUpdate
from fedipfs.strategies.fedavg import FedProx
from fedipfs.strategies.local_sgd import check_sgd
from fedipfs.strategies.mean import Mean
from fedipfs.tasks import Task
from fedipfs.tasks.names import trained
from fedipfs.tasks.optim import learning_rate


class FedNova(FedProx):
    """w_{t+1} = w_t - tau_eff sum_i p_i d_i,  d_i = (w_t - y_i) / ||a_i||_1.

    p_i = n_i / sum_j n_j, tau_eff = sum_i p_i ||a_i||_1, and a_i says how much each of the tau_i
    local gradients of client i counts in w_t - y_i. Wang et al. 2020, "Tackling the Objective
    Inconsistency Problem in Heterogeneous Federated Optimization", equations 5 to 7. With equal
    tau_i it is FedAvg, with `proximal_mu` FedProx. Buffers (BatchNorm) are averaged.

    tau_i is what a client reports as `steps`. An update with a number that cannot be, or more
    than its examples make, is left out. Our own clients make just as many as the configuration
    says for their examples; one that says less than it made is believed, and counts the more (up
    to its tau_i times): it lies about its weight, as one that lies about its examples. So nothing
    of this withstands malicious clients, and no robust rule composes with it. Local training must
    be SGD, with or without momentum.
    """

    def __init__(
        self, *args: Any, train: Mapping[str, Any], task: Task | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if task is None:
            raise ConfigError("strategy=fednova needs the task")
        check_sgd(train, "fednova", momentum=True)
        if self.proximal_mu * train["optimizer"].get("lr", 1e-3) >= 1:
            raise ConfigError(
                f"strategy.proximal_mu={self.proximal_mu:g} times train.optimizer.lr is 1 or more: "
                "every step would overshoot; lower one of them"
            )
        if self.proximal_mu and train.get("clip_norm") is not None:
            raise ConfigError(
                "strategy=fednova cannot account for a proximal term that is clipped; set "
                "train.clip_norm=null or strategy.proximal_mu=0"
            )
        self._train, self._trained = train, list(trained(task.model()))

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        rate = learning_rate(self._train, server_round=server_round)
        momentum = float(self._train["optimizer"].get("momentum", 0.0))
        total = sum(update.examples for update in updates)
        shares = [update.examples / total for update in updates]
        lengths = [
            accumulated(_steps(update), momentum=momentum, pull=rate * self.proximal_mu)
            for update in updates
        ]
        effective = sum(p * a for p, a in zip(shares, lengths, strict=True))
        weights = [p * effective / a for p, a in zip(shares, lengths, strict=True)]
        buffers = self.model.weights.specs.keys() - set(self._trained)
        mean = Mean(specs_of(self.model).values())
        mean.add(self.origin(updates).weights, 1 - sum(weights), self._trained)
        for update, weight, share in zip(updates, weights, shares, strict=True):
            mean.add(update.arrays.weights, weight, self._trained)
            mean.add(update.arrays.weights, share, buffers)
        self._notes = {
            "effective_steps": effective,
            "updates": [
                {"node": update.node, "steps": _steps(update), "weight": weight}
                for update, weight in zip(updates, weights, strict=True)
            ],
        }
        return mean.store(self.model)

    def _update(self, reply: Message) -> ClientUpdate:
        update = super()._update(reply)
        examples = check_examples(update.metrics.get("num-examples"))
        most = self._train.get("steps")
        if most is None:
            most = self._train["epochs"] * math.ceil(examples / self._train["batch_size"])
        steps = update.metrics.get("steps")
        if not isinstance(steps, int | float) or not 1 <= steps <= most or steps % 1:
            raise BadUpdate(f"its steps are {steps!r}, not a whole number from 1 to {most}")
        return update


def accumulated(steps: int, *, momentum: float = 0.0, pull: float = 0.0) -> float:
    """||a||_1 after `steps` local steps: (w_0 - w) / rate if every gradient were 1.

    A step is v <- momentum v + 1 - pull x, x <- x + v, `pull` being the rate times the weight of
    the proximal term; one matrix, raised to a power. For one of the two it is in Wang et al. 2020,
    section 4.2: (steps - m (1 - m^steps) / (1 - m)) / (1 - m), and (1 - (1 - pull)^steps) / pull.
    """
    step = np.array([[1 - pull, momentum, 1.0], [-pull, momentum, 1.0], [0.0, 0.0, 1.0]])
    return float(np.linalg.matrix_power(step, steps)[0, 2])


def _steps(update: ClientUpdate) -> int:
    return int(update.metrics["steps"])  # type: ignore[arg-type]
