"""Checks of sections whose choices have options of their own: privacy, secagg, attack, engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from fedipfs.errors import ConfigError
from fedipfs.server.checks import choice, flag, integer, number, text
from fedipfs.server.known import defaults, keys

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


def check_attack(attack: dict[str, Any], clients: int) -> None:
    """What malicious clients send; `clients` are all that there are."""
    choice(attack, "name", tuple(_ATTACKS), "attack.")
    keys(attack, {"name": None, **dict.fromkeys(_ATTACKS[attack["name"]])}, "attack.")
    if attack["name"] == "none":
        return
    integer(attack, "seed", 0, "attack.")
    number(attack, "fraction", 0.0, 1.0, "attack.")
    if not round(attack["fraction"] * clients):
        raise ConfigError(
            f"attack.fraction={attack['fraction']} of clients.total={clients} is nobody; raise it, "
            "or take attack=none"
        )
    for key in attack.keys() - {"name", "fraction", "seed"}:
        if key != "z" or attack[key] is not None:
            number(attack, key, 0.0, 1e30, "attack.")


def check_secagg(secagg: dict[str, Any]) -> None:
    """The terms of secure aggregation."""
    choice(secagg, "name", ("off", "on"), "secagg.")
    keys(secagg, defaults(f"secagg/{secagg['name']}.yaml"), "secagg.")
    if secagg["name"] == "off":
        return
    number(secagg, "clip", 1e-9, 1e9, "secagg.")
    integer(secagg, "bits", 1, "secagg.")
    integer(secagg, "threshold", 1, "secagg.", optional=True)
    integer(secagg, "examples", 0, "secagg.", optional=True)
    for key in ("colluders", "dropouts"):
        if secagg[key] is not None:
            number(secagg, key, 0.0, 0.99, "secagg.")


def check_privacy(privacy: dict[str, Any], rounds: int | None, train: Mapping[str, Any]) -> None:
    """A level of privacy, with the numbers of rounds and what training says."""
    choice(privacy, "name", tuple(_PRIVACY), "privacy.")
    level = privacy["name"]
    expected = defaults(f"privacy/{level}.yaml")
    keys(privacy, expected, "privacy.")
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
    keys(privacy["cap"], expected["cap"], "privacy.cap.")
    for key, (least, most) in {"epsilon": (1e-3, 1e3), "delta": (1e-15, 0.5)}.items():
        if privacy["cap"][key] is not None:
            number(privacy["cap"], key, least, most, "privacy.cap.")
    for key in privacy["metric_bounds"]:
        number(privacy["metric_bounds"], key, 1e-9, 1e9, "privacy.metric_bounds.")


def _within(least: float, most: float) -> Callable[[dict[str, Any], str], None]:
    return lambda section, key: number(section, key, least, most, "privacy.")


def _one_of(*choices: str) -> Callable[[dict[str, Any], str], None]:
    return lambda section, key: choice(section, key, choices, "privacy.")


def _yes_or_no(section: dict[str, Any], key: str) -> None:
    flag(section, key, "privacy.")


def _count_of(section: dict[str, Any], key: str) -> None:
    integer(section, key, 1, "privacy.")


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
        "ledger": lambda section, key: text(section, key, "privacy."),
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


def check_engine(engine: dict[str, Any], most: int) -> None:
    """What runs the clients; at most so many of them at once."""
    choice(engine, "name", ("local", "serial", "deploy"), "engine.")
    keys(engine, defaults(f"engine/{engine['name']}.yaml"), "engine.")
    if engine["name"] == "deploy":
        choice(engine, "superlink", ("managed", "running"), "engine.")
        number(engine, "timeout_s", 0.001, 1e9, "engine.")
        number(engine, "join_s", 0.0, 1e9, "engine.")
        integer(engine, "restarts", 0, "engine.")
    if engine["name"] == "local":
        if engine["workers"] is None:
            engine["workers"] = os.cpu_count() or 1
        integer(engine, "workers", 1, "engine.")
        engine["workers"] = min(engine["workers"], most)  # more would be idle
        number(engine, "timeout_s", 0.001, 1e9, "engine.")
