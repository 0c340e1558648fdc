"""Checks of the options that a configuration gives a store."""

from __future__ import annotations

from typing import Any

from fedipfs.errors import ConfigError


def check_number(name: str, value: Any, *, least: float, most: float = 1e9) -> None:
    """ConfigError unless `value` is a number from `least` to `most`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"store.{name}={value!r:.80} is not a number from {least:g} to {most:g}")


def check_flag(name: str, value: Any) -> None:
    """ConfigError unless `value` is a truth value: as text, "no" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"store.{name}={value!r:.80} is neither true nor false")
