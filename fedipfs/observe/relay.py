"""Progress of a run in another process: written to a file there, shown here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedipfs.observe.progress import Progress

_SHOWN = ("start", "tell", "phase", "round_started", "client_done", "round_done", "finish")


class Relay(Progress):
    """A Progress that shows nothing and writes what it is told, a JSON text a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(quiet=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def emit(self, what: str, *given: Any, **named: Any) -> None:
        """Write an event."""
        line = json.dumps([what, given, named], default=str) + "\n"
        os.write(self._file, line.encode())

    def start(
        self, run_id: str, experiment: str, rounds_total: int, first_round: int, note: str | None
    ) -> None:
        self.emit("start", run_id, experiment, rounds_total, first_round, note)

    def tell(self, text: str, *, important: bool = False) -> None:
        self.emit("tell", text, important=important)

    def phase(self, text: str) -> None:
        self.emit("phase", text)

    def round_started(self, n: int, cohort: int) -> None:
        self.emit("round_started", n, cohort)

    def client_done(self, name: str, ok: bool) -> None:
        self.emit("client_done", name, ok)

    def round_done(self, line: dict[str, Any]) -> None:
        self.emit("round_done", line)

    def finish(
        self, summary: dict[str, Any], folder: Path | None = None, store: str | None = None
    ) -> None:
        self.emit("finish", summary, str(folder) if folder else None, store)


class Tail:
    """The events that a Relay writes, as they come."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def new(self) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
        """Those that came since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return  # its end is yet to come
            self._at += len(line)  # before it is handled: an interrupt loses no other
            what, given, named = json.loads(line)
            yield what, given, named


def show(progress: Progress, what: str, given: list[Any], named: dict[str, Any]) -> bool:
    """Do an event on `progress`; False if it is none of a Progress."""
    if what not in _SHOWN:
        return False
    if what == "finish" and given[1] is not None:
        given[1] = Path(given[1])
    getattr(progress, what)(*given, **named)
    return True
