"""Strategies by name: our own, and Flower's unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedipfs.data import Examples
from fedipfs.errors import ConfigError
from fedipfs.strategies.base import StoreStrategy
from fedipfs.strategies.best_model import BestModel
from fedipfs.strategies.bulyan import Bulyan
from fedipfs.strategies.centered_clipping import CenteredClipping
from fedipfs.strategies.ensemble import EnsembleStrategy
from fedipfs.strategies.fedavg import Average, FedAvg, FedProx
from fedipfs.strategies.fedbuff import FedBuff
from fedipfs.strategies.fednova import FedNova
from fedipfs.strategies.fedsgd import FedSGD
from fedipfs.strategies.krum import ByKrumScore, Krum, MultiKrum
from fedipfs.strategies.median import FedMedian, FedTrimmedAvg
from fedipfs.strategies.normclip import NormClip
from fedipfs.strategies.options import below, not_negative, positive
from fedipfs.strategies.personal import FedBN, FedPer
from fedipfs.strategies.rfa import RFA
from fedipfs.strategies.scaffold import Scaffold
from fedipfs.tasks import Task

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "average": Average,
    "best_model": BestModel,
    "ensemble": EnsembleStrategy,
    "fedprox": FedProx,
    "fedsgd": FedSGD,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "fedper": FedPer,
    "fedbn": FedBN,
    "fedbuff": FedBuff,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedadagrad": flower.FedAdagrad,
    "fedavgm": flower.FedAvgM,
    "krum": Krum,
    "multikrum": MultiKrum,
    "bulyan": Bulyan,
    "fedmedian": FedMedian,
    "fedtrimmedavg": FedTrimmedAvg,
    "rfa": RFA,
    "centered_clipping": CenteredClipping,
    "qfedavg": flower.QFedAvg,
}

_DECAY = partial(below, most=1)
_CHECKS: dict[str, Callable[[str, Any], float]] = {  # of the numbers that Flower's classes take
    "eta": positive,
    "eta_l": positive,
    "tau": positive,
    "beta_1": _DECAY,
    "beta_2": _DECAY,
    "server_learning_rate": positive,
    "server_momentum": _DECAY,
    "q": not_negative,
    "client_learning_rate": positive,
}

_FLOWERS = inspect.signature(flower.FedAvg).parameters  # what all strategies of Flower's take


@dataclass(frozen=True)
class Brief:
    """What a strategy is told of the run that it serves, beside its own options.

    An argument of a strategy's constructor that has the name of a field here is given its value.
    """

    per_round: int  # clients that train in a round
    min_successes: int  # good updates that a round needs
    clients: int = 0  # in all
    evaluates: bool = False  # whether clients evaluate
    seed: int = 0
    metric: str = "accuracy"  # by which models are compared
    direction: str = "max"  # max: more of it is better; min: less
    train: Mapping[str, Any] = field(default_factory=dict)  # the section of the configuration
    validation: float = 0.0  # share of its examples that each client holds out
    task: Task | None = None
    task_target: str = ""  # what names it
    task_options: Mapping[str, Any] = field(default_factory=dict)
    held_out: Examples | None = None  # examples of the coordinator's, for choices


def build(options: Mapping[str, Any], brief: Brief) -> Strategy:
    """The strategy that `options` describe: its `name`, and that class's own arguments.

    With `clip_update_norm`, which every strategy can have, it is a NormClip of that strategy.

    It asks every node that it is shown; who takes part in a round is decided elsewhere. Raises
    ConfigError for an unknown name or argument, and for what cannot be right.
    """
    arguments = dict(options)
    name = str(arguments.pop("name", ""))
    clip_update_norm = arguments.pop("clip_update_norm", None)
    if name not in STRATEGIES:
        raise ConfigError(_unknown("strategy", name, list(STRATEGIES)))
    cls = STRATEGIES[name]
    common: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": float(brief.evaluates),
        "min_train_nodes": 1,
        "min_evaluate_nodes": int(brief.evaluates),
        "min_available_nodes": 1,
    }
    accepted = parameters(cls)
    told = {key: value for key, value in vars(brief).items() if key in accepted}
    own = [key for key in accepted if key not in common and key not in told]
    for key, value in arguments.items():
        if key not in own:
            raise ConfigError(_unknown(f"option of strategy {name}", key, own))
        if not issubclass(cls, StoreStrategy) or key in _FLOWERS:
            _check_value(key, value)
    try:
        strategy = cls(**common, **told, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy={name}: {error}") from error
    if isinstance(strategy, ByKrumScore) and brief.per_round < strategy.required:
        raise ConfigError(
            f"strategy={name} needs at least {strategy.required} clients a round "
            f"({strategy.requirement}); clients.per_round is {brief.per_round}"
        )
    if brief.per_round < (needed := required_successes(strategy, brief)):
        raise ConfigError(
            f"clients.min_successes={needed} is more than clients.per_round={brief.per_round}; "
            "lower the one or raise the other"
        )
    if clip_update_norm is None:
        return strategy
    if isinstance(strategy, FedSGD):
        raise ConfigError(
            "strategy.clip_update_norm bounds how far models move, and strategy=fedsgd is answered "
            "with gradients; set train.clip_norm"
        )
    return NormClip(strategy, clip_update_norm)


def required_successes(strategy: Strategy, brief: Brief) -> int:
    """Good updates that a round needs: `brief.min_successes`, or more if the strategy does.

    Strategies that withstand f malicious clients say as `required` how many; clients that fail in
    a round do not count.
    """
    return int(getattr(strategy, "min_successes", brief.min_successes))


def parameters(cls: type[Strategy]) -> list[str]:
    """The names that a strategy's constructor takes, those that it hands on included."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            signature = inspect.signature(base).parameters
            names |= dict.fromkeys(signature)
            if "kwargs" not in signature:
                break
    return [name for name in names if name not in ("args", "kwargs")]


def _check_value(key: str, value: Any) -> None:
    if key.endswith("_key"):
        if not isinstance(value, str):
            raise ConfigError(f"strategy.{key}={value} must be a text")
    elif key in _CHECKS:
        _CHECKS[key](key, value)
    elif value is not None and not callable(value):
        raise ConfigError(f"strategy.{key}={value} must be a function; leave it out here")


def _unknown(what: str, name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}{hint or ';'} choose one of: {', '.join(known)}"
