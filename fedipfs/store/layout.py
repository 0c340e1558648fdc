"""Where things lie in a store's folder.

- `fedipfs-store`: the marker; format and version
- `blocks/<character>/<CID>`: one file a block, named by its CIDv1 in base32
- `pins/<CID>.<hash>`: one file a name of a pinned root, holding {"name": ...}; see pins.py
- `gc.lock`: held exclusively by a garbage collection, shared while pinning
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedipfs.errors import CidError, StoreUnusable
from fedipfs.ipld import CID
from fedipfs.store.files import TEMPORARY, os_errors, sync, write_whole

MARKER = "fedipfs-store"
VERSION = b"fedipfs folder store 1\n"


def open_folder(path: Path, *, create: bool, durable: bool) -> None:
    """Check that `path` is a store, or make it one if it is absent or empty and `create` is true.

    Raises StoreUnusable.
    """
    with os_errors(str(path)):
        if path.exists() and not path.is_dir():
            raise StoreUnusable(f"{path} is a file, not a store: name a folder")
        marker = path / MARKER
        try:
            found = marker.read_bytes()[:80]
        except FileNotFoundError:
            _create(path, create, durable)
            return
    if found != VERSION:
        raise StoreUnusable(
            f"{path} is a store of another version ({found!r}): use the FedIPFS that made it, "
            "or name another folder"
        )


def _create(path: Path, create: bool, durable: bool) -> None:
    if path.is_dir():
        names = [name for name in os.listdir(path) if not name.startswith(TEMPORARY)]
        # Another process may be creating the same store: its marker comes before all else.
        if names and MARKER not in names:
            raise StoreUnusable(f"{path} is not a store: name an empty or a new folder")
    if not create:
        raise StoreUnusable(f"there is no store at {path}: check the path, or add something first")
    path.mkdir(parents=True, exist_ok=True)
    write_whole(f"{path}/{MARKER}", VERSION, durable=durable)
    for name in ("blocks", "pins"):
        (path / name).mkdir(exist_ok=True)
    if durable:
        sync(str(path))
        sync(str(path.absolute().parent))


def block_path(blocks: str, cid: CID) -> str:
    """The file of a block under the folder `blocks`."""
    name = str(cid if cid.version else cid.to_v1())
    # The last but one spreads evenly over 32 folders: few enough that making them costs nothing,
    # and a million blocks still leave each with a size that file systems like.
    return f"{blocks}/{name[-2]}/{name}"


def scan(blocks: str) -> Iterator[os.DirEntry[str]]:
    """Every file under the folder `blocks`, temporary ones and strangers included."""
    with contextlib.ExitStack() as stack:
        try:
            shards = stack.enter_context(os.scandir(blocks))
        except FileNotFoundError:
            return
        for shard in shards:
            if not shard.is_dir(follow_symlinks=False):
                continue
            with os.scandir(shard.path) as entries:
                yield from entries


def cid_of(entry: os.DirEntry[str]) -> CID | None:
    """The CID that a file's name says, None for a file that is not a block's."""
    if entry.name.startswith(".") or not entry.path.endswith(f"/{entry.name[-2:-1]}/{entry.name}"):
        return None
    try:
        cid = CID.parse(entry.name)
    except CidError:
        return None
    return cid if str(cid) == entry.name else None
