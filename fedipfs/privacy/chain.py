"""A file of entries that only grows, in which nothing can be changed unnoticed.

`NAME.jsonl` has a JSON object a line. Each holds its `number` (the line's, from 1), the `time` in
UTC, a `kind` and what that needs, the SHA-256 of the `previous` line (with its newline: `sed -n 3p
FILE | sha256sum` gives what line 4 holds), and a random `nonce`, by which a hash tells nothing of
its line. `NAME.head` has the number and hash of the last line, or a missing end would not be seen.

An append is done once the new line is on disk and then the new head. So a crash leaves nothing; or
a part of a line, which the next append takes off and notes as `removed` bytes, for its own append
had not returned; or one line more than the head says, which counts. Every other disagreement is
refused, and nothing is ever begun anew in its place.

Not noticed: both files taken back together to an earlier state, as from a backup. For that, hand
hashes of last lines to others (they are in the records of runs) and compare.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from fedipfs.errors import LedgerError, LedgerTampered
from fedipfs.privacy.files import check_closed, lock, os_errors, sync_folder, write

Entry = Mapping[str, Any]
START = "0" * 64  # what the first line holds as the hash of the one before
_HEAD = re.compile(r"([0-9]{15}) ([0-9a-f]{64})\n")


class Chain:
    """The entries called `name` in `folder`; safe in threads and in processes.

    `entries`, `lines` (their bytes) and `head` (the last line's hash) are as they were when
    `reading` or `writing` was entered last. Both raise LedgerTampered, and LedgerError for files
    that are missing, in use for a minute, open to other users, or cannot be read or written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.jsonl"
        self.entries: list[Entry] = []
        self.lines = bytearray()
        self.head = START
        self._head_path = folder / f"{name}.head"
        self._mutex = threading.Lock()

    @property
    def exists(self) -> bool:
        """Whether there is an entry, or a sign that there was one."""
        with os_errors(self.path):
            present = self.path.exists(), self._head_path.exists()
        if present == (False, False):
            return False
        if present != (True, True):
            return self._read_head() != (0, START)
        with self.reading():
            return bool(self.entries)

    def begin(self, first: Mapping[str, Any]) -> None:
        """Make the files, with one entry. The caller sees to it that nobody else does so, too.

        Raises LedgerError if there are such files; those of a `begin` that broke off are used.
        """
        with os_errors(self.path):
            check_closed(os.stat(self.path.parent), self.path.parent, stat.S_ISDIR)
            if not self.path.exists() and not self._head_path.exists():
                aside = f"{self._head_path}.new"
                self._write_head(0, START, aside)
                os.replace(aside, self._head_path)
            if self._read_head() == (0, START):
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            sync_folder(self.path.parent)
        with self.writing() as append:
            if self.entries:
                raise LedgerError(f"{self.path} exists, and is never begun anew")
            append(first)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Take in what was added and verify it; meanwhile nobody adds more."""
        with self._locked(os.O_RDONLY, fcntl.LOCK_SH) as file:
            self._take_in(file)
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Mapping[str, Any]], str]]:
        """The same, with a function that appends one entry and returns the new head.

        When it returns, the entry is on disk. What it raises may leave the entry, never less.
        """
        with self._locked(os.O_RDWR | os.O_APPEND, fcntl.LOCK_EX) as file:
            behind, torn = self._take_in(file)

            def append(fields: Mapping[str, Any]) -> str:
                nonlocal behind, torn
                if behind:  # or the head would be two behind after one more crash
                    self._write_head(len(self.entries), self.head)
                noted = {**fields, "removed": torn} if torn else fields
                self._append(file, noted)
                behind, torn = False, 0
                return self.head

            yield append

    @contextlib.contextmanager
    def _locked(self, flags: int, kind: int) -> Iterator[int]:
        with self._mutex, os_errors(self.path):
            check_closed(os.stat(self.path.parent), self.path.parent, stat.S_ISDIR)
            try:
                file = os.open(self.path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                self._missing(self.path)
            try:
                check_closed(os.fstat(file), self.path, stat.S_ISREG)
                lock(file, kind, self.path)
                if os.stat(self.path).st_ino != os.fstat(file).st_ino:
                    raise LedgerError(f"{self.path} was replaced just now: try again")
                yield file
            finally:
                os.close(file)  # and with it the lock

    def _take_in(self, file: int) -> tuple[bool, int]:
        """Whether the head is one line behind, and how many bytes of a broken line follow."""
        with open(file, "rb", closefd=False) as stream:
            content = stream.read()
        if not content.startswith(self.lines):
            self._tampered("lines that this process has read before were changed")
        position = len(self.lines)
        while position < len(content):
            end = content.find(b"\n", position) + 1
            line = content[position:end]
            if not line or b"\0" in line:  # zeros: space that was never written before a crash
                break
            self._add(line)
            position = end
        count, head = self._read_head()
        behind = count == len(self.entries) - 1
        if not behind and count != len(self.entries):
            self._tampered(f"it has {len(self.entries)} whole lines, and should have {count}")
        if head != (self.entries[-1]["previous"] if behind else self.head):
            self._tampered(f"line {count} is not the one that was written last")
        return behind, len(content) - position

    def _add(self, line: bytes) -> None:
        number = len(self.entries) + 1
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            self._tampered(f"line {number} is not JSON")
        if type(entry) is not dict or type(entry.get("kind")) is not str:
            self._tampered(f"line {number} is not an entry")
        if entry.get("number") != number or entry.get("previous") != self.head:
            self._tampered(f"line {number} does not follow from the line before")
        self.entries.append(entry)
        self.lines += line
        self.head = hashlib.sha256(line).hexdigest()

    def _append(self, file: int, fields: Mapping[str, Any]) -> None:
        entry = {
            "number": len(self.entries) + 1,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **fields,
            "previous": self.head,
            "nonce": secrets.token_hex(16),
        }
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            os.ftruncate(file, len(self.lines))
            write(file, line)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(file, len(self.lines))
            raise
        self._write_head(entry["number"], hashlib.sha256(line).hexdigest())
        self._add(line)

    # ---- the head

    def _read_head(self) -> tuple[int, str]:
        with os_errors(self._head_path):
            try:
                file = os.open(self._head_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                self._missing(self._head_path)
            with open(file, "rb") as stream:
                check_closed(os.fstat(file), self._head_path, stat.S_ISREG)
                text = stream.read(200).decode("ascii", "replace")
        if not (found := _HEAD.fullmatch(text)):
            self._tampered(f"{self._head_path.name} does not hold a number and a hash")
        return int(found[1]), found[2]

    def _write_head(self, number: int, head: str, path: str | None = None) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT if path else 0)
        file = os.open(path or self._head_path, flags, 0o600)
        try:
            # In place, as it is always as long: a sector has all of it or nothing.
            write(file, f"{number:015} {head}\n".encode())
        finally:
            os.close(file)

    def _missing(self, path: Path) -> NoReturn:
        raise LedgerTampered(
            f"{path} is missing: put it back from a backup; without it, what was spent is unknown"
        )

    def _tampered(self, what: str) -> NoReturn:
        raise LedgerTampered(
            f"{self.path} was altered: {what}; find out who did it and put it back from a backup"
        )
