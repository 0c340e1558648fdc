"""Block stores: where content-addressed blocks live."""

from __future__ import annotations

from fedipfs.store.base import Counters, GcReport, Store, StoreStat, VerifyReport
from fedipfs.store.cached import CachedStore
from fedipfs.store.folder import FolderStore
from fedipfs.store.spec import is_shared, open_store

__all__ = [
    "CachedStore",
    "Counters",
    "FolderStore",
    "GcReport",
    "Store",
    "StoreStat",
    "VerifyReport",
    "is_shared",
    "open_store",
]
