"""The store of this process, for apps that name none."""

from __future__ import annotations

import os
from functools import lru_cache

from fedipfs.store import Store, open_store

DEFAULT = "runs/store"
_chosen: list[Store] = []


def use_store(store: Store) -> None:
    """Make `store` the one that CidGrid and cid_mod use in this process."""
    _chosen[:] = [store]


def default_store() -> Store:
    """The store given to `use_store`, else the one $FEDIPFS_STORE names, else ./runs/store."""
    return _chosen[0] if _chosen else _open(os.environ.get("FEDIPFS_STORE") or DEFAULT)


@lru_cache(maxsize=8)
def _open(spec: str) -> Store:
    return open_store(spec)
