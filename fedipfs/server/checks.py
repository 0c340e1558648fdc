"""Kinds of values that settings have: each check raises ConfigError naming setting and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedipfs.errors import ConfigError

_MOST = 2**63 - 1  # what torch takes as a seed, and DAG-CBOR and numpy as an integer


def integer(
    section: Mapping[str, Any], key: str, least: int, prefix: str = "", *, optional: bool = False
) -> None:
    value = section[key]
    if optional and value is None:
        return
    if type(value) is not int or value < least:
        raise ConfigError(f"{prefix}{key}={value} is not a whole number of at least {least}")
    if value > _MOST:
        raise ConfigError(f"{prefix}{key}={value} is too large; it must be below 2**63")


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # NaN is not


def number(section: Mapping[str, Any], key: str, least: float, most: float, prefix: str) -> None:
    value = section[key]
    if not is_number(value) or not least <= value <= most:
        raise ConfigError(f"{prefix}{key}={value} is not a number from {least:g} to {most:g}")


def flag(section: Mapping[str, Any], key: str, prefix: str) -> None:
    if type(section[key]) is not bool:
        raise ConfigError(f"{prefix}{key}={section[key]} is neither true nor false")


def text(section: dict[str, Any], key: str, prefix: str = "", *, optional: bool = False) -> None:
    """Also for names that look like whole numbers, as in run_id=7."""
    value = section[key]
    if type(value) is int:
        section[key] = str(value)
    elif not (optional and value is None) and not (isinstance(value, str) and value):
        raise ConfigError(f"{prefix}{key}={value} is not a text; give one, in quotes if need be")


def choice(section: Mapping[str, Any], key: str, choices: tuple[str, ...], prefix: str) -> None:
    if section[key] not in choices:
        raise ConfigError(f"{prefix}{key}={section[key]} is not one of {', '.join(choices)}")
