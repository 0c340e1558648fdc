"""Files of a ledger: who may use them, one process at a time, and on disk when it is said so."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedipfs.errors import LedgerError

PATIENCE_S = 60.0  # another process may be computing an epsilon for its first spend
_sync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # macOS has the latter alone


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a LedgerError that names a file."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise LedgerError(
            f"cannot use {error.filename or path} ({error.strerror or error}): "
            + ("make room for it" if full else "make it a place that this user can write")
        ) from error


def lock(file: int, kind: int, path: Path) -> None:
    """flock an open `file`, waiting a minute for others. Raises LedgerError."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise LedgerError(
                    f"{path} has been in use by another process for {PATIENCE_S:.0f} s: "
                    "stop that process, or try again"
                ) from None
        time.sleep(random.uniform(0.0005, 0.003))


def check_closed(found: os.stat_result, path: Path, kind: Callable[[int], bool]) -> None:
    """Raise LedgerError unless `path` is of a kind (stat.S_ISREG, ...) and this user's alone."""
    if not kind(found.st_mode):
        raise LedgerError(f"{path} is not what it should be: a ledger is files in a folder")
    if found.st_uid != os.geteuid():
        raise LedgerError(f"{path} belongs to another user: use it as that user")
    if found.st_mode & 0o077:
        mode = 700 if stat.S_ISDIR(found.st_mode) else 600
        raise LedgerError(f"{path} is open to other users: chmod {mode} {path}")


def write(file: int, data: bytes) -> None:
    """Write all of `data` and have it on disk."""
    while data:
        data = data[os.write(file, data) :]
    _sync(file)


def sync_folder(folder: Path) -> None:
    """Have the names of the files in `folder` on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
