"""A run's configuration, checked before anything is started."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from fedipfs.errors import ConfigError

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
# What every choice of a group has.
_GROUPS: dict[str, tuple[str, ...]] = {
    "task": ("name", "target", "options", "metric", "direction"),
    "strategy": ("name",),
    "store": ("kind",),
    "engine": ("name", "timeout_s"),
    "compression": ("name",),
    "attack": ("name",),
    "privacy": ("name",),
    "secagg": ("name",),
}
# The options of each attack, besides its name; see server/attack.py.
_ATTACKS: dict[str, tuple[str, ...]] = {
    "none": (),
    "gaussian": ("fraction", "seed", "std"),
    "sign_flip": ("fraction", "seed", "factor"),
    "scale": ("fraction", "seed", "factor"),
    "alie": ("fraction", "seed", "z"),
    "label_flip": ("fraction", "seed"),
    "nan": ("fraction", "seed"),
}
# Sections whose options are those of a class; conf/ need not list them all.
_OPEN = ("train.optimizer", "train.schedule", "task.options", "strategy", "store")
_MOST = 2**63 - 1  # what torch takes as a seed, and DAG-CBOR and numpy as an integer


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
    _whole(config)
    _integer(config, "rounds", 1, optional=True)
    _integer(config, "seed", 0)
    _text(config, "experiment")
    _text(config, "runs_dir")
    for key in ("run_id", "resume", "init_from", "seal", "unsealed_because", "identity"):
        _text(config, key, optional=True)
    config["seal"] = choose_seal(
        config["seal"], shared=is_shared(config["store"]), because=config["unsealed_because"]
    )
    _integer(config["keep"], "models", 1, "keep.")
    _flag(config["keep"], "everything", "keep.")
    for key in ("name", "target", "metric"):
        _text(config["task"], key, "task.")
    _choice(config["task"], "direction", ("max", "min"), "task.")
    if not isinstance(config["task"]["options"], dict):
        raise ConfigError(f"task.options={config['task']['options']} should be {{key: value}}")
    _clients(config["clients"])
    _evaluate(config["evaluate"])
    _stop(config["stop"])
    Spec.of(config["compression"])
    _attack(config["attack"], config["clients"]["total"])
    _secagg(config["secagg"])
    _privacy(config["privacy"], config["rounds"], config["train"])
    _data(config["data"])
    _train(config["train"])
    _engine(config["engine"], cohort_size(config["clients"]) + config["clients"]["extra"])
    return config


def cohort_size(clients: Mapping[str, Any]) -> int:
    """How many of all clients train in a round."""
    per_round = clients["per_round"]
    if isinstance(per_round, float):
        return math.ceil(per_round * clients["total"] - 1e-9)
    return int(per_round)


def _clients(clients: dict[str, Any]) -> None:
    _integer(clients, "total", 1, "clients.")
    if isinstance(clients["per_round"], float):
        if not 0 < clients["per_round"] < 1:
            raise ConfigError(
                f"clients.per_round={clients['per_round']} is neither a whole number nor a share "
                "between 0 and 1"
            )
    else:
        _integer(clients, "per_round", 1, "clients.")
    size = cohort_size(clients)
    if size > clients["total"]:
        raise ConfigError(
            f"clients.per_round={clients['per_round']} is more than clients.total="
            f"{clients['total']}; lower the one or raise the other"
        )
    if clients["min_successes"] is None:
        clients["min_successes"] = (size + 1) // 2
    _integer(clients, "min_successes", 1, "clients.")
    if clients["min_successes"] > size:
        raise ConfigError(
            f"clients.min_successes={clients['min_successes']} is more than clients.per_round="
            f"{clients['per_round']}; no round could succeed"
        )
    _choice(clients, "select", ("random", "round_robin"), "clients.")
    clients["requires"] = {} if clients["requires"] is None else clients["requires"]
    _requires(clients["requires"])
    _integer(clients, "extra", 0, "clients.")
    if size + clients["extra"] > clients["total"]:
        raise ConfigError(
            f"clients.extra={clients['extra']} asks for more clients than there are: "
            f"clients.per_round={clients['per_round']}, clients.total={clients['total']}"
        )
    if clients["deadline_s"] is not None:
        _number(clients, "deadline_s", 1e-3, 1e9, "clients.")
    _integer(clients, "exclude_after", 1, "clients.", optional=True)
    _integer(clients, "rest_rounds", 1, "clients.")
    _choice(clients, "clock", ("real", "simulated"), "clients.")
    _number(clients, "spread", 0.0, 10.0, "clients.")


def _requires(requires: Any) -> None:
    if not isinstance(requires, Mapping):
        raise ConfigError(
            f"clients.requires={requires} should be {{what: value}}, as {{examples_min: 100}}"
        )
    for key, value in requires.items():
        if key.endswith(("_min", "_max")) and not _is_number(value):
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
            _number(stop, key, least, most, "stop.")
    _integer(stop, "patience", 1, "stop.", optional=True)
    _number(stop, "min_delta", 0.0, 1e299, "stop.")


def _attack(attack: dict[str, Any], clients: int) -> None:
    _choice(attack, "name", tuple(_ATTACKS), "attack.")
    _keys(attack, {"name": None, **dict.fromkeys(_ATTACKS[attack["name"]])}, "attack.")
    if attack["name"] == "none":
        return
    _integer(attack, "seed", 0, "attack.")
    _number(attack, "fraction", 0.0, 1.0, "attack.")
    if not round(attack["fraction"] * clients):
        raise ConfigError(
            f"attack.fraction={attack['fraction']} of clients.total={clients} is nobody; raise it, "
            "or take attack=none"
        )
    for key in attack.keys() - {"name", "fraction", "seed"}:
        if key != "z" or attack[key] is not None:
            _number(attack, key, 0.0, 1e30, "attack.")


def _secagg(secagg: dict[str, Any]) -> None:
    _choice(secagg, "name", ("off", "on"), "secagg.")
    _keys(secagg, _defaults(f"secagg/{secagg['name']}.yaml"), "secagg.")
    if secagg["name"] == "off":
        return
    _number(secagg, "clip", 1e-9, 1e9, "secagg.")
    _integer(secagg, "bits", 1, "secagg.")
    _integer(secagg, "threshold", 1, "secagg.", optional=True)
    _integer(secagg, "examples", 0, "secagg.", optional=True)
    for key in ("colluders", "dropouts"):
        if secagg[key] is not None:
            _number(secagg, key, 0.0, 0.99, "secagg.")


def _privacy(privacy: dict[str, Any], rounds: int | None, train: Mapping[str, Any]) -> None:
    _choice(privacy, "name", tuple(_PRIVACY), "privacy.")
    level = privacy["name"]
    expected = _defaults(f"privacy/{level}.yaml")
    _keys(privacy, expected, "privacy.")
    for key, kind in _PRIVACY[level].items():
        computed = key in ("epsilon", "noise_multiplier") or expected[key] is None
        if privacy[key] is not None or not computed:
            kind(privacy, key)
    if (
        level != "none"
        and rounds is None
        and not (privacy["epsilon"] is not None and privacy["noise_multiplier"] is not None)
    ):
        raise ConfigError(
            "rounds=null is computed from privacy.epsilon and privacy.noise_multiplier; give both, "
            "or a number of rounds"
        )
    if level == "none" and rounds is None:
        raise ConfigError("rounds=null is not a whole number of at least 1")
    if level != "dp_sgd":
        return
    if train["clip_norm"] is not None:
        raise ConfigError(
            f"train.clip_norm={train['clip_norm']} bounds the gradient of a batch, and "
            "privacy=dp_sgd that of each example; leave it out and set privacy.clip_norm"
        )
    for key in ("cap", "metric_bounds"):
        if not isinstance(privacy[key], Mapping):
            raise ConfigError(f"privacy.{key}={privacy[key]} should be {{key: value}}")
    _keys(privacy["cap"], expected["cap"], "privacy.cap.")
    for key, (least, most) in {"epsilon": (1e-3, 1e3), "delta": (1e-15, 0.5)}.items():
        if privacy["cap"][key] is not None:
            _number(privacy["cap"], key, least, most, "privacy.cap.")
    for key in privacy["metric_bounds"]:
        _number(privacy["metric_bounds"], key, 1e-9, 1e9, "privacy.metric_bounds.")


def _within(least: float, most: float) -> Callable[[dict[str, Any], str], None]:
    return lambda section, key: _number(section, key, least, most, "privacy.")


def _one_of(*choices: str) -> Callable[[dict[str, Any], str], None]:
    return lambda section, key: _choice(section, key, choices, "privacy.")


def _yes_or_no(section: dict[str, Any], key: str) -> None:
    _flag(section, key, "privacy.")


def _count_of(section: dict[str, Any], key: str) -> None:
    _integer(section, key, 1, "privacy.")


# Wide, as what was computed is checked again on resume.
_EPSILON, _DELTA, _NOISE = _within(1e-9, 1e9), _within(1e-15, 0.5), _within(1e-3, 1e7)
_SHARE, _NORM = _within(1e-9, 1.0), _within(1e-9, 1e9)
# The options of each level of privacy, besides its name; those that may be null are so in conf/.
_PRIVACY: dict[str, dict[str, Callable[[dict[str, Any], str], None]]] = {
    "none": {},
    "dp_sgd": {
        "epsilon": _EPSILON,
        "noise_multiplier": _NOISE,
        "clip_norm": _NORM,
        "delta": _DELTA,
        "examples": _count_of,
        "sample_rate": _SHARE,
        "accountant": _one_of("prv", "rdp"),
        "clipping": _one_of("auto", "ghost", "hooks"),
        "physical_batch": _count_of,
        "replace_layers": _yes_or_no,
        "metrics": _one_of("withhold", "noise"),
        "metrics_noise_multiplier": _NOISE,
        "reproducible": _yes_or_no,
        "ledger": lambda section, key: _text(section, key, "privacy."),
    },
    "distributed": {
        "epsilon": _EPSILON,
        "noise_multiplier": _NOISE,
        "clip_norm": _NORM,
        "delta": _DELTA,
        "scale": _NORM,
    },
    "central": {
        "epsilon": _EPSILON,
        "noise_multiplier": _NOISE,
        "clip_norm": _NORM,
        "delta": _DELTA,
        "accountant": _one_of("prv", "rdp"),
        "adaptive": _yes_or_no,
        "target_quantile": _SHARE,
        "clip_lr": _within(1e-3, 10.0),
        "count_stddev": _NOISE,
    },
}


def _evaluate(evaluate: dict[str, Any]) -> None:
    for key in ("server", "federated"):
        if evaluate[key] is not None:
            _flag(evaluate, key, "evaluate.")
    _integer(evaluate, "every", 1, "evaluate.")
    _integer(evaluate, "batch_size", 1, "evaluate.")


def _data(data: dict[str, Any]) -> None:
    _text(data, "root", "data.", optional=True)
    _choice(data, "partition", ("iid", "dirichlet", "shards", "pathological"), "data.")
    _choice(data, "fallback", ("digits", "error"), "data.")
    _number(data, "alpha", 1e-6, 1e6, "data.")
    _integer(data, "shards_per_client", 1, "data.")
    _integer(data, "classes_per_client", 1, "data.")
    if data["validation"] is not None:
        _number(data, "validation", 0.0, 0.9, "data.")
    _number(data, "held_out", 0.0, 0.9, "data.")


def _train(train: dict[str, Any]) -> None:
    _integer(train, "batch_size", 1, "train.")
    _integer(train, "epochs", 1, "train.", optional=train["steps"] is not None)
    _integer(train, "steps", 1, "train.", optional=True)
    clip = train["clip_norm"]
    if clip is not None and not (_is_number(clip) and clip > 0):
        raise ConfigError(f"train.clip_norm={clip} is not a number above 0, nor null for no limit")
    _choice(train, "device", ("cpu", "cuda", "auto"), "train.")


def _engine(engine: dict[str, Any], most: int) -> None:
    _choice(engine, "name", ("local", "serial", "deploy"), "engine.")
    _keys(engine, _defaults(f"engine/{engine['name']}.yaml"), "engine.")
    if engine["name"] == "deploy":
        _choice(engine, "superlink", ("managed", "running"), "engine.")
        _number(engine, "timeout_s", 0.001, 1e9, "engine.")
        _number(engine, "join_s", 0.0, 1e9, "engine.")
        _integer(engine, "restarts", 0, "engine.")
    if engine["name"] == "local":
        if engine["workers"] is None:
            engine["workers"] = os.cpu_count() or 1
        _integer(engine, "workers", 1, "engine.")
        engine["workers"] = min(engine["workers"], most)  # more would be idle
        _number(engine, "timeout_s", 0.001, 1e9, "engine.")


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checked configuration that decides the result; this goes into the store.

    `rounds` is left out too: a run that is resumed for more rounds is the same run.
    """
    kept = {k: v for k, v in _copy(config).items() if k not in (*_LOCAL, "rounds")}
    kept["data"].pop("root")
    for key in ("cap", "ledger"):  # the sites' own
        kept["privacy"].pop(key, None)
    return kept


