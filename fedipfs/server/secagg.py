"""Whether a run can be had under secure aggregation, and on what terms: before its first round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi, Strategy

from fedipfs.errors import ConfigError
from fedipfs.exchange.stages import lasting
from fedipfs.server.private import Masking
from fedipfs.server.secure import lasting_parameters, secure_metrics
from fedipfs.server.settings import cohort_size
from fedipfs.strategies import Average, FedAvg, FedProx
from fedipfs.strategies.fedsgd import FedSGD

_SUFFICES = (FedAvg, Average, FedProx, FedSGD, FedAdam, FedYogi, FedAdagrad, FedAvgM)
_ROOM = 4  # times the mean number of examples: up to that a client has the weight it should have


def prepare(config: Mapping[str, Any], strategy: Strategy, examples: int) -> dict[str, Any]:
    """The section `secagg` of a checked `config`, complete.

    `examples` is how many all clients have together. Raises ConfigError.
    """
    section = dict(config["secagg"])
    if section["name"] == "off":
        return section
    _refuse(config, strategy)
    alike = isinstance(strategy, Average)
    if section["examples"] is None:
        total = config["clients"]["total"]
        section["examples"] = 0 if alike else max(1, _ROOM * examples // total)
    if alike != (section["examples"] == 0):
        raise ConfigError(
            f"secagg.examples={section['examples']}: with strategy=average all clients weigh the "
            "same (0), with others by their examples (1 or more); leave it out, or choose another "
            "strategy"
        )
    return section


def announce(
    config: Mapping[str, Any], strategy: Strategy, values: int, masks: Masking | None
) -> list[str]:
    """What the user is told of the terms; `masks` as in Privacy. Raises ConfigError.

    `values` are those of an update.
    """
    if config["secagg"]["name"] == "off":
        return []
    clients = cohort_size(config["clients"])
    if masks is not None:
        found = masks(clients, values)
    else:
        found = lasting_parameters(
            config["secagg"],
            clients,
            values,
            metrics=secure_metrics(config["privacy"]["name"] != "none"),
            relative=not isinstance(strategy, FedSGD),
        )
    return [
        f"secure aggregation: {found.describe()}",
        f"partners can pin these terms: secagg-parameters={lasting(found).digest().hex()}",
    ]


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
