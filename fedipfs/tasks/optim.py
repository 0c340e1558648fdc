"""Optimizers and learning-rate schedules of `torch.optim`, by name, from configuration."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from fedipfs.errors import ConfigError

# What torch itself demands of numbers (and that a rate is above 0), by option.
_AT_LEAST_0: tuple[Callable[[float], bool], str] = (lambda value: value >= 0, "of at least 0")
_AT_LEAST_1: tuple[Callable[[float], bool], str] = (lambda value: value >= 1, "of at least 1")
_UP_TO_1: tuple[Callable[[float], bool], str] = (lambda value: 0 <= value <= 1, "from 0 to 1")
_LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: value > 0, "above 0"),
    "betas": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "rho": _UP_TO_1,
    "factor": _UP_TO_1,
    "start_factor": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "end_factor": _UP_TO_1,
    **dict.fromkeys(("weight_decay", "momentum", "momentum_decay", "eps", "alpha"), _AT_LEAST_0),
    **dict.fromkeys(("lr_decay", "initial_accumulator_value", "gamma", "power"), _AT_LEAST_0),
    **dict.fromkeys(("step_size", "T_max", "T_0", "T_mult", "total_iters"), _AT_LEAST_1),
}
_UNFIT = {  # schedules that no configuration can describe, or that wait for a metric
    "lambdalr": "it needs a function",
    "multiplicativelr": "it needs a function",
    "sequentiallr": "it needs other schedules",
    "chainedscheduler": "it needs other schedules",
    "reducelronplateau": "it needs a metric at every step",
}


def optimizer(
    parameters: Iterable[torch.nn.Parameter],
    spec: Mapping[str, Any],
    key: str = "train.optimizer",
) -> Optimizer:
    """The `torch.optim` class that `spec["name"]` names (in any case), given the other entries.

    Raises ConfigError, which names the setting `key`, for a name that is unknown, and for options
    that it does not take.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ConfigError("the task's model has no trainable parameters; unfreeze some")
    return _make(key, _optimizers(), spec, trained)


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


def learning_rate(train: Mapping[str, Any], *, server_round: int) -> float:
    """The rate that clients train with in `server_round`, by the `train` section."""
    made = optimizer([torch.nn.Parameter(torch.zeros(1))], train["optimizer"])
    apply_schedule(made, train.get("schedule"), server_round=server_round)
    return float(made.param_groups[0]["lr"])


def check(train: Mapping[str, Any]) -> None:
    """ConfigError if `train.optimizer` or `train.schedule` cannot be made from its options.

    Torch takes a second for its first optimizer, so none is made here: names, kinds of values and
    ranges are compared with the class's signature and the checks that torch makes.
    """
    check_optimizer(train["optimizer"])
    if train["schedule"] is not None:
        _check("train.schedule", _schedules(), train["schedule"])


def check_optimizer(spec: Mapping[str, Any], key: str = "train.optimizer") -> None:
    """ConfigError if the optimizer that the setting `key` describes cannot be made; see `check`."""
    cls, options = _check(key, _optimizers(), spec)
    steady = options.get("momentum") and not options.get("dampening")
    if cls is torch.optim.SGD and options.get("nesterov") and not steady:
        raise ConfigError(
            f"{key}.nesterov=true needs a momentum above 0 and no dampening; "
            f"add +{key}.momentum=0.9"
        )


def _check(key: str, known: Mapping[str, Any], spec: Any) -> tuple[Any, dict[str, Any]]:
    """The class that `spec` names, and its options, which fit."""
    cls, options = _find(key, known, spec)
    if why := _UNFIT.get(cls.__name__.lower()):
        raise ConfigError(f"{key}.name={cls.__name__} cannot be used: {why}")
    try:
        inspect.signature(cls).bind(None, **options)
    except TypeError as error:
        raise _refused(key, cls, options, error) from None
    for option, value in options.items():
        _check_value(f"{key}.{option}", value, inspect.signature(cls).parameters[option])
    return cls, options


def _check_value(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """ConfigError unless `value` is of the kind of the default, or of the annotation, and fits."""
    default, annotation = parameter.default, parameter.annotation
    kind = getattr(annotation, "__name__", annotation)
    fits, words = _LIMITS.get(parameter.name, (lambda value: True, ""))
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value} must be true or false")
    elif kind == "int":
        if type(value) is not int or not fits(value):
            raise ConfigError(f"{name}={value} must be a whole number {words}".rstrip())
    elif type(default) in (int, float) or kind == "float":
        if not _is_number(value) or not fits(value):
            raise ConfigError(f"{name}={value} must be a number {words}".rstrip())
    elif isinstance(default, tuple) and None not in default:
        several = isinstance(value, list | tuple) and len(value) == len(default)
        if not several or not all(_is_number(each) and fits(each) for each in value):
            usual = ",".join(map(str, default))
            each = f" {words}" if words else ""
            raise ConfigError(f"{name}={value} must be {len(default)} numbers{each}, as [{usual}]")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # NaN is not


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