def unknown(key: str) -> str:
    """What to say of a setting, dotted, that there is not: the nearest one, or how to add it."""
    known = dict(_known())
    if known.get(key):
        return f"{key} is no setting with these choices; it comes with {known[key]}"
    parent, _, last = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    same_last = [k for k in known if k.rpartition(".")[2] == last and k != key]
    same_last.sort(key=lambda k: known[k] != "")  # those that every run has come first
    near = [beside[name] for name in get_close_matches(last, beside, n=1)] or same_last
    if not beside:
        near = near or get_close_matches(key, known, n=1)
    if near:
        remedy = f"did you mean '{near[0]}'?"
    elif parent in _OPEN:
        remedy = f"to add it as an option: +{key}=VALUE"
    else:
        remedy = "--help lists all"
    return f"unknown setting '{key}'; {remedy}"


def _known() -> Iterator[tuple[str, str]]:
    """Every setting in conf/, dotted, with a choice that has it ("" if it is always there)."""
    for group in _GROUPS:
        for file in sorted(files("fedipfs.conf").joinpath(group).iterdir(), key=lambda f: f.name):
            name = file.name.removesuffix(".yaml")
            for key in _dotted(_defaults(f"{group}/{file.name}"), f"{group}."):
                yield key, f"{group}={name}"
    for key in _dotted(_defaults()):
        yield key, ""


