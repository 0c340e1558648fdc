"""Pins: one small file a name of a root, so that processes never overwrite each other's.

The file is called `<CID>.<hash of what it holds>`, as names may be any text of any length.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os

from fedipfs.errors import CidError, StoreUnusable
from fedipfs.ipld import CID
from fedipfs.store.files import os_errors, sync, write_whole


def add(folder: str, root: CID, name: str, *, durable: bool) -> None:
    """Pin `root` as `name` under the folder `folder`, besides the names that it has."""
    with os_errors(folder):
        write_whole(f"{folder}/{_file(root, name)}", _text(name), durable=durable)


def remove(folder: str, root: CID, name: str | None, *, durable: bool) -> None:
    """Take `name` away from `root`, or all its names with None."""
    if name is None:
        files = [file for file in _files(folder) if file.startswith(f"{root}.")]
    else:
        files = [_file(root, name)]
    with os_errors(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{folder}/{file}")
                if durable:
                    sync(folder)


def read(folder: str) -> dict[CID, tuple[str, ...]]:
    """The names of all pinned roots. Raises StoreUnusable for a file that is not a pin."""
    found: dict[CID, set[str]] = {}
    for file in _files(folder):
        root = _root(file)
        if root is None:
            raise StoreUnusable(f"{folder}/{file} is not a pin: move it away")
        with os_errors(folder), contextlib.suppress(FileNotFoundError):  # unpinned meanwhile
            name = _name(f"{folder}/{file}")
            found.setdefault(root, set()).add(name)
    return {root: tuple(sorted(names)) for root, names in found.items()}


def _files(folder: str) -> list[str]:
    with os_errors(folder):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if not name.startswith("."))


def _file(root: CID, name: str) -> str:
    return f"{root}.{hashlib.sha256(_text(name)).hexdigest()[:32]}"


def _root(file: str) -> CID | None:
    text, dot, _ = file.partition(".")
    try:
        root = CID.parse(text)
    except CidError:
        return None
    return root if dot and str(root) == text else None


def _text(name: str) -> bytes:
    return json.dumps({"name": name}).encode()


def _name(path: str) -> str:
    """The pin's name; empty when a power loss left the file without it: the CID is what counts."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else ""
