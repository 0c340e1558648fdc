"""A run's configuration, checked before anything is started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fedipfs.errors import ConfigError

# What differs between machines and does not change what is computed: not part of the record.
_LOCAL = ("runs_dir", "run_id", "resume", "init_from", "store", "engine", "experiment")


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, resolved and complete: nulls that stand for a computed default are filled in.

    Raises ConfigError naming the first value that cannot be right and what to do.
    """
    config = _copy(config)
    assert isinstance(config, dict)
    clients, data, train = config["clients"], config["data"], config["train"]
    _integer(config, "rounds", 1)
    _integer(config, "seed", 0)
    _integer(clients, "total", 1, "clients.")
    _integer(clients, "per_round", 1, "clients.")
    if clients["per_round"] > clients["total"]:
        raise ConfigError(
            f"clients.per_round={clients['per_round']} is more than clients.total="
            f"{clients['total']}; lower the one or raise the other"
        )
    if clients["min_successes"] is None:
        clients["min_successes"] = (clients["per_round"] + 1) // 2
    _integer(clients, "min_successes", 1, "clients.")
    if clients["min_successes"] > clients["per_round"]:
        raise ConfigError(
            f"clients.min_successes={clients['min_successes']} is more than clients.per_round="
            f"{clients['per_round']}; no round could succeed"
        )
    _choice(data, "partition", ("iid", "dirichlet", "shards", "pathological"), "data.")
    _choice(data, "fallback", ("digits", "error"), "data.")
    if data["validation"] is None:
        data["validation"] = 0.1 if config["evaluate"]["federated"] else 0.0
    _number(data, "validation", 0.0, 0.9, "data.")
    if config["evaluate"]["federated"] and not data["validation"]:
        raise ConfigError(
            "evaluate.federated=true needs examples to evaluate on; set data.validation=0.1"
        )
    _integer(train, "batch_size", 1, "train.")
    _integer(train, "epochs", 1, "train.", optional=train["steps"] is not None)
    _integer(train, "steps", 1, "train.", optional=True)
    _choice(train, "device", ("cpu", "cuda", "auto"), "train.")
    _integer(config["evaluate"], "every", 1, "evaluate.")
    _integer(config["evaluate"], "batch_size", 1, "evaluate.")
    engine = config["engine"]
    _choice(engine, "name", ("local", "serial"), "engine.")
    if engine["name"] == "local":
        if engine["workers"] is None:
            engine["workers"] = min(os.cpu_count() or 1, clients["per_round"])
        _integer(engine, "workers", 1, "engine.")
        _number(engine, "timeout_s", 0.001, 1e9, "engine.")
    return config


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checked configuration that decides the result; this goes into the store.

    `rounds` is left out too: a run that is resumed for more rounds is the same run.
    """
    kept = {k: v for k, v in _copy(config).items() if k not in (*_LOCAL, "rounds")}
    kept["data"].pop("root")
    return kept


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _integer(
    section: Mapping[str, Any], key: str, least: int, prefix: str = "", *, optional: bool = False
) -> None:
    value = section[key]
    if optional and value is None:
        return
    if type(value) is not int or value < least:
        raise ConfigError(f"{prefix}{key}={value} is not a whole number of at least {least}")


def _number(section: Mapping[str, Any], key: str, least: float, most: float, prefix: str) -> None:
    value = section[key]
    if type(value) not in (int, float) or not least <= value <= most:
        raise ConfigError(f"{prefix}{key}={value} is not a number from {least:g} to {most:g}")


def _choice(section: Mapping[str, Any], key: str, choices: tuple[str, ...], prefix: str) -> None:
    if section[key] not in choices:
        raise ConfigError(f"{prefix}{key}={section[key]} is not one of {', '.join(choices)}")