def _dotted(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@cache
def _defaults(name: str = "config.yaml") -> dict[str, Any]:
    """A file of conf/ as it stands, without what is Hydra's own."""
    text = files("fedipfs.conf").joinpath(name).read_text(encoding="utf-8")
    return {k: v for k, v in yaml.safe_load(text).items() if k not in ("defaults", "hydra")}


def _whole(config: Mapping[str, Any]) -> None:
    """ConfigError unless the sections and settings of conf/ are there, and no others."""
    expected = {**_defaults(), **_GROUPS}
    _keys(config, expected, "")
    for section, inside in expected.items():
        if not isinstance(inside, Mapping | tuple):
            continue
        if not isinstance(config[section], Mapping):
            raise ConfigError(
                f"{section}={config[section]} takes the place of a whole section; set what is in "
                f"it, as {section}.{next(iter(inside))}=..."
            )
        _keys(config[section], inside, f"{section}.")


def _keys(given: Mapping[str, Any], expected: Mapping[str, Any] | tuple[str, ...], at: str) -> None:
    for key in expected:
        if key not in given:
            raise ConfigError(f"the setting {at}{key} is missing; give it a value")
    for key in given if isinstance(expected, Mapping) else ():
        if key not in expected:
            raise ConfigError(unknown(at + key))


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
    if value > _MOST:
        raise ConfigError(f"{prefix}{key}={value} is too large; it must be below 2**63")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # NaN is not


def _number(section: Mapping[str, Any], key: str, least: float, most: float, prefix: str) -> None:
    value = section[key]
    if not _is_number(value) or not least <= value <= most:
        raise ConfigError(f"{prefix}{key}={value} is not a number from {least:g} to {most:g}")


def _flag(section: Mapping[str, Any], key: str, prefix: str) -> None:
    if type(section[key]) is not bool:
        raise ConfigError(f"{prefix}{key}={section[key]} is neither true nor false")


def _text(section: dict[str, Any], key: str, prefix: str = "", *, optional: bool = False) -> None:
    """Also for names that look like whole numbers, as in run_id=7."""
    value = section[key]
    if type(value) is int:
        section[key] = str(value)
    elif not (optional and value is None) and not (isinstance(value, str) and value):
        raise ConfigError(f"{prefix}{key}={value} is not a text; give one, in quotes if need be")


def _choice(section: Mapping[str, Any], key: str, choices: tuple[str, ...], prefix: str) -> None:
    if section[key] not in choices:
        raise ConfigError(f"{prefix}{key}={section[key]} is not one of {', '.join(choices)}")
