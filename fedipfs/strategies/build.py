"""Strategies by name: our own, and Flower's unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedipfs.errors import ConfigError
from fedipfs.strategies.fedavg import FedAvg

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedadagrad": flower.FedAdagrad,
    "fedavgm": flower.FedAvgM,
    "fedprox": flower.FedProx,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "qfedavg": flower.QFedAvg,
}

# Updates needed to withstand f malicious ones: Blanchard et al. 2017 (Krum), El Mhamdi et al.
# 2018 (Bulyan).
_BYZANTINE = {"krum": (2, 3), "multikrum": (2, 3), "bulyan": (4, 3)}

_RATE: tuple[Callable[[float], bool], str] = (lambda value: value > 0, "above 0")
_DECAY: tuple[Callable[[float], bool], str] = (lambda value: 0 <= value < 1, "from 0 to below 1")
_WEIGHT: tuple[Callable[[float], bool], str] = (lambda value: value >= 0, "of at least 0")
_LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "eta": _RATE,
    "eta_l": _RATE,
    "tau": _RATE,
    "beta_1": _DECAY,
    "beta_2": _DECAY,
    "server_learning_rate": _RATE,
    "server_momentum": _DECAY,
    "proximal_mu": _WEIGHT,
    "q": _WEIGHT,
    "client_learning_rate": _RATE,
    "beta": (lambda value: 0 <= value < 0.5, "from 0 to below 0.5"),
    "num_malicious_nodes": _WEIGHT,
    "num_nodes_to_select": (lambda value: value >= 1, "of at least 1"),
}
_WHOLE = ("num_malicious_nodes", "num_nodes_to_select")


class Cohort(NamedTuple):
    """How many clients there are and how many take part in a round."""

    total: int
    train: int
    evaluate: int
    min_successes: int


def build(options: Mapping[str, Any], cohort: Cohort) -> Strategy:
    """The strategy that `options` describe: its `name`, and that class's own arguments.

    Raises ConfigError for an unknown name or argument and for numbers that cannot work.
    """
    arguments = dict(options)
    name = str(arguments.pop("name", ""))
    if name not in STRATEGIES:
        raise ConfigError(_unknown("strategy", name, list(STRATEGIES)))
    cls = STRATEGIES[name]
    common: dict[str, Any] = {
        "fraction_train": cohort.train / cohort.total,
        "fraction_evaluate": cohort.evaluate / cohort.total,
        "min_train_nodes": cohort.train,
        "min_evaluate_nodes": cohort.evaluate,
        "min_available_nodes": cohort.total,
    }
    if cls is FedAvg:
        common["min_successes"] = cohort.min_successes
    known = [*inspect.signature(flower.FedAvg).parameters, *inspect.signature(cls).parameters]
    own = [n for n in known if n not in common and n not in ("args", "kwargs")]
    for key, value in arguments.items():
        if key not in own:
            raise ConfigError(_unknown(f"option of strategy {name}", key, own))
        _check_value(key, value)
    needed = required_successes(options, cohort)
    if cohort.train < needed:
        raise ConfigError(
            f"strategy={name} with num_malicious_nodes={arguments.get('num_malicious_nodes', 0)} "
            f"needs at least {needed} clients a round; clients.per_round is {cohort.train}"
        )
    if (chosen := arguments.get("num_nodes_to_select", 1)) > cohort.train:
        raise ConfigError(
            f"strategy.num_nodes_to_select={chosen} is more than clients.per_round={cohort.train}; "
            "lower the one or raise the other"
        )
    try:
        return cls(**common, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy={name}: {error}") from error


def required_successes(options: Mapping[str, Any], cohort: Cohort) -> int:
    """Good updates that a round needs: `cohort.min_successes`, or more if the strategy does.

    To withstand f malicious clients Krum and Multi-Krum need 2 f + 3 updates and Bulyan 4 f + 3,
    and clients that fail in a round do not count. Raises ConfigError for an f that cannot be.
    """
    name = str(options.get("name", ""))
    if name not in _BYZANTINE:
        return cohort.min_successes
    malicious = options.get("num_malicious_nodes", 0)
    _check_value("num_malicious_nodes", malicious)
    times, plus = _BYZANTINE[name]
    return max(cohort.min_successes, times * int(malicious) + plus)


def _check_value(key: str, value: Any) -> None:
    if key.endswith("_key"):
        if not isinstance(value, str):
            raise ConfigError(f"strategy.{key}={value} must be a text")
    elif key in _LIMITS:
        fits, words = _LIMITS[key]
        kinds, called = ((int,), "whole number") if key in _WHOLE else ((int, float), "number")
        if type(value) not in kinds or not abs(value) < 1e300 or not fits(value):
            raise ConfigError(f"strategy.{key}={value} must be a {called} {words}")
    elif value is not None and not callable(value):
        raise ConfigError(f"strategy.{key}={value} must be a function; leave it out here")


def _unknown(what: str, name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}{hint or ';'} choose one of: {', '.join(known)}"
