"""A SuperLink and its SuperExec as children of this process, which starts them anew if they die.

They are two processes, so that a run outlives the SuperLink: what it knows is in its database,
and the ServerApp, a child of the SuperExec, tries again until it is back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from fedipfs.errors import ConfigError, RunFailed, one_line
from fedipfs.server.engine import serverapp
from fedipfs.server.engine.control import LOOPBACK, Control, listening
from fedipfs.server.membership import Home, Registry, synchronise
from fedipfs.trust import files, tls
from fedipfs.trust.identity import PASSPHRASE

_START_S, _STOP_S, _LOOK_S = 60.0, 10.0, 0.2
_SOON_S, _TRIES = 10.0, 5  # who dies so soon so often will not live
_MAX_LOG = 16 << 20  # bytes, then the log is begun anew and the last one kept
_TAIL = 2000
_LEASH = [sys.executable, "-m", "fedipfs.server.engine.leash"]


UP, MANAGED = "up", "managed"  # by `fedipfs-server up`, or by a run for as long as that lasts


class Link(NamedTuple):
    """A SuperLink that is up, and what keeps it so, if this process does."""

    control: Control
    supervisor: Supervisor | None

    def check(self) -> None:
        """RunFailed if it will not stay up."""
        if self.supervisor is not None:
            self.supervisor.check()


@contextlib.contextmanager
def superlink(home: Home, *, start: bool) -> Iterator[Link]:
    """The SuperLink of a federation: the one that is up, else one for as long as this lasts.

    Its nodes are those of the members. Raises ConfigError if none is up and `start` says not to
    start one, or if another run keeps one up for itself; RunFailed if it does not come up.
    """
    with contextlib.ExitStack() as stack:
        supervisor = None
        match keeper(home):
            case None if not start:
                raise ConfigError(
                    f"no SuperLink of {home.organization} is up on this machine: start it with "
                    "`fedipfs-server up`, or leave engine.superlink at managed"
                )
            case None:
                supervisor = stack.enter_context(Supervisor(home, MANAGED))
            case kind if kind == MANAGED:
                raise ConfigError(
                    "another run keeps the SuperLink up, and ends it when it is over: wait for "
                    "that, or have `fedipfs-server up` keep it for all runs"
                )
            case _:
                _await(lambda: listening(home.http_port) or keeper(home) is None)
        control = stack.enter_context(Control.reach(home))
        if control is None:
            raise RunFailed(
                f"the SuperLink does not answer on port {home.http_port}: see the log of "
                "`fedipfs-server up`"
            )
        synchronise(Registry.open(home), control)
        yield Link(control, supervisor)


def keeper(home: Home) -> str | None:
    """What keeps this federation's SuperLink up, UP or MANAGED; None if nothing does."""
    with _lock_file(home) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may ask at the same time
        except BlockingIOError:
            lock.seek(0)
            return MANAGED if lock.read().strip() == MANAGED else UP
    return None


def _await(there: Callable[[], bool]) -> bool:
    """Whether it is so within _START_S seconds."""
    deadline = time.monotonic() + _START_S
    while not (found := there()) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return found


@dataclass
class _Child:
    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    began: list[float] = field(default_factory=list)  # of the last starts


