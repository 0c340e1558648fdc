"""Checks of the options that strategies are made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedipfs.errors import ConfigError

_BEYOND = 1e300


def whole(key: str, value: Any, least: int) -> int:
    """`value`, the option `key`; ConfigError unless it is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ConfigError(f"strategy.{key}={value} must be a whole number of at least {least}")
    return value


def within_round(key: str, value: Any, per_round: int | None) -> int:
    """`value`, the option `key`, a number of clients from 1 on; ConfigError if no round has it."""
    if whole(key, value, 1) > (value if per_round is None else per_round):
        raise ConfigError(
            f"strategy.{key}={value} is more than clients.per_round={per_round}; "
            "lower the one or raise the other"
        )
    return int(value)


def one_of(key: str, value: Any, known: Sequence[str]) -> None:
    """ConfigError unless the option `key` is one of the texts `known`."""
    if value not in known:
        raise ConfigError(f"strategy.{key}={value} is unknown; choose {', '.join(known)}")


def positive(key: str, value: Any) -> float:
    """`value`, the option `key`; ConfigError unless it is a finite number above 0."""
    return _number(key, value, lambda number: number > 0, "above 0")


def not_negative(key: str, value: Any) -> float:
    """`value`, the option `key`; ConfigError unless it is a finite number of at least 0."""
    return _number(key, value, lambda number: number >= 0, "of at least 0")


def below(key: str, value: Any, most: float) -> float:
    """`value`, the option `key`; ConfigError unless it is a number from 0 to below `most`."""
    return _number(key, value, lambda number: 0 <= number < most, f"from 0 to below {most:g}")


def _number(key: str, value: Any, fits: Callable[[float], bool], words: str) -> float:
    # Compared, not converted: a whole number beyond all floats is none that anybody wants.
    if type(value) not in (int, float) or not abs(value) < _BEYOND or not fits(value):
        raise ConfigError(f"strategy.{key}={value} must be a number {words}")
    return float(value)
