"""Keeps a site's processes up: the worker, the SuperNode and the stub.

Each is a child in a session of its own, so that Ctrl-C reaches this process alone, which ends them
in order; and each ends with this process, also if that is killed. What they print goes to files in
the site's folder; what a partner wants to see of it is said in a few lines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import NamedTuple

from fedipfs.clients.ending import LEASH
from fedipfs.clients.home import Home
from fedipfs.errors import NodeFailed, NodeUnusable, one_line

Say = Callable[[str], None]


class Why(NamedTuple):
    """Why a child ended; `final` if to start it anew is no use."""

    text: str
    final: bool


Explain = Callable[[int, Sequence[str]], Why | None]

_SOON_S, _TRIES = 15.0, 4  # who ends so soon after its start, so often in a row, will not live
_PAUSES = (0.5, 2.0, 5.0, 15.0, 60.0)  # before another start, after the first, second, ... end
_STOP_S = 8.0
_LOG_BYTES, _LOGS = 4 << 20, 3
_LAST = 60  # lines of a child that are kept to explain its end
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Child:
    """A process to keep up: `command` are the words after `python -m fedipfs.clients`.

    `heard` is called with each line that it prints. `explain` says of its exit code and last lines
    why it ended, if they tell. `ready` begins the line with which it says that the children after
    it may be started; one that has none counts as ready when it has lived for a while.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    heard: Callable[[str], None] = lambda line: None
    explain: Explain = lambda code, lines: None
    ready: str | None = None
    process: subprocess.Popen[str] | None = None
    began: float = 0.0
    works: bool = False  # it was ready at least once
    ends: int = 0  # in a row, each soon after the start
    due: float | None = None  # when it is to be started
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST))


class Supervisor:
    """Runs `children` until a signal raises something, or one of them will not live.

    `say` gets lines for the partner.
    """

    def __init__(self, home: Home, children: Sequence[Child], say: Say) -> None:
        self._home, self._children, self._say = home, children, say
        # A child and whether it has ended; else it is ready.
        self._news: queue.SimpleQueue[tuple[Child, bool]] = queue.SimpleQueue()

    def run(self) -> None:
        """Raises NodeFailed with a child's last words, and NodeUnusable for what will not pass."""
        self._home.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._start(self._children[0])
            while True:
                due = [child.due for child in self._children if child.due is not None]
                wait = max(0.01, min(due) - time.monotonic()) if due else None
                with contextlib.suppress(queue.Empty):
                    child, ended = self._news.get(timeout=wait)
                    if ended:
                        self._note_end(child)
                    else:
                        child.works = True
                        self._start_next(child)
                for child in self._children:
                    if child.due is not None and child.due <= time.monotonic():
                        self._start(child)
        finally:
            self._stop()

    def _start(self, child: Child) -> None:
        child.due = None
        child.began = time.monotonic()
        child.last.clear()
        child.process = subprocess.Popen(
            # -P: nothing is imported from the working folder.
            [sys.executable, "-P", "-u", "-m", "fedipfs.clients", *child.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**child.environment, LEASH: str(os.getpid())},
            start_new_session=True,
        )
        threading.Thread(target=self._listen, args=(child, child.process), daemon=True).start()
        if child.ready is None:
            self._start_next(child)

    def _start_next(self, child: Child) -> None:
        for later in self._children[self._children.index(child) + 1 :]:
            if later.process is None:
                self._start(later)
                return

    def _listen(self, child: Child, process: subprocess.Popen[str]) -> None:
        """Write down what a child prints, to its end."""
        path = self._home.logs / f"{child.name}.log"
        log = _Log(path, maxBytes=_LOG_BYTES, backupCount=_LOGS)
        assert process.stdout is not None
        with contextlib.closing(log):
            for line in process.stdout:
                line = _COLOURS.sub("", line.rstrip("\n"))
                log.emit(logging.makeLogRecord({"msg": "%s", "args": (line,)}))
                child.last.append(line)
                child.heard(line)
                if child.ready is not None and line.startswith(child.ready):
                    self._news.put((child, False))
        process.wait()
        self._news.put((child, True))

    def _note_end(self, child: Child) -> None:
        assert child.process is not None
        code = child.process.returncode
        soon = time.monotonic() - child.began < _SOON_S
        child.works = child.works or (child.ready is None and not soon)
        child.ends = child.ends + 1 if soon or not child.works else 1
        words = [line for line in child.last if line.strip()]
        why = child.explain(code, words)
        log = self._home.logs / f"{child.name}.log"
        if why is not None and why.final:
            raise NodeUnusable(why.text)
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        if child.ends >= _TRIES and why is not None:
            raise NodeUnusable(f"{why.text} (more in {log})")
        # What has worked may again: one message may have been too much for it.
        if child.ends >= _TRIES and not child.works:
            said = one_line(words[-1], 300) if words else "nothing"
            told = f"the {child.name} {how} as often as it was started; it said last: {said}"
            raise NodeFailed(f"{told} (more in {log})")
        pause = _PAUSES[min(child.ends, len(_PAUSES)) - 1]
        child.due = time.monotonic() + pause
        told = why.text if why else f"the {child.name} {how} (see {log})"
        self._say(f"{told}; it is started anew in {pause:g} s")

    def _stop(self) -> None:
        """End the children in the opposite order: first who hands messages on."""
        for child in reversed(self._children):
            process = child.process
            if process is None or process.poll() is not None:
                continue
            for end in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, end)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_S)
                    break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started itself


class _Log(RotatingFileHandler):
    """A log that only this user can read."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", errors="replace", opener=_private)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def follow(path: Path, say: Callable[[str], None], stop: threading.Event) -> None:
    """Call `say` with each line that is added to the file at `path`, until `stop` is set."""
    place = path.stat().st_size if path.exists() else 0
    while not stop.wait(1.0):
        with contextlib.suppress(OSError), open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == place:
                continue
            stream.seek(place if size > place else 0)  # smaller: another file in its place
            data = stream.read(1 << 20)
            whole = data[: data.rfind(b"\n") + 1]
            place = stream.tell() - len(data) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                say(line)
