"""How the clients' work is combined: streaming FedAvg, and Flower's strategies by name."""

from fedipfs.strategies.base import ClientUpdate, StoreStrategy
from fedipfs.strategies.build import STRATEGIES, Brief, build, required_successes
from fedipfs.strategies.fedavg import Average, FedAvg, FedProx
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.screen import parts, require, screen, update_in
from fedipfs.strategies.state import load_state, save_state

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
