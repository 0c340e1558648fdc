"""A run's folder: what is written there, when, and by whom."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, ClassVar

from typing_extensions import Buffer

from fedipfs.errors import CidError, RunError, StoreUnusable
from fedipfs.ipld import CID

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = ("store", "sweeps")


class RunFolder:
    """`runs_dir/run_id`, held by one process at a time.

    `create` makes a new one, `open` one to resume; both raise RunError with the remedy.
    """

    latest: ClassVar[RunFolder | None] = None  # the one that this process last worked on

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path, self._lock = path, lock
        RunFolder.latest = self

    @property
    def run_id(self) -> str:
        return self.path.name

    @classmethod
    def create(cls, runs_dir: str, run_id: str | None, experiment: str) -> RunFolder:
        """A new folder; without `run_id`, one named by time and experiment."""
        if run_id is None:
            run_id = new_name(experiment)
        if not _NAME.fullmatch(str(run_id)) or run_id in _RESERVED:
            raise RunError(
                f"run_id={run_id} cannot name a folder here; use letters, digits, '.', '_' and "
                f"'-', and none of {', '.join(_RESERVED)}"
            )
        path = Path(runs_dir) / str(run_id)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise RunError(
                f"the run folder {path} exists; choose another run_id, or go on with it: "
                f"resume={run_id}"
            ) from None
        except OSError as error:
            raise StoreUnusable(
                f"cannot create the run folder {path}: {error.strerror}; choose another runs_dir"
            ) from error
        return cls(path, _locked(path))

    @classmethod
    def open(cls, runs_dir: str, run_id: str) -> RunFolder:
        """An existing folder, to go on with its run."""
        path = Path(runs_dir) / run_id
        if not (path / "config.yaml").is_file():
            raise RunError(
                f"there is no run {run_id!r} in {runs_dir}; `fedipfs runs ls` lists what is there"
            )
        return cls(path, _locked(path))

    @classmethod
    def begun(cls, path: Path) -> bool:
        """Whether a run has begun in the folder `path`; one in which none has is taken away.

        Raises RunError where another process works on it.
        """
        if path.is_dir():
            folder = cls(path, _locked(path))
            folder.close()
        return (path / "config.yaml").is_file()

    @property
    def resumable(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "config.yaml").is_file()

    def close(self) -> None:
        """Let other processes in. A folder in which no run began is taken away."""
        if not self.resumable:
            with contextlib.suppress(OSError):  # whatever else is there stays
                shutil.rmtree(self.path / "keys", ignore_errors=True)  # nothing is sealed to them
                (self.path / "log.txt").unlink(missing_ok=True)
                (self.path / ".lock").unlink(missing_ok=True)
                self.path.rmdir()
        self._lock.close()

    def write(self, name: str, text: str) -> None:
        """Replace a file atomically and durably."""
        temporary = self.path / f".{name}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)

    def read(self, name: str) -> str:
        """A file's text; RunError if it is not there."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise RunError(
                f"{self.path / name} cannot be read ({why}): the run cannot be resumed; "
                "start it anew"
            ) from error

    @property
    def head(self) -> CID | None:
        """The last round's record, or None before the first; RunError if it is garbled."""
        if not (self.path / "head").exists():
            return None
        text = self.read("head").strip()
        try:
            return CID.parse(text)
        except CidError:
            raise RunError(
                f"{self.path / 'head'} should hold one CID, not {text[:80]!r}; put there the "
                "record_cid of the last line of metrics.jsonl"
            ) from None

    def count(self, name: str) -> int:
        """The number that a file holds; 0 if it is not there. Raises RunError."""
        if not (self.path / name).exists():
            return 0
        text = self.read(name).strip()
        if not text.isdecimal():
            raise RunError(f"{self.path / name} should hold a number, not {text[:80]!r}")
        return int(text)

    def lines(self) -> list[dict[str, Any]]:
        """The rounds in metrics.jsonl; a line cut short by a crash is left out."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for text in (self.path / "metrics.jsonl").read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict) and "round" in line:
                        lines.append(line)
        return lines

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a round to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def rewrite(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace metrics.jsonl."""
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def write_model(self, name: str, pieces: Iterable[Buffer]) -> Path:
        """Write a safetensors file atomically; returns its path."""
        path = self.path / name
        temporary = self.path / f".{name}.tmp"
        with open(temporary, "wb") as file:
            file.writelines(pieces)
        os.replace(temporary, path)
        return path


def new_name(experiment: str) -> str:
    """A name for a run: by time and experiment."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{experiment}-{token_hex(2)}"


def usable(runs_dir: str) -> None:
    """Make `runs_dir` if it is not there; StoreUnusable if nothing can be written in it."""
    try:
        Path(runs_dir).mkdir(parents=True, exist_ok=True)
        why = "" if os.access(runs_dir, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise StoreUnusable(
            f"runs_dir={runs_dir} cannot be used ({why}); choose a folder that can be written"
        )


def _locked(path: Path) -> IO[str]:
    try:
        lock = open(path / ".lock", "w")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise RunError(
            f"the run folder {path} cannot be written ({error.strerror}); make it writable"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunError(
            f"another process works on the run {path.name}; wait for it or stop it"
        ) from None
    return lock
