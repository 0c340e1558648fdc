"""Checks of the options that strategies are made with."""

from __future__ import annotations

import math
from typing import Any

from fedipfs.errors import ConfigError


def whole(key: str, value: Any, least: int) -> int:
    """`value`, the option `key`; ConfigError unless it is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ConfigError(f"strategy.{key}={value} must be a whole number of at least {least}")
    return value


def positive(key: str, value: Any) -> float:
    """`value`, the option `key`; ConfigError unless it is a finite number above 0."""
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"strategy.{key}={value} must be a number above 0")
    return float(value)


def not_negative(key: str, value: Any) -> float:
    """`value`, the option `key`; ConfigError unless it is a finite number of at least 0."""
    if type(value) not in (int, float) or not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"strategy.{key}={value} must be a number of at least 0")
    return float(value)
