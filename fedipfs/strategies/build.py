"""Strategies by name: our own, and Flower's unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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
    for key in arguments:
        if key not in own:
            raise ConfigError(_unknown(f"option of strategy {name}", key, own))
    if name in _BYZANTINE:
        times, plus = _BYZANTINE[name]
        malicious = int(arguments.get("num_malicious_nodes", 0))
        if cohort.train < times * malicious + plus:
            raise ConfigError(
                f"strategy={name} with num_malicious_nodes={malicious} needs at least "
                f"{times * malicious + plus} clients a round; clients.per_round is {cohort.train}"
            )
    try:
        return cls(**common, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy={name}: {error}") from error


def _unknown(what: str, name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}{hint} Choose one of: {', '.join(known)}"
