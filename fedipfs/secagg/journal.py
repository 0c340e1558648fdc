"""A client's memory: what it has answered is on disk before it leaves.

One folder a run, closed to other users, holds the newest session and in it one file a stage, which
is made once and never changed: its answer, what it answered to, and the secrets that later stages
need. So a client that crashed, or whose next message reaches another process, goes on where it was
and says the same again, or nothing. The last answer removes all secrets of its session; so does a
newer session, which ends the ones before. (What a disk keeps of removed files is not in our hands.)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedipfs.errors import DagCborError, JournalError, OutOfTurn, SecondAnswer, TooLate
from fedipfs.ipld import dagcbor
from fedipfs.secagg.session import Session

FORMAT = "fedipfs-secagg-journal/v1"
STAGES = ("advertise", "share", "mask", "masked", "confirm", "unmask")
LAST = STAGES[-1]

_HASH = 32
_SESSION = re.compile(r"([0-9]+)\.([0-9]+)")  # a folder's name: round and attempt
_ENTRY = ("request", "answer", "state")
_SENT = ("mask", LAST)  # after these a vector may have left


@dataclass(frozen=True)
class Entry:
    """An answer (bytes), the digest of what it answers, and secrets for later stages."""

    request: bytes
    answer: bytes
    state: dict[str, Any] = field(default_factory=dict, repr=False)


class Journal:
    """The journal of one client for one session, in a folder of the client's own.

    `durable=False` leaves out the syncs to disk: for simulations and tests only.
    """

    def __init__(
        self, folder: str | os.PathLike[str], session: Session, durable: bool = True
    ) -> None:
        run = hashlib.sha256(session.run.encode()).hexdigest()[:32]
        self._run = Path(folder) / run
        self._here = self._run / f"{session.round}.{session.attempt}"
        self._session, self._durable = session, durable

    def read(self, stage: str) -> Entry | None:
        """What was answered at a stage. Raises JournalError for a damaged or open file."""
        path = self._here / stage
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JournalError(f"journal {path}: {error.strerror}") from error
        with open(file, "rb") as stream:
            status = os.fstat(file)
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise JournalError(f"journal {path} is open to other users: chmod 600 it")
            data = stream.read()
        return self._parse(data, path)

    def need(self, stage: str) -> Entry:
        """As `read`. Raises OutOfTurn where nothing was answered, TooLate after the end."""
        entry = self.read(stage)
        if entry is None:
            self._check_open()
            raise OutOfTurn(f"{stage} of {self._session} has not been answered here")
        return entry

    def write(self, stage: str, entry: Entry) -> Entry:
        """Put an answer on disk, and return it; or what another process has put there before.

        Raises TooLate where the session has ended, SecondAnswer for another request than before.
        """
        with self._locked():
            if stage != LAST:
                self._check_open()
            if stage == STAGES[0]:
                self._begin()
            before = self.read(stage)
            if before is not None:
                self.same(stage, before, entry.request)
                return before
            self._create(self._here / stage, entry)
            if stage == LAST:
                self._forget()
        return entry

    def end(self) -> None:
        """Leave the session, or stay out of it: remove all that is secret, answer nothing more."""
        with self._locked():
            if self._here.is_dir() and not (self._here / LAST).exists():
                self._create(self._here / LAST, Entry(b"", b""))
                self._forget()

    def same(self, stage: str, entry: Entry, request: bytes) -> None:
        """Raises SecondAnswer if `entry` answers another request."""
        if entry.request != request:
            raise SecondAnswer(
                f"{stage} of {self._session} is answered already, to another request: "
                "nobody gets a second answer"
            )

    def _check_open(self) -> None:
        """Raises TooLate if the session has ended."""
        if (self._here / LAST).exists():
            raise TooLate(f"{self._session} has ended here")
        newest = max(self._others(), default=(-1, 0))
        if newest > (self._session.round, self._session.attempt):
            raise TooLate(f"{self._session} has ended here: round {newest[0]} has begun")

    def _begin(self) -> None:
        """End older sessions. Raises SecondAnswer if a vector may have left in another attempt."""
        others = self._others()
        for (number, _), folder in others.items():
            sent = any((folder / stage).exists() for stage in _SENT)
            if number == self._session.round and sent:
                raise SecondAnswer(f"a vector of round {number} may have left in another attempt")
        self._make(self._here)
        for folder in others.values():
            shutil.rmtree(folder)

    def _others(self) -> dict[tuple[int, int], Path]:
        """The folders of the run's other sessions, by round and attempt."""
        found = {}
        for folder in self._run.glob("*.*"):
            name = _SESSION.fullmatch(folder.name)
            if name and folder != self._here:
                found[int(name[1]), int(name[2])] = folder
        return found

    def _forget(self) -> None:
        """Remove all but the last answer: what is secret, and what would need it."""
        for stage in STAGES[:-1]:
            (self._here / stage).unlink(missing_ok=True)
        self._sync(self._here)

    def _create(self, path: Path, entry: Entry) -> None:
        fields = {name: getattr(entry, name) for name in _ENTRY}
        content = dagcbor.encode({"format": FORMAT, "session": self._session.digest, **fields})
        temporary = path.with_name(f"{path.name}.new")  # only one writes: the run is locked
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o600), "wb") as stream:
            stream.write(content + hashlib.sha256(content).digest())
            stream.flush()
            if self._durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        self._sync(path.parent)

    def _make(self, folder: Path) -> None:
        """Create a folder, and those above it, so that they outlast a power failure."""
        if not folder.is_dir():
            self._make(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)
            self._sync(folder.parent)

    def _sync(self, folder: Path) -> None:
        if not self._durable:
            return
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes of this client."""
        self._make(self._run)
        with open(
            os.open(self._run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        ) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _parse(self, data: bytes, path: Path) -> Entry:
        content, checksum = data[:-_HASH], data[-_HASH:]
        if hashlib.sha256(content).digest() != checksum:
            raise JournalError(f"journal {path} is damaged: leave this round out")
        try:
            found = dagcbor.decode(content)
            if found["format"] != FORMAT:
                raise JournalError(f"journal {path} has the format {found['format']!r:.80}")
            session, entry = found["session"], Entry(*(found[name] for name in _ENTRY))
        except (DagCborError, KeyError, TypeError) as error:
            raise JournalError(f"journal {path} is damaged: {error}") from None
        if session != self._session.digest:
            raise SecondAnswer(f"{self._session} was announced on other terms before")
        return entry
