"""Which local training the strategies for unlike data can account for: SGD, at one rate a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedipfs.errors import ConfigError


def check_sgd(train: Mapping[str, Any], name: str, *, momentum: bool) -> None:
    """ConfigError unless `train`, the section, is SGD as strategy `name` takes it for granted.

    Momentum is right only where `momentum` says so; dampening, nesterov and maximize never are.
    """
    optimizer, schedule = train["optimizer"], train.get("schedule") or {}
    if str(optimizer.get("name")).lower() != "sgd":
        raise ConfigError(
            f"strategy={name} works with steps that are gradients times a rate: "
            f"train.optimizer.name={optimizer.get('name')} must be SGD"
        )
    refused = ("dampening", "nesterov", "maximize", *(() if momentum else ("momentum",)))
    for option in refused:
        if optimizer.get(option):
            raise ConfigError(
                f"strategy={name} does not work with train.optimizer.{option}="
                f"{optimizer[option]}: its steps are not gradients times a rate; "
                f"drop it with ~train.optimizer.{option}"
            )
    cycles = str(schedule.get("name")).lower() in ("onecyclelr", "cycliclr")
    if cycles and schedule.get("cycle_momentum", True):
        raise ConfigError(
            f"strategy={name} does not work with a momentum that changes; "
            "add +train.schedule.cycle_momentum=false"
        )
