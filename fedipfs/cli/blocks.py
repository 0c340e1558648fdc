"""What the commands do to a store of any kind: name it, open it, show what passes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fedipfs.store import FolderStore, Store
    from fedipfs.store.spec import Spec

DEFAULT = "runs/store"
RETRIES = 3  # after a lost connection, a second and a half in all: somebody waits


def complete_store(ctx: click.Context, param: click.Parameter, start: str) -> list[Any]:
    """Kinds of stores, and folders."""
    from click.shell_completion import CompletionItem

    kinds = [kind for kind in ("kubo:", "gateway:", "cached:") if start and kind.startswith(start)]
    return [*map(CompletionItem, kinds), CompletionItem(start, type="dir")]


def open_blocks(spec: Spec, *, create: bool = False) -> Store:
    """The store of `spec`; a folder is made with `create` only, and durable by `flush`."""
    from fedipfs.store import open_store
    from fedipfs.store.spec import options_of

    options = options_of(spec)
    if options["kind"] == "folder":
        options = {**options, "durable": False, "create": create}
    return open_store(_brisk(options))


def _brisk(options: dict[str, Any]) -> dict[str, Any]:
    """The same store, its daemon given up sooner when there is nobody at its address."""
    if isinstance(home := options.get("kubo"), Mapping):
        return {**options, "kubo": _brisk({**home, "kind": "kubo"})}
    if options.get("kind") != "kubo":
        return options
    asked = options.get("retries", RETRIES)
    return {**options, "retries": min(asked, RETRIES) if type(asked) is int else asked}


def folder_of(blocks: Store) -> FolderStore | None:
    """The folder that a store is, or has in front."""
    from fedipfs.store import CachedStore, FolderStore

    front = blocks.front if isinstance(blocks, CachedStore) else blocks
    return front if isinstance(front, FolderStore) else None


def place(blocks: Store) -> dict[str, str]:
    """Where a store is: its kind, and its folder's path, its node's address or its gateways."""
    from fedipfs.store import CachedStore, FolderStore

    if isinstance(blocks, FolderStore):
        return {"kind": "folder", "path": str(blocks.path)}
    if isinstance(blocks, CachedStore):
        places = [place(part) for part in (blocks.front, *blocks.sources)]  # type: ignore[arg-type]
        told = {key: value for part in places for key, value in part.items()}
        return {**told, "kind": "cached"}
    if urls := getattr(blocks, "urls", None):
        return {"kind": "gateway", "gateways": ", ".join(urls)}
    return {"kind": "kubo", "address": blocks.address.text}  # type: ignore[attr-defined]


def name_of(blocks: Store) -> str:
    """Where a store is, for a message."""
    kind, *where = place(blocks).values()
    return where[0] if kind == "folder" else f"{kind} ({', '.join(where)})"


def counted(label: str, blocks: Store, key: str, total: int | None) -> AbstractContextManager[None]:
    """A progress bar over one of the store's counters, where there is a terminal for it."""
    from fedipfs.observe import transfer

    before = getattr(blocks.counters, key)
    return transfer.shown(label, lambda: getattr(blocks.counters, key) - before, total)
