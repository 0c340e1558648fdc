"""How the clients' work is combined: streaming FedAvg, and Flower's strategies by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.fedavg import Average, FedAvg, FedProx
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.screen import parts, require, screen, update_in
from fedipfs.strategies.state import load_state, save_state

if TYPE_CHECKING:
    from fedipfs.strategies.catalogue import STRATEGIES as STRATEGIES
    from fedipfs.strategies.catalogue import Brief as Brief
    from fedipfs.strategies.catalogue import build as build
    from fedipfs.strategies.catalogue import required_successes as required_successes

__all__ = [
    "STRATEGIES",
    "Average",
    "Brief",
    "ClientUpdate",
    "FedAvg",
    "FedProx",
    "Mean",
    "StoreStrategy",
    "build",
    "load_state",
    "parts",
    "require",
    "required_successes",
    "save_state",
    "screen",
    "update_in",
]


def __getattr__(name: str) -> Any:
    """What knows all strategies is loaded on first use: some of them take torch along."""
    if name not in ("STRATEGIES", "Brief", "build", "required_successes"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("fedipfs.strategies.catalogue")
    value = globals()[name] = getattr(module, name)
    return value
