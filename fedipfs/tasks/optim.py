"""Optimizers and learning-rate schedules of `torch.optim`, by name, from configuration."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from fedipfs.errors import ConfigError


def optimizer(parameters: Iterable[torch.nn.Parameter], spec: Mapping[str, Any]) -> Optimizer:
    """The `torch.optim` class that `spec["name"]` names (in any case), given the other entries.

    Raises ConfigError for a name that is unknown, and for options that it does not take.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ConfigError("the task's model has no trainable parameters; unfreeze some")
    return _make("train.optimizer", _optimizers(), spec, trained)


def apply_schedule(
    optimizer: Optimizer, spec: Mapping[str, Any] | None, *, server_round: int
) -> None:
    """Set the learning rate that the schedule has reached in `server_round`, counted from 1.

    Schedules step once a round, so round 1 has the optimizer's own rate (or the warm-up's).
    Nothing is kept between rounds: the schedule is walked from its beginning, so a client that
    takes part for the first time in round 50 has the rate of round 50.
    """
    if spec is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() before optimizer.step()", which is meant here
        schedule = _make("train.schedule", _schedules(), spec, optimizer)
        try:
            for _ in range(server_round - 1):
                schedule.step()
        except Exception as error:  # it needs a metric, is past its last step, ...
            raise ConfigError(
                f"train.schedule.name={spec['name']} cannot reach round {server_round}"
                f" ({_line(error)}); choose another schedule or change its options"
            ) from error


def check(train: Mapping[str, Any]) -> None:
    """ConfigError if `train.optimizer` or `train.schedule` names no class or no option of it.

    Nothing is made (torch takes a second for its first optimizer), so an option's value is
    looked at only when a client trains.
    """
    for key, known in (("optimizer", _optimizers()), ("schedule", _schedules())):
        spec = train[key]
        if spec is None and key == "schedule":
            continue
        cls, options = _find(f"train.{key}", known, spec)
        try:
            inspect.signature(cls).bind(None, **options)
        except TypeError as error:
            raise _refused(f"train.{key}", cls, options, error) from None


def _make(key: str, known: Mapping[str, Any], spec: Mapping[str, Any], first: Any) -> Any:
    cls, options = _find(key, known, spec)
    try:
        return cls(first, **options)
    except Exception as error:  # whatever torch makes of the user's options
        raise _refused(key, cls, options, error) from error


def _find(key: str, known: Mapping[str, Any], spec: Any) -> tuple[Any, dict[str, Any]]:
    """The class that `spec` names, and its options."""
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{key}={spec} must have a name, as {key}.name=...")
    options = dict(spec)
    name = options.pop("name", None)
    cls = known.get(str(name).lower())
    if cls is None:
        near = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
        names = sorted(found.__name__ for found in (known[one] for one in near or known))
        raise ConfigError(f"{key}.name={name} is unknown; choose {', '.join(names)}")
    return cls, options


def _refused(key: str, cls: Any, options: Mapping[str, Any], error: Exception) -> ConfigError:
    given = ", ".join(f"{option}={value}" for option, value in options.items())
    return ConfigError(
        f"{key}.name={cls.__name__} does not work with {given or 'no options'}"
        f" ({_line(error)}); correct {key}, and drop an option with ~{key}.OPTION"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@cache
def _optimizers() -> dict[str, Any]:
    """Those that need dense gradients and no more: LBFGS calls the loss itself."""
    found = _subclasses(torch.optim, Optimizer)
    return {name: found[name] for name in found if name not in ("lbfgs", "sparseadam")}


@cache
def _schedules() -> dict[str, Any]:
    return _subclasses(lr_scheduler, lr_scheduler.LRScheduler)


def _subclasses(module: Any, base: type) -> dict[str, Any]:
    return {
        name.lower(): cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, base) and cls is not base
        if not name.startswith("_")
    }
