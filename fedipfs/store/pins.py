"""Pins: one small file a name of a root, so that processes never overwrite each other's.

The file is called `<CID>.<hash of what it holds>`, as names may be any text of any length.
What it holds is {"name": ...}, and "alone": true for a pin that is not recursive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os

from fedipfs.errors import CidError, StoreUnusable
from fedipfs.ipld import CID
from fedipfs.store.files import os_errors, sync, write_whole

Pins = dict[CID, set[tuple[str, bool]]]  # root -> its names, and whether they are recursive


def add(folder: str, root: CID, name: str, *, recursive: bool, durable: bool) -> None:
    """Pin `root` as `name` under the folder `folder`, besides the names that it has."""
    with os_errors(folder):
        text = _text(name, recursive)
        write_whole(f"{folder}/{_file(root, name, recursive)}", text, durable=durable)


def remove(folder: str, root: CID, name: str | None, *, durable: bool) -> None:
    """Take `name` away from `root`, or all its names with None."""
    if name is None:
        files = [file for file in _files(folder) if file.startswith(f"{root}.")]
    else:
        files = [_file(root, name, True), _file(root, name, False)]
    with os_errors(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{folder}/{file}")
                if durable:
                    sync(folder)


def read(folder: str) -> Pins:
    """The names of all pinned roots. Raises StoreUnusable for a file that is not a pin."""
    found: Pins = {}
    for file in _files(folder):
        root = _root(file)
        if root is None:
            raise StoreUnusable(f"{folder}/{file} is not a pin: move it away")
        with os_errors(folder), contextlib.suppress(FileNotFoundError):  # unpinned meanwhile
            found.setdefault(root, set()).add(_content(f"{folder}/{file}"))
    return found


def _files(folder: str) -> list[str]:
    with os_errors(folder):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if not name.startswith("."))


def _file(root: CID, name: str, recursive: bool) -> str:
    return f"{root}.{hashlib.sha256(_text(name, recursive)).hexdigest()[:32]}"


def _root(file: str) -> CID | None:
    text, dot, _ = file.partition(".")
    try:
        root = CID.parse(text)
    except CidError:
        return None
    return root if dot and str(root) == text else None


def _text(name: str, recursive: bool) -> bytes:
    return json.dumps({"name": name} if recursive else {"name": name, "alone": True}).encode()


def _content(path: str) -> tuple[str, bool]:
    """The pin's name, and whether it is recursive.

    A power loss may have left the file without either: the CID is what counts.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return "", True
    if not isinstance(value, dict):
        return "", True
    name = value.get("name")
    return name if isinstance(name, str) else "", value.get("alone") is not True
