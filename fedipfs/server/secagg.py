"""Whether a run can be had under secure aggregation, and on what terms: before its first round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi, Strategy

from fedipfs import tasks
from fedipfs.errors import ConfigError
from fedipfs.secagg import Parameters
from fedipfs.server.settings import cohort_size
from fedipfs.strategies import Average, FedAvg, FedProx
from fedipfs.strategies.fedsgd import FedSGD

_SUFFICES = (FedAvg, Average, FedProx, FedSGD, FedAdam, FedYogi, FedAdagrad, FedAvgM)
_ROOM = 4  # times the mean number of examples: up to that a client has the weight it should have


def prepare(
    config: Mapping[str, Any], task: tasks.Task, strategy: Strategy, examples: int
) -> tuple[dict[str, Any], list[str]]:
    """The section `secagg` of a checked `config`, complete, and what the user is told.

    `examples` is how many all clients have together. Raises ConfigError.
    """
    section = dict(config["secagg"])
    if section["name"] == "off":
        return section, []
    clients = config["clients"]
    _refuse(config, strategy)
    if section["examples"] is None:
        uniform = isinstance(strategy, Average)
        section["examples"] = 0 if uniform else max(1, _ROOM * examples // clients["total"])
    chosen = ("threshold", "colluders", "dropouts", "clip", "bits")
    values = sum(each.numel() for each in task.model().parameters())
    found = Parameters.choose(cohort_size(clients), values, **{key: section[key] for key in chosen})
    return section, [f"secure aggregation: {found.describe()}"]


def _refuse(config: Mapping[str, Any], strategy: Strategy) -> None:
    name = config["strategy"]["name"]
    if type(strategy) not in _SUFFICES:
        raise ConfigError(
            f"secagg=on shows the sum of the updates alone, and strategy={name} needs each of "
            "them; choose fedavg, average, fedprox, fedsgd, fedadam, fedyogi, fedadagrad or fedavgm"
        )
    for setting, value, unset, why in (
        ("compression", config["compression"]["name"], "none", "compressed updates have no sum"),
        ("attack", config["attack"]["name"], ("none", "label_flip"), "it is made of updates"),
        ("clients.extra", config["clients"]["extra"], 0, "who is late has dropped out"),
        ("privacy", config["privacy"]["name"], ("none", "dp_sgd", "distributed"),
         "the coordinator cannot shorten what it does not see"),
        ("evaluate.federated", config["evaluate"]["federated"], False,
         "what clients measure would be seen of each"),
    ):  # fmt: skip
        if value not in (unset if isinstance(unset, tuple) else (unset,)):
            raise ConfigError(f"secagg=on does not work with {setting}={value}: {why}")
