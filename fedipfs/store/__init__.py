"""Block stores: where content-addressed blocks live."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fedipfs.errors import ConfigError
from fedipfs.store.base import Counters, GcReport, Store, StoreStat, VerifyReport
from fedipfs.store.folder import FolderStore

__all__ = [
    "Counters",
    "FolderStore",
    "GcReport",
    "Store",
    "StoreStat",
    "VerifyReport",
    "open_store",
]

_KINDS = {"folder": FolderStore}


def open_store(spec: str | os.PathLike[str] | Mapping[str, Any]) -> Store:
    """The store that `spec` names: a path, "folder:PATH", or {"kind": "folder", "path": ...}.

    A mapping's other keys are the store's options. Raises ConfigError for an unknown kind or
    option, StoreUnusable when the store cannot be opened.
    """
    if isinstance(spec, Mapping):
        options = dict(spec)
    else:
        text = os.fspath(spec)
        kind, colon, path = text.partition(":")
        options = {"kind": kind, "path": path} if colon and kind in _KINDS else {"path": text}
    kind = options.pop("kind", "folder")
    if kind not in _KINDS:
        raise ConfigError(f"store kind {kind!r} is unknown: use {', '.join(sorted(_KINDS))}")
    if not options.get("path"):
        raise ConfigError(f"store {dict(options)!r} names no path: set store.path")
    try:
        return _KINDS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"store options {options!r} are wrong: {error}") from None
