"""A run's configuration, checked before anything is started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedipfs.errors import ConfigError
from fedipfs.server.checks import choice, flag, integer, is_number, number, text
from fedipfs.server.known import whole
from fedipfs.server.sections import check_attack, check_engine, check_privacy, check_secagg

# What differs between machines and does not change what is computed, and when a run ends: not part
# of the record, and free to change on resume.
_LOCAL = (
    "runs_dir",
    "run_id",
    "resume",
    "init_from",
    "store",
    "engine",
    "experiment",
    "seal",
    "unsealed_because",
    "identity",
    "keep",
    "stop",
)


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, checked: most nulls that stand for a computed default are filled in (those that
    depend on the strategy's needs by Bench.prepare).

    Raises ConfigError naming the first value that cannot be right and what to do.
    """
    from fedipfs.exchange import choose_seal  # it takes Flower along
    from fedipfs.store import is_shared
    from fedipfs.weights.compression import Spec

    config = _copy(config)
    assert isinstance(config, dict)
    whole(config)
    integer(config, "rounds", 1, optional=True)
    integer(config, "seed", 0)
    text(config, "experiment")
    text(config, "runs_dir")
    for key in ("run_id", "resume", "init_from", "seal", "unsealed_because", "identity"):
        text(config, key, optional=True)
    config["seal"] = choose_seal(
        config["seal"], shared=is_shared(config["store"]), because=config["unsealed_because"]
    )
    integer(config["keep"], "models", 1, "keep.")
    flag(config["keep"], "everything", "keep.")
    for key in ("name", "target", "metric"):
        text(config["task"], key, "task.")
    choice(config["task"], "direction", ("max", "min"), "task.")
    if not isinstance(config["task"]["options"], dict):
        raise ConfigError(f"task.options={config['task']['options']} should be {{key: value}}")
    _clients(config["clients"])
    _evaluate(config["evaluate"])
    _stop(config["stop"])
    Spec.of(config["compression"])
    check_attack(config["attack"], config["clients"]["total"])
    check_secagg(config["secagg"])
    check_privacy(config["privacy"], config["rounds"], config["train"])
    _data(config["data"])
    _train(config["train"])
    check_engine(config["engine"], cohort_size(config["clients"]) + config["clients"]["extra"])
    return config


def cohort_size(clients: Mapping[str, Any]) -> int:
    """How many of all clients train in a round."""
    per_round = clients["per_round"]
    if isinstance(per_round, float):
        return math.ceil(per_round * clients["total"] - 1e-9)
    return int(per_round)


def _clients(clients: dict[str, Any]) -> None:
    integer(clients, "total", 1, "clients.")
    if isinstance(clients["per_round"], float):
        if not 0 < clients["per_round"] < 1:
            raise ConfigError(
                f"clients.per_round={clients['per_round']} is neither a whole number nor a share "
                "between 0 and 1"
            )
    else:
        integer(clients, "per_round", 1, "clients.")
    size = cohort_size(clients)
    if size > clients["total"]:
        raise ConfigError(
            f"clients.per_round={clients['per_round']} is more than clients.total="
            f"{clients['total']}; lower the one or raise the other"
        )
    if clients["min_successes"] is None:
        clients["min_successes"] = (size + 1) // 2
    integer(clients, "min_successes", 1, "clients.")
    if clients["min_successes"] > size:
        raise ConfigError(
            f"clients.min_successes={clients['min_successes']} is more than clients.per_round="
            f"{clients['per_round']}; no round could succeed"
        )
    choice(clients, "select", ("random", "round_robin"), "clients.")
    clients["requires"] = {} if clients["requires"] is None else clients["requires"]
    _requires(clients["requires"])
    integer(clients, "extra", 0, "clients.")
    if size + clients["extra"] > clients["total"]:
        raise ConfigError(
            f"clients.extra={clients['extra']} asks for more clients than there are: "
            f"clients.per_round={clients['per_round']}, clients.total={clients['total']}"
        )
    if clients["deadline_s"] is not None:
        number(clients, "deadline_s", 1e-3, 1e9, "clients.")
    integer(clients, "exclude_after", 1, "clients.", optional=True)
    integer(clients, "rest_rounds", 1, "clients.")
    choice(clients, "clock", ("real", "simulated"), "clients.")
    number(clients, "spread", 0.0, 10.0, "clients.")


def _requires(requires: Any) -> None:
    if not isinstance(requires, Mapping):
        raise ConfigError(
            f"clients.requires={requires} should be {{what: value}}, as {{examples_min: 100}}"
        )
    for key, value in requires.items():
        if key.endswith(("_min", "_max")) and not is_number(value):
            raise ConfigError(f"clients.requires.{key}={value} should be a number")
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(f"clients.requires.{key}={value} should be a number, text or truth")


def _stop(stop: dict[str, Any]) -> None:
    for key, least, most in (
        ("wall_s", 0.0, 1e9),
        ("target", -1e299, 1e299),
        ("divergence", 1.0, 1e299),
    ):
        if stop[key] is not None:
            number(stop, key, least, most, "stop.")
    integer(stop, "patience", 1, "stop.", optional=True)
    number(stop, "min_delta", 0.0, 1e299, "stop.")


def _evaluate(evaluate: dict[str, Any]) -> None:
    for key in ("server", "federated"):
        if evaluate[key] is not None:
            flag(evaluate, key, "evaluate.")
    integer(evaluate, "every", 1, "evaluate.")
    integer(evaluate, "batch_size", 1, "evaluate.")


def _data(data: dict[str, Any]) -> None:
    text(data, "root", "data.", optional=True)
    choice(data, "partition", ("iid", "dirichlet", "shards", "pathological"), "data.")
    choice(data, "fallback", ("digits", "error"), "data.")
    number(data, "alpha", 1e-6, 1e6, "data.")
    integer(data, "shards_per_client", 1, "data.")
    integer(data, "classes_per_client", 1, "data.")
    if data["validation"] is not None:
        number(data, "validation", 0.0, 0.9, "data.")
    number(data, "held_out", 0.0, 0.9, "data.")


def _train(train: dict[str, Any]) -> None:
    integer(train, "batch_size", 1, "train.")
    integer(train, "epochs", 1, "train.", optional=train["steps"] is not None)
    integer(train, "steps", 1, "train.", optional=True)
    clip = train["clip_norm"]
    if clip is not None and not (is_number(clip) and clip > 0):
        raise ConfigError(f"train.clip_norm={clip} is not a number above 0, nor null for no limit")
    choice(train, "device", ("cpu", "cuda", "auto"), "train.")


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checked configuration that decides the result; this goes into the store.

    `rounds` is left out too: a run that is resumed for more rounds is the same run.
    """
    kept = {k: v for k, v in _copy(config).items() if k not in (*_LOCAL, "rounds")}
    kept["data"].pop("root")
    for key in ("cap", "ledger"):  # the sites' own
        kept["privacy"].pop(key, None)
    return kept


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value
