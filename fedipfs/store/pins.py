"""Pins: one small file a pinned root, so that processes never overwrite each other's."""

from __future__ import annotations

import contextlib
import json
import os

from fedipfs.errors import CidError, StoreUnusable
from fedipfs.ipld import CID
from fedipfs.store.files import os_errors, sync, write_whole


def add(folder: str, root: CID, name: str, *, durable: bool) -> None:
    """Pin `root` under the folder `folder`; a new name replaces the old one."""
    text = json.dumps({"name": name}).encode()
    with os_errors(folder):
        write_whole(f"{folder}/{root}", text, durable=durable)


def remove(folder: str, root: CID, *, durable: bool) -> None:
    """Unpin `root`."""
    with os_errors(folder), contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{root}")
        if durable:
            sync(folder)


def read(folder: str) -> dict[CID, str]:
    """All pins with their names. Raises StoreUnusable for a file that is not a pin."""
    found: dict[CID, str] = {}
    with os_errors(folder):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    for file in sorted(names):
        if file.startswith("."):
            continue
        try:
            root = CID.parse(file)
        except CidError:
            raise StoreUnusable(f"{folder}/{file} is not a pin: move it away") from None
        with os_errors(folder), contextlib.suppress(FileNotFoundError):  # unpinned meanwhile
            found[root] = _name(f"{folder}/{file}")
    return found


def _name(path: str) -> str:
    """The pin's name; empty when a power loss left the file without it: the CID is what counts."""
    with open(path, "rb") as file:
        data = file.read(1 << 16)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else ""
