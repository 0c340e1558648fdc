"""What this site did: a text file that grows by a line an event.

    2026-12-01T02:02:22+00:00 trained run=bafy... round=3 task=my:Task seconds=1.2 #0f3a...
    2026-12-01T14:03:10+00:00 refused rule=policy.hours reason="this site trains ..." #9c11...

Time in UTC, the event, then fields `name=value`. Values with other characters than letters, digits
and `._:/+@%,-` are JSON strings, of at most 300 characters, without line breaks or characters that
do not print: whatever a coordinator calls its run, a line stays a line and a field a field.

A line ends in 16 digits of the SHA-256 of those of the line before (of the first: zeros), a space
and the line up to there. So a line that was changed, moved or taken out shows. What does not show:
lines taken off the end, and a file rewritten as a whole, which its owner can do. To have that
show, keep the last digits somewhere else now and then.

Several processes may write. The file may be moved away at any time: the next event begins another.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fedipfs.errors import ActivityError, ActivityTampered, one_line

EVENTS = (
    "started",
    "stopped",
    "began",
    "trained",
    "evaluated",
    "answered",
    "prefetched",
    "refused",
    "failed",
)
MAX_VALUE = 300  # characters
_SYNCED = ("began", "trained", "evaluated", "refused")
_START = "0" * 16
_TAIL = 1 << 16  # bytes: more than any line has
_PLAIN = re.compile(r"[A-Za-z0-9._:/+@%,-]+")
_NAME = re.compile(r"[a-z][a-z_]*")
_TEXT = r"(?:[^\s\"=]+|\"(?:[^\"\\]|\\.)*\")"  # a value
_LINE = re.compile(rf"(\S+) ([a-z]+)((?: [a-z_]+={_TEXT})*) #[0-9a-f]{{16}}")
_FIELD = re.compile(rf" ([a-z_]+)=({_TEXT})")

Value = str | int | float | bool | None


class Entry(NamedTuple):
    """A line of the log."""

    time: datetime
    event: str
    fields: dict[str, str]

    def told(self) -> str:
        """The fields as they are in the file, where none can look like several."""
        return " ".join(_field(name, value) for name, value in self.fields.items())


class Activity:
    """Adds to the log at `path`, which is made with its first event."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def note(self, event: str, /, **fields: Value) -> None:
        """Add a line, on disk when this returns if the event is one that a site answers for.

        A field that is None is left out. Raises ActivityError if it cannot be written.
        """
        assert event in EVENTS, event
        time = datetime.now(UTC).isoformat(timespec="seconds")
        told = [_field(name, value) for name, value in fields.items() if value is not None]
        text = " ".join([time, event, *told])
        try:
            with self._alone() as file:
                last, torn = _tail(file)
                if torn:  # of a line that a crash cut short
                    os.ftruncate(file, os.fstat(file).st_size - torn)
                    text += f" removed={torn}"
                line = f"{text} #{_link(last, text)}\n".encode()
                if os.write(file, line) != len(line):
                    raise OSError(0, "no room for a whole line", os.fspath(self.path))
                if event in _SYNCED:
                    os.fsync(file)
        except OSError as error:
            raise ActivityError(
                f"cannot write the activity log {self.path} ({error.strerror or error}), and "
                "nothing is done that is not in it: make room, or make it writable for this user"
            ) from error

    def recent(self) -> list[Entry]:
        """The last lines, at most some hundreds; none if there is no log or they are damaged."""
        with contextlib.suppress(OSError), open(self.path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 8 * _TAIL))
            lines = stream.read().decode(errors="replace").splitlines()
            return [entry for line in lines if (entry := parse(line)) is not None]
        return []

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """The file, open to append, while no other process writes."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def entries(path: str | os.PathLike[str]) -> Iterator[Entry]:
    """All lines of a log, verified one by one.

    Raises ActivityTampered at the line that does not follow from the one before, and ActivityError
    for a file that cannot be read. A last line without its end is left out: a crash cut it short.
    """
    last = _START
    try:
        with open(path, "rb") as stream:
            for number, whole in enumerate(stream, 1):
                if not whole.endswith(b"\n"):
                    return
                line = whole[:-1].decode(errors="replace")
                entry = parse(line) if line.encode() == whole[:-1] else None
                text, _, link = line.rpartition(" #")
                if entry is None or link != _link(last, text):
                    raise ActivityTampered(
                        f"{path}: line {number} does not follow from the line before: one of them "
                        "was changed, moved or taken out"
                    )
                last = link
                yield entry
    except OSError as error:
        raise ActivityError(f"cannot read {path}: {error.strerror or error}") from error


def verify(path: str | os.PathLike[str]) -> int:
    """How many lines a log has, all as they were written; see `entries` for what it raises."""
    return sum(1 for _ in entries(path))


def _field(name: str, value: Value) -> str:
    assert _NAME.fullmatch(name), name
    text = str(value).lower() if isinstance(value, bool) else one_line(value, MAX_VALUE)
    plain = _PLAIN.fullmatch(text)
    return f"{name}={text if plain else json.dumps(text, ensure_ascii=False)}"


def parse(line: str) -> Entry | None:
    """A line of a log, not verified; None for what is none."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    try:
        time = datetime.fromisoformat(found[1])
        fields = {
            name: json.loads(value) if value.startswith('"') else value
            for name, value in _FIELD.findall(found[3])
        }
    except ValueError:
        return None
    return Entry(time, found[2], fields) if time.tzinfo else None


def _link(last: str, text: str) -> str:
    return sha256(f"{last} {text}".encode()).hexdigest()[:16]


def _tail(file: int) -> tuple[str, int]:
    """What the last whole line ends in, and how many bytes of a broken one follow it."""
    size = os.fstat(file).st_size
    start = max(0, size - _TAIL)
    data = os.pread(file, size - start, start)
    end = data.rfind(b"\n") + 1
    last = data[:end].rstrip(b"\n").rpartition(b" #")[2].decode("ascii", "replace")
    return (last if re.fullmatch("[0-9a-f]{16}", last) else _START), len(data) - end
