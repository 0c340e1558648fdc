"""FedIPFS: federated learning on Flower in which only content identifiers travel.

Everything in `__all__` is public. Names are loaded on first use, so importing the package is cheap.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedipfs.errors import FedIPFSError as FedIPFSError
    from fedipfs.exchange import CidGrid as CidGrid
    from fedipfs.exchange import cid_mod as cid_mod
    from fedipfs.exchange import load_model as load_model
    from fedipfs.exchange import use_store as use_store
    from fedipfs.ipld import CID as CID
    from fedipfs.store import FolderStore as FolderStore
    from fedipfs.store import open_store as open_store
    from fedipfs.strategies import FedAvg as FedAvg
    from fedipfs.tasks import Task as Task
    from fedipfs.weights import Weights as Weights

# Read by Flower when it is imported: a privacy tool does not phone home. Set them to override.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

_ROOMS = {
    "CID": "ipld",
    "CidGrid": "exchange",
    "FedAvg": "strategies",
    "FedIPFSError": "errors",
    "FolderStore": "store",
    "Task": "tasks",
    "Weights": "weights",
    "cid_mod": "exchange",
    "load_model": "exchange",
    "open_store": "store",
    "use_store": "exchange",
}
__version__ = version("fedipfs")
__all__ = [
    "CID",
    "CidGrid",
    "FedAvg",
    "FedIPFSError",
    "FolderStore",
    "Task",
    "Weights",
    "__version__",
    "cid_mod",
    "load_model",
    "open_store",
    "use_store",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fedipfs.{_ROOMS[name]}"), name)
    return value
