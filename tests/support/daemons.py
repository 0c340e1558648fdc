"""Real IPFS daemons for tests. js-ipfs (npm) runs here; a Kubo is used where one is named.

Packages are installed once into the user's cache folder and shared by all runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

READY_S, STOP_S, INSTALL_S, GC_S = 60, 10, 240, 60
NODE = 20  # the oldest release of Node.js that js-ipfs was tried with
TAIL = 2000  # characters of a log that an error shows
_IPFS = Path(__file__).parent / "ipfs"
_ADDRESS = re.compile(r"/(?:ip4|dns|dns4)/([^/]+)/tcp/(\d+)")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy to loopback


class Unavailable(RuntimeError):
    """A daemon cannot be had on this machine; the message says why."""


class DaemonFailed(RuntimeError):
    """A daemon did not start; the message ends with what it wrote."""


def available() -> str | None:
    """None when js-ipfs can run here, else why not. Installs its packages the first time."""
    try:
        _packages()
    except Unavailable as error:
        return str(error)
    return None


class Remote:
    """A daemon that somebody else runs, by the multiaddr of its RPC."""

    def __init__(self, address: str) -> None:
        found = _ADDRESS.fullmatch(address)
        if not found:
            raise ValueError(f"{address!r} is not a multiaddr such as /ip4/127.0.0.1/tcp/5001")
        self.address = address
        self.url = f"http://{found[1]}:{found[2]}"


class JsIpfs:
    """One js-ipfs daemon on 127.0.0.1, offline, on a repository folder that it makes if need be.

    Without `port` it takes a free one at the first start and keeps it. What it writes goes to
    `daemon.log` in the repository. It ends when the process that started it ends.
    """

    def __init__(self, repo: Path, port: int | None = None) -> None:
        self.repo = repo
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """The multiaddr of its RPC."""
        return f"/ip4/127.0.0.1/tcp/{self._known_port()}"

    @property
    def url(self) -> str:
        """The same as a URL, without the path."""
        return f"http://127.0.0.1:{self._known_port()}"

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it and wait until it serves. Raises DaemonFailed, and Unavailable without Node."""
        if self._process is not None:
            raise RuntimeError(f"the daemon on {self.repo} runs already: stop it first")
        packages = _packages()
        self.repo.mkdir(parents=True, exist_ok=True)
        command = ["node", _IPFS / "daemon.mjs", packages, self.repo, str(self.port or 0)]
        with (self.repo / "daemon.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closed with this process: the daemon's sign to end
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        try:
            self.port = self._wait_until_ready()
        except BaseException:
            self._end()  # and leave the lock: it may be another daemon's
            raise

    def stop(self) -> None:
        """End it in good order; kill it if it takes more than 10 s. Nothing if it does not run."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGCONT)  # a suspended process does not see the first
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        else:
            self._close()

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is None:
            return
        self._end()
        shutil.rmtree(self.repo / "repo.lock", ignore_errors=True)  # else held for 20 s more

    def restart(self) -> None:
        """Stop it and start it again, on the same repository and port."""
        self.stop()
        self.start()

    def suspend(self) -> None:
        """Freeze it: it still accepts connections, and answers nothing."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `suspend`."""
        self._running().send_signal(signal.SIGCONT)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"the daemon on {self.repo} does not run: start it first")
        return self._process

    def _known_port(self) -> int:
        if self.port is None:
            raise RuntimeError(f"the daemon on {self.repo} has no port yet: start it first")
        return self.port

    def _wait_until_ready(self) -> int:
        stdout = self._running().stdout
        assert stdout is not None
        arrived, _, _ = select.select([stdout], [], [], READY_S)
        word, _, port = stdout.readline().decode().partition(" ") if arrived else ("", "", "")
        if word != "ready":
            problem = "ended at its start" if arrived else f"is not ready after {READY_S} s"
            log = (self.repo / "daemon.log").read_text(errors="replace")[-TAIL:]
            raise DaemonFailed(f"js-ipfs on {self.repo} {problem}: {log}")
        return int(port)

    def _end(self) -> None:
        self._running().kill()
        self._close()

    def _close(self) -> None:
        process, self._process = self._running(), None
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def collect_garbage(daemon: JsIpfs | Remote) -> list[str]:
    """Remove every block of a daemon that no pin keeps; their CIDs.

    js-ipfs names them all as raw blocks, and walks every pinned DAG again for each of them: keep
    few blocks pinned.
    """
    request = urllib.request.Request(f"{daemon.url}/api/v0/repo/gc", method="POST")
    with _direct.open(request, timeout=GC_S) as response:
        answers = [json.loads(line) for line in response if line.strip()]
    if errors := [answer["Error"] for answer in answers if answer.get("Error")]:
        raise RuntimeError(f"repo/gc: {errors[0]}")
    return [answer["Key"]["/"] for answer in answers]


def installed_once(name: str, fill: Callable[[Path], None]) -> Path:
    """The cached folder `name`; if there is none, what `fill` puts into the folder it is given.

    The folder appears complete or not at all, also when two processes want it at the same time.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "fedipfs" / "test-daemons" / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f"{name}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _fill(target, fill)
    except OSError as error:
        raise Unavailable(f"cannot write {target}: {error.strerror}") from None
    return target


def _fill(target: Path, fill: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as folder:
        fresh = Path(folder) / "fresh"
        fresh.mkdir()
        fill(fresh)
        fresh.rename(target)


def run_installer(what: str, command: list[str], folder: Path) -> None:
    """Run a package manager's command in `folder`. Raises Unavailable with its last words."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=INSTALL_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{what}: {error}") from None
    if done.returncode:
        raise Unavailable(f"{what}: {command[0]} failed: {' '.join(done.stdout[-TAIL:].split())}")


def _packages() -> Path:
    """The folder with js-ipfs' node_modules. Raises Unavailable."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise Unavailable(f"js-ipfs: no {program} on PATH")
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        version = subprocess.check_output(["node", "--version"], text=True, timeout=10)
        if int(version.lstrip("v").partition(".")[0]) < NODE:
            raise Unavailable(f"js-ipfs: node {version.strip()} is older than {NODE}")
    lockfile = hashlib.sha256((_IPFS / "package-lock.json").read_bytes()).hexdigest()
    return installed_once(f"js-ipfs-{lockfile[:16]}", _npm_ci)


def _npm_ci(folder: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(_IPFS / name, folder)
    options = ["--omit=optional", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund"]
    run_installer("js-ipfs", ["npm", "ci", *options], folder)
