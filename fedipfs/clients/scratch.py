"""Private folders for what processes of one site hand each other: in memory where there is room.

They hold records, so nothing of them is to stay: not even where their owner was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/dev/shm")
SPARE = 64 << 20  # bytes that are left free there
_PREFIX = "fedipfs-train-"
_STALE_S = 60  # a folder that old and not locked is nobody's


@contextlib.contextmanager
def folder(size: int) -> Iterator[Path]:
    """A private folder for `size` bytes, removed at the end; locked while its owner lives."""
    disk = Path(tempfile.gettempdir())
    for place in (MEMORY, disk):
        _sweep(place)
    place = MEMORY if _has_room(MEMORY, size + SPARE) else disk
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))  # mode 0700
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield path
    finally:
        for _ in range(50):  # a rank that is just ending may still write
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
            time.sleep(0.1)
        os.close(handle)


def _has_room(place: Path, size: int) -> bool:
    return os.access(place, os.W_OK) and shutil.disk_usage(place).free >= size


def _sweep(place: Path) -> None:
    """Remove what owners left behind that were killed with all their children."""
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < _STALE_S:
                continue
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)
