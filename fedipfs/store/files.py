"""Files that appear whole or not at all, and the operating system's errors as ours."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import secrets
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedipfs.errors import StoreFull, StoreUnusable

if TYPE_CHECKING:
    from typing_extensions import Buffer

TEMPORARY = ".tmp-"  # how the name of a file in the making starts

_TOKEN = secrets.token_hex(4)  # with the process id: no two writers share a name, NFS included
_NUMBERS = itertools.count()
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turn an OSError into StoreFull or StoreUnusable, naming `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise translated(error, path) from error


def translated(error: OSError, path: str) -> StoreFull | StoreUnusable:
    """The StoreFull or StoreUnusable that says what `error` means for `path`."""
    reason = error.strerror or type(error).__name__
    if error.errno in _FULL:
        return StoreFull(f"cannot write {path}: {reason}; free some space ('fedipfs store gc')")
    if error.errno in _FORBIDDEN:
        return StoreUnusable(f"cannot use {path}: {reason}; check its permissions and its mount")
    return StoreUnusable(f"cannot use {path}: {reason}")


def write_whole(path: str, data: Buffer, *, durable: bool) -> None:
    """Make `path` hold `data`: readers see all of it or what was there before, also after a kill.

    With `durable`, also after a power loss once this returns. Raises OSError, leaving nothing.
    """
    folder = os.path.dirname(path)
    temporary = f"{folder}/{TEMPORARY}{_TOKEN}-{os.getpid()}-{next(_NUMBERS)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        file = os.open(temporary, flags, 0o644)
    except FileNotFoundError:
        _make_folder(folder, durable)
        file = os.open(temporary, flags, 0o644)
    try:
        try:
            _write_all(file, data)
            if durable:
                os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync(folder)


def sync(path: str) -> None:
    """Write a file or a folder's entries through to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_filesystem(path: str) -> None:
    """Write the whole file system that holds `path` through to the disk, in one call."""
    if sys.platform != "linux":
        os.sync()
        return
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
    finally:
        os.close(handle)


def _make_folder(folder: str, durable: bool) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    if durable:
        sync(os.path.dirname(folder))


def _write_all(file: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(file, view) :]
