"""Small files that decide about trust: read with care, written whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedipfs.errors import UserError, one_line

Error = type[UserError]
Path_ = str | os.PathLike[str]


def home() -> Path:
    """The folder of an organization's own files: $FEDIPFS_HOME, else ~/.fedipfs."""
    return Path(os.environ.get("FEDIPFS_HOME") or Path.home() / ".fedipfs")


def read(
    path: Path_, error: Error, *, limit: int, private: bool = False, ours: bool = False
) -> str:
    """A text file's content, which must be a regular file of at most `limit` bytes.

    With `private`, it must belong to this user and be closed to all others; with `ours`, belong
    to this user or root and be writable by no other. Both are asked of the open file, so it
    cannot be swapped in between. Raises `error`, with the remedy.
    """
    try:
        # A named pipe would otherwise block until someone writes to it.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            problem = _problem(os.fstat(file), os.fspath(path), private, ours)
            if problem:
                raise error(problem)
            with open(file, "rb", closefd=False) as stream:
                data = stream.read(limit + 1)
        finally:
            os.close(file)
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror or failure}") from failure
    if len(data) > limit:
        raise error(f"{path} has more than {limit} bytes: not such a file")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8 text") from None


def _problem(found: os.stat_result, path: str, private: bool, ours: bool) -> str:
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is not a regular file"
    if private and found.st_uid != os.geteuid():
        return f"{path} belongs to another user: make a copy of your own, closed to others"
    if private and found.st_mode & 0o077:
        return f"{path} is open to other users: chmod 600 {path}"
    if ours and found.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user, who could change it: make a copy of your own"
    if ours and found.st_mode & 0o022:
        return f"{path} can be changed by other users: chmod go-w {path}"
    return ""


def write_new(path: Path_, text: str) -> None:
    """Create a file that only this user can read, from its first moment on, and sync it to disk.

    Raises FileExistsError for any file, also a dangling link, and OSError, leaving nothing.
    """
    _create(os.fspath(path), text, 0o600)
    _sync(os.path.dirname(os.path.abspath(path)))


def write_whole(path: Path_, text: str, mode: int = 0o644) -> None:
    """Put `text` in the place of what a file (or the file behind a link) holds, all or nothing."""
    target = os.path.realpath(path)
    temporary = f"{target}.{secrets.token_hex(8)}"
    try:
        _create(temporary, text, mode)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync(os.path.dirname(target))


def _create(path: str, text: str, mode: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _sync(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def table(text: str, where: Path_, error: Error, format: str) -> dict[str, Any]:
    """The TOML document `text` without its `format`, which must be the one given."""
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as failure:  # ValueError: also numbers of 5000 digits
        raise error(f"{where} is not TOML: {one_line(failure, 200)}") from None
    named = found.pop("format", None)
    if named != format:
        raise error(f"{where} has the format {named!r:.80}: expected {format!r}")
    return found


def check(
    found: Any,
    required: Mapping[str, type],
    optional: Mapping[str, type],
    where: Path_,
    error: Error,
) -> None:
    """Refuse a TOML table that lacks a key, has one more, or a value of another type."""
    kinds = {**required, **optional}
    if type(found) is not dict:
        raise error(f"{where}: expected a table, not a {type(found).__name__}")
    if unknown := sorted(found.keys() - kinds.keys()):
        raise error(f"{where}: {unknown[0]!r:.80} is not known: use {', '.join(kinds)}")
    if missing := [key for key in required if key not in found]:
        raise error(f"{where}: {missing[0]} is missing")
    for key, value in found.items():
        if type(value) is not kinds[key]:
            # Not the value: in a file of private keys it may be one.
            raise error(f"{where}: {key} is not a {kinds[key].__name__} but {type(value).__name__}")
