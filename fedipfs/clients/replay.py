"""Where each run stands at this site, so that no message of it is answered twice.

For every run of every coordinator, and every type of message, there is a position: the attempt
(which grows each time that the coordinator begins anew on the run), then the round. What is signed
for a position before the last one is refused, and so is a second message to the same address
(type, node and group; see exchange/signing.py) at the last one. A resumed run asks for its round
again, in another attempt. Types have positions of their own, as a message that nobody waits for
(an announced model) may come after one of the next round.

One small file a run, written whole before the message is worked on: a site that is killed while
it trains does not train again on the same message. Nothing is ever forgotten, or a run could be
replayed once it was: 10,000 runs take 40 MB of disk. Whoever takes the files away, or puts old
ones back, opens these runs to replays.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedipfs.errors import ActivityError, Replayed, one_line
from fedipfs.exchange import Stamp
from fedipfs.trust import files

FORMAT = "fedipfs-positions/v1"
MOST = 4096  # messages of a type in one round
_MAX_FILE = 1 << 20  # bytes


class Positions:
    """The positions in `folder`, which is made if need be; safe in threads and in processes."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def take(self, coordinator: str, stamp: Stamp, attempt: int) -> None:
        """Note a message, whose signature has been checked. On disk when this returns.

        Raises Replayed for one that is not to be answered, and ActivityError for files that cannot
        be read or written: then nothing is to be answered at all.
        """
        address = sha256(stamp.to.encode()).hexdigest()[:32]
        kind = stamp.to.partition(" ")[0]
        what = f"round {stamp.round} of run {one_line(stamp.run, 80)} ({one_line(kind, 40)})"
        with self._alone():
            path = self.folder / _name(coordinator, stamp.run)
            found = _read(path) or {"coordinator": coordinator, "run": stamp.run, "at": {}}
            last, number, seen = found["at"].get(kind, (-1, -1, []))
            if (attempt, stamp.round) < (last, number):
                raise Replayed(f"{what} is asked for after round {number} in attempt {last}")
            if (attempt, stamp.round) > (last, number):
                seen = []
            if address in seen:
                raise Replayed(f"{what} was asked for before, in this attempt ({attempt})")
            if len(seen) >= MOST:
                raise Replayed(f"{what}: more than {MOST} messages in a round")
            found["at"][kind] = [attempt, stamp.round, [*seen, address]]
            text = json.dumps({"format": FORMAT, **found}, indent=1)
            files.write_whole(path, f"{text}\n", 0o600)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                os.close(handle)
        except OSError as error:
            raise ActivityError(
                f"cannot use {error.filename or self.folder} ({error.strerror or error}): what was "
                "asked before is not known, so nothing is answered; make it a place that this user "
                "can write"
            ) from error


def _name(coordinator: str, run: str) -> str:
    """Names of runs are the coordinator's to choose, so a file is called by a hash."""
    return sha256(f"{coordinator}\0{run}".encode()).hexdigest()[:32] + ".json"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    text = files.read(path, ActivityError, limit=_MAX_FILE, private=True)
    try:
        found = json.loads(text)
        assert found.pop("format") == FORMAT
        for attempt, number, seen in found["at"].values():
            assert type(attempt) is type(number) is int and isinstance(seen, list)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise ActivityError(
            f"{path} is damaged: put it back from a backup; without it the run's messages could be "
            "replayed"
        ) from None
    return dict(found)
