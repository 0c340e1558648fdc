"""What passes between the command of a run and its ServerApp, which is another process.

A folder of its own in the coordinator's home: `job.json` with the configuration, `events.jsonl`
with the progress and the end, `lock`, which the ServerApp holds as long as it lives, and `stop`,
which asks it to end in good order.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedipfs.errors import RunError
from fedipfs.trust import files

_FOLDER = "submissions"
_OLD_S = 24 * 3600.0


class Submission:
    """One of them, in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = path / "events.jsonl"

    @classmethod
    def create(cls, home: Path, config: Mapping[str, Any], *, resume: bool) -> Submission:
        """A new one in a coordinator's home, for a ServerApp that is yet to be started."""
        folder = home / _FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        for each in folder.iterdir():
            if (old := cls(each)).state == "left" or old._is_old():
                old.remove()  # of a command that was killed
        path = folder / token_hex(8)
        path.mkdir(mode=0o700)
        job = {"config": config, "resume": resume, "folder": os.getcwd()}
        files.write_new(path / "job.json", json.dumps(job))
        return cls(path)

    @classmethod
    def named(cls, home: Path, name: str) -> Submission:
        """The one that a ServerApp was given the name of. Raises RunError."""
        path = home / _FOLDER / name
        if not name.isalnum() or not (path / "job.json").is_file():
            raise RunError(f"there is no submission {name!r:.40} in {home}")
        return cls(path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def job(self) -> dict[str, Any]:
        """`config`, whether to `resume` its run, and the `folder` that paths are relative to."""
        found: dict[str, Any] = json.loads((self.path / "job.json").read_text(encoding="utf-8"))
        return found

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Show that the ServerApp lives, for as long as this lasts and the process."""
        fresh = self.path / f"lock.{os.getpid()}"
        with open(fresh, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fresh.rename(self.path / "lock")  # not before: a lock that nobody holds says "left"
            yield

    @property
    def state(self) -> str:
        """ "new", "held" by a ServerApp that lives, or "left" by one that is gone."""
        try:
            with open(self.path / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return "new"
        except BlockingIOError:
            return "held"
        return "left"

    def _is_old(self) -> bool:
        """Whether no ServerApp will begin on it any more."""
        with contextlib.suppress(OSError):
            return self.state == "new" and time.time() - self.path.stat().st_mtime > _OLD_S
        return False

    def stop(self) -> None:
        """Ask the ServerApp to end."""
        (self.path / "stop").touch()

    def interrupted(self) -> None:
        """KeyboardInterrupt if the ServerApp is to end."""
        if (self.path / "stop").exists():
            raise KeyboardInterrupt

    def remove(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self.path, ignore_errors=True)


def app_files() -> dict[str, bytes]:
    """The Flower app that imports this package, by the names of its files."""
    folder = resources.files("fedipfs.server").joinpath("flower_app")
    names = ("pyproject.toml", "server_app.py", "client_app.py")
    return {name: folder.joinpath(name).read_bytes() for name in names}
