"""Personalisation: layers that stay at the client, while the others are averaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedipfs.errors import ConfigError
from fedipfs.exchange import StoredArrays, specs_of
from fedipfs.exchange.heart import MAX_VALUE
from fedipfs.strategies.base import ClientUpdate
from fedipfs.strategies.fedavg import FedAvg
from fedipfs.strategies.mean import Mean
from fedipfs.tasks import Task
from fedipfs.tasks.names import batch_norms, matching, split_by, trained


class Personalised(FedAvg):
    """FedAvg of the shared tensors; each client has personal ones of its own, v_k, beside them.

    Client k trains (w, v_k) together, keeps v_k, and answers with those personal tensors that
    came in. These stay as the first model had them, and are what a client begins with; whatever
    an update says of them is not read. Clients evaluate with their own, so only federated
    evaluation tells how good the models are that people use.
    """

    needs_federated_evaluation = True

    def keep_personal(self, task: Task | None, name: str, patterns: list[str]) -> None:
        """Set what stays at the clients, for strategy `name`; ConfigError if it cannot be."""
        if task is None:
            raise ConfigError(f"strategy={name} needs the task")
        model = task.model()
        names = list(model.state_dict())
        for pattern in patterns:
            if not matching(names, [pattern]):
                raise ConfigError(
                    f"strategy.personal has {pattern!r}, which matches no tensor of the model; "
                    f"its tensors are {', '.join(names)[:300]}"
                )
        personal = matching(names, patterns)
        if tied := split_by(model, patterns):
            raise ConfigError(
                f"strategy={name} would keep {tied[0]!r} at the clients, and it is shared as "
                f"{tied[1]!r}: the weights are tied; name both, or neither"
            )
        if trained(model).keys() <= set(personal):
            raise ConfigError(
                f"strategy={name} would keep all that is trained at the clients ({patterns}), and "
                "nothing would be learnt together; name fewer layers"
            )
        if sum(len(pattern.encode()) for pattern in patterns) > MAX_VALUE:
            raise ConfigError(
                f"strategy={name}: the patterns have more than {MAX_VALUE} bytes, which is all "
                "that a message can carry; use strategy=fedper with strategy.personal=[...]"
            )
        self._patterns = patterns
        self._shared = set(names) - set(personal)
        self._personal = set(personal)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["personal"] = self._patterns
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["personal"] = self._patterns
        return super().configure_evaluate(server_round, arrays, config, grid)

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        mean = Mean(specs_of(self.model).values())
        mean.add(self.model.weights, 1.0, self._personal)
        for update in updates:
            mean.add(update.arrays.weights, self._weight(update), self._shared)
        return mean.store(self.model)


class FedPer(Personalised):
    """w_{t+1} = sum_k (n_k / sum_j n_j) w_k over the shared layers; the personal ones stay.

    Arivazhagan et al. 2019, "Federated Learning with Personalization Layers", Algorithms 1 and 2.
    `personal` are patterns of names in the model's state_dict, as the shell's: `6.*`, `head.*`.
    """

    def __init__(self, *args: Any, task: Task | None, personal: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        texts = isinstance(personal, list) and all(isinstance(each, str) for each in personal)
        if not texts or not personal:
            raise ConfigError(
                f"strategy.personal={personal} must be a list of patterns, as ['6.*'], of the "
                "tensors that stay at the client"
            )
        self.keep_personal(task, "fedper", personal)


class FedBN(Personalised):
    """w_{t+1} = sum_k (n_k / sum_j n_j) w_k over all layers but BatchNorm, which stays local.

    Li et al. 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
    Algorithm 1: for clients whose inputs differ (another scanner, another lighting). Weights and
    statistics of the layers both stay.
    """

    def __init__(self, *args: Any, task: Task | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        patterns = batch_norms(task.model()) if task is not None else []
        if task is not None and not patterns:
            raise ConfigError(
                "strategy=fedbn needs a model with BatchNorm layers, and the task's has none; add "
                "some (+task.options.norm=true for mnist and digits) or use strategy=fedper"
            )
        self.keep_personal(task, "fedbn", patterns)