class Supervisor:
    """Keeps a SuperLink and a SuperExec up while it is entered; one at a time a home.

    `kind` is UP or MANAGED. Runs that `flwr run` submits, whose settings are anybody's who reaches
    the Control API, are done only with `others`.
    """

    def __init__(self, home: Home, kind: str = UP, *, others: bool = False) -> None:
        self._home, self._kind = home, kind
        self._lock: IO[str] | None = None
        self._stop = threading.Event()
        self._failure: str | None = None
        self._watch = threading.Thread(target=self._look_after, daemon=True)
        logs = home.path / "logs"
        self._children = [
            _Child("SuperLink", _superlink(home), _link_environment(home), logs / "superlink.log"),
            _Child(
                "SuperExec",
                _superexec(home),
                _exec_environment(home, others),
                logs / "superexec.log",
            ),
        ]

    def __enter__(self) -> Supervisor:
        self._lock = _lock_file(self._home)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(
                f"the SuperLink of {self._home.organization} is up already: use it, or stop it"
            ) from None
        try:
            self._lock.truncate(0)
            self._lock.write(f"{self._kind}\n")
            self._lock.flush()
            self._refuse_to_start()
            (self._home.path / "logs").mkdir(mode=0o700, exist_ok=True)
            _write_program(self._home)
            for child in self._children:
                self._start(child)
            link = self._children[0]
            if not _await(lambda: self._listens() or not _lives(link)) or not self._listens():
                raise RunFailed(f"the SuperLink does not come up: {_last_words(link.log)}")
            self._watch.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        self._stop.set()
        if self._watch.ident is not None:
            self._watch.join()
        for end in (signal.SIGTERM, signal.SIGKILL):
            for child in reversed(self._children):  # no ServerApp is begun any more
                if child.process is not None and child.process.poll() is None:
                    child.process.send_signal(end)
            deadline = time.monotonic() + _STOP_S
            for child in self._children:
                if child.process is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.process.wait(max(0.0, deadline - time.monotonic()))
        assert self._lock is not None
        self._lock.close()

    def wait(self) -> None:
        """Until one of them will not stay up: RunFailed with its last words."""
        while not self._stop.wait(_LOOK_S):
            pass
        self.check()

    def check(self) -> None:
        """RunFailed if one of them would not stay up."""
        if self._failure:
            raise RunFailed(self._failure)

    def _listens(self) -> bool:
        home = self._home
        return listening(home.http_port) and listening(home.fleet_port, home.bind)

    def _refuse_to_start(self) -> None:
        home = self._home
        for port, host in ((home.fleet_port, home.bind), (home.http_port, LOOPBACK)):
            if listening(port, host):
                raise ConfigError(
                    f"port {port} is in use on this machine: stop what uses it, or change "
                    f"{self._home.config}"
                )
        certificate = self._home.certificate.read_text()
        if (left := tls.ends(certificate).timestamp() - time.time()) <= 0:
            raise ConfigError(
                f"{self._home.certificate} has expired {-left / 86400:.0f} days ago, and partners "
                "will refuse it: run `fedipfs-server renew`"
            )

    def _start(self, child: _Child) -> None:
        child.began = [*child.began, time.monotonic()][-_TRIES:]
        if child.log.exists() and child.log.stat().st_size > _MAX_LOG:
            os.replace(child.log, child.log.with_suffix(".log.1"))
        with open(child.log, "ab", opener=_private) as log:
            child.process = subprocess.Popen(
                [*_LEASH, str(os.getpid()), *child.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child.environment,
                start_new_session=True,  # Ctrl-C is for this process, which stops them in order
            )

    def _look_after(self) -> None:
        while not self._stop.wait(_LOOK_S):
            for child in self._children:
                if child.process is None or child.process.poll() is None:
                    continue
                often = len(child.began) == _TRIES
                if often and time.monotonic() - child.began[0] < _TRIES * _SOON_S:
                    self._failure = (
                        f"the {child.name} ends as soon as it is started: {_last_words(child.log)}"
                    )
                    self._stop.set()
                    return
                self._start(child)


def _lives(child: _Child) -> bool:
    return child.process is not None and child.process.poll() is None


def _environment(home: Home) -> dict[str, str]:
    """What Flower's processes on the coordinator's machine have in their environment."""
    own = {
        "FEDIPFS_HOME": str(home.path.absolute()),
        "FLWR_HOME": str(home.flower.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "NO_PROXY": LOOPBACK,
        "no_proxy": LOOPBACK,
    }
    return {**os.environ, **own}


def _link_environment(home: Home) -> dict[str, str]:
    found = _environment(home)
    found.pop(PASSPHRASE, None)  # the keys are none of the SuperLink's
    return found


def _exec_environment(home: Home, others: bool) -> dict[str, str]:
    """That of the SuperExec, which starts Flower's programs by their names: only ours is found."""
    found = _environment(home)
    found[serverapp.PATH], found["PATH"] = found.get("PATH", ""), str(_programs(home))
    found[serverapp.OTHERS] = "1" if others else ""
    return found


def _programs(home: Home) -> Path:
    return (home.flower / "bin").absolute()


def _write_program(home: Home) -> None:
    """What the SuperExec finds under the name of Flower's ServerApp program."""
    folder = _programs(home)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    module = "fedipfs.server.engine.serverapp"
    text = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n'
    files.write_whole(folder / "flwr-serverapp", text, 0o700)


def _superlink(home: Home) -> list[str]:
    return [
        _program("flower-superlink"),
        *("--ssl-certfile", str(home.certificate), "--ssl-keyfile", str(home.certificate_key)),
        *("--ssl-ca-certfile", str(home.ca), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(home.secret)),
        *("--database", str(home.database), "--fleet-api-address", home.fleet_address),
        *("--host", LOOPBACK, "--port", str(home.http_port)),
        "--disable-runtime-dependency-installation",  # it would run `uv sync`
    ]


def _superexec(home: Home) -> list[str]:
    return [
        _program("flower-superexec"),
        *("--runtime-api-address", f"{LOOPBACK}:{home.http_port}"),
        *("--root-certificates", str(home.ca)),
        *("--superexec-auth-secret-file", str(home.secret)),
    ]


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed beside this Python: install flwr 1.39")
    return found


def _lock_file(home: Home) -> IO[str]:
    return open(home.path / "superlink.lock", "a+", opener=_private)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _last_words(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    told = [line for line in lines if line.strip()]
    return one_line(told[-1], 300) + f" (more in {log})" if told else f"it said nothing ({log})"
