"""Who gets through to a real SuperLink, and who is refused: real SuperNodes, over TLS."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedipfs.clients import joining as site
from fedipfs.server import commands
from fedipfs.server.engine.control import Control
from fedipfs.server.membership import Home, Registry, synchronise
from fedipfs.trust import TrustList, tls
from fedipfs.trust.joining import now

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

START_S, REFUSED_S, STOP_S = 60.0, 60.0, 10.0
SCRIPTS = Path(sys.executable).parent


Node = tuple[subprocess.Popen[bytes], Path]  # and its log


class Machine:
    """Starts Flower's programs with a log each, and stops them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def spawn(self, name: str, *command: str) -> Node:
        (self.folder / "flower").mkdir(exist_ok=True)
        log = self.folder / f"{len(self.started)}-{name}.log"
        env = {
            **os.environ,
            "PATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(self.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(SCRIPTS / command[0]), *command[1:]], env=env, stdout=file, stderr=file
            )
        self.started.append(process)
        return process, log

    def superlink(self, home: Home) -> None:
        """The SuperLink of a coordinator's folder."""
        process, log = self.spawn(
            f"superlink-{home.fleet_port}",
            *("flower-superlink", "--ssl-ca-certfile", str(home.ca)),
            *("--ssl-certfile", str(home.certificate), "--ssl-keyfile", str(home.certificate_key)),
            *("--enable-supernode-auth", "--isolation", "process"),
            *("--superexec-auth-secret-file", str(home.secret)),
            *("--database", str(home.database), "--fleet-api-address", home.fleet_address),
            *("--port", str(home.http_port), "--disable-runtime-dependency-installation"),
        )

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            return listens(home.http_port) and listens(home.fleet_port)

        wait_until(up, START_S, lambda: log.read_text())

    def supernode(self, folder: Path, address: str, *, security: list[str] | None = None) -> Node:
        """The SuperNode of a site that has joined, or with other `security`."""
        (port,) = free_ports(1)
        return self.spawn(
            f"supernode-{folder.name}",
            *("flower-supernode", "--superlink", address, "--port", str(port)),
            *("--isolation", "process", "--max-retries", "1"),
            *(security or proven(folder, folder / "ca.pem")),
        )

    def stop(self) -> None:
        for end in (subprocess.Popen.terminate, subprocess.Popen.kill):
            for process in self.started:
                if process.poll() is None:
                    end(process)
            for process in self.started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)


def proven(folder: Path, ca: Path) -> list[str]:
    """What a SuperNode says who it is with, and whom it believes."""
    key = str(folder / "node.key")
    return ["--auth-supernode-private-key", key, "--root-certificates", str(ca)]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_until(true: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def last_words(node: Node) -> str:
    """What a SuperNode said that has ended by itself."""
    process, log = node
    try:
        process.wait(REFUSED_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it goes on: {log.read_text()}") from None
    return log.read_text(errors="replace")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    try:
        yield machine
    except BaseException:
        for log in sorted(tmp_path.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')}")
        raise
    finally:
        machine.stop()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("FEDIPFS_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("FEDIPFS_PASSPHRASE", raising=False)
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "hub")


def make(folder: Path) -> Home:
    fleet, http = free_ports(2)
    return Home.create(
        folder,
        host="localhost",
        organization="hub",
        fleet_port=fleet,
        http_port=http,
        bind="127.0.0.1",
    )


def coordinate(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert commands.main(argv) == 0
    return capsys.readouterr().out


def admitted(home: Home, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What was said when a site was admitted, which it has then joined."""
    site.init(folder, folder.name)
    told = coordinate(capsys, "admit", f"{folder.name}.join.json", "--yes")
    (own,) = TrustList.load(home.trust).entries("hub", "coordinator")
    path = Path(f"{folder.name}.federation.json")
    site.join(folder, path, fingerprint=own.identity.fingerprint)
    return told


def members(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found = json.loads(coordinate(capsys, "members", "--json"))["members"]
    return {one["organization"]: one for one in found}


def test_who_gets_through(
    machine: Machine, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Admitted before the SuperLink is up, and while it is.
    early, late, stranger = (tmp_path / name for name in ("early", "late", "stranger"))
    assert "no SuperLink is running" in admitted(home, early, capsys)
    machine.superlink(home)
    assert "let the node of late in" in admitted(home, late, capsys)
    nodes = [machine.supernode(folder, home.address) for folder in (early, late)]

    # Not registered, without a key at all, sure of another authority, and in plain text.
    site.init(stranger, "stranger")
    other = tmp_path / "other.pem"
    other.write_text(tls.new_authority("hub", now()).certificate)
    refused = {
        "[code: 2004] Failed to activate SuperNode": proven(stranger, home.ca),
        "[code: 2001] SuperNode authentication is enabled": ["--root-certificates", str(home.ca)],
        "CERTIFICATE_VERIFY_FAILED": proven(late, other),
        "Giving up reconnection": ["--insecure"],
    }
    told = {
        words: machine.supernode(stranger, home.address, security=security)
        for words, security in refused.items()
    }
    for words, node in told.items():
        assert words in last_words(node)

    def both_online() -> bool:
        return all(one["connected"] for one in members(capsys).values())

    wait_until(both_online, START_S, lambda: nodes[0][1].read_text() + nodes[1][1].read_text())
    assert set(members(capsys)) == {"early", "late"}

    assert "shut out a node of late" in coordinate(capsys, "remove", "late", "--yes")
    assert "SuperNode terminated" in last_words(nodes[1])
    again = machine.supernode(late, home.address)
    assert "[code: 2004] Failed to activate SuperNode" in last_words(again)
    assert {name: one["connected"] for name, one in members(capsys).items()} == {
        "early": True,
        "late": False,
    }
    assert nodes[0][0].poll() is None


def test_an_expired_certificate_and_a_renewed_one(
    machine: Machine, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "site"
    admitted(home, folder, capsys)
    pair = tls.Pair(home.ca.read_text(), home.ca_key.read_text())
    key = home.certificate_key.read_text()
    old = tls.new_certificate(pair, ["localhost"], now() - timedelta(days=2), days=1, key=key)
    home.certificate.write_text(old.certificate)
    machine.superlink(home)
    assert "certificate has expired" in last_words(machine.supernode(folder, home.address))
    machine.stop()
    coordinate(capsys, "renew")
    machine.superlink(home)
    with Control.reach(home) as control:
        assert control is not None
        assert synchronise(Registry.open(home), control) == ["let the node of site in"]
    node = machine.supernode(folder, home.address)
    wait_until(lambda: members(capsys)["site"]["connected"], START_S, lambda: node[1].read_text())
