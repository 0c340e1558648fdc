"""Fixtures of real IPFS daemons (a pytest plugin).

A test that cannot have its daemon skips and says why; with FEDIPFS_REQUIRE_DAEMONS=1 it fails.
FEDIPFS_KUBO_RPC, the multiaddr of a Kubo's RPC, puts that Kubo in the place of js-ipfs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import JsIpfs, Remote, available
from hostile_http import HostileServer

_NODES = ["imitation", pytest.param("daemon", marks=pytest.mark.slow)]


def need(reason: str | None) -> None:
    """Go on if `reason` is None; else skip, or fail where daemons are required."""
    if reason is None:
        return
    if os.environ.get("FEDIPFS_REQUIRE_DAEMONS") == "1":
        pytest.fail(f"FEDIPFS_REQUIRE_DAEMONS is set, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def ipfs_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JsIpfs | Remote]:
    """A running daemon that all tests share, with `.address` and `.url`: leave it running."""
    if address := os.environ.get("FEDIPFS_KUBO_RPC"):
        yield Remote(address)
        return
    need(available())
    daemon = JsIpfs(tmp_path_factory.mktemp("ipfs") / "repo")
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[JsIpfs]:
    """A running js-ipfs of the test's own, which it may stop, kill, suspend and restart."""
    if os.environ.get("FEDIPFS_KUBO_RPC"):
        pytest.skip("js-ipfs: FEDIPFS_KUBO_RPC names a daemon that tests may not stop")
    need(available())
    daemon = JsIpfs(tmp_path / "ipfs")
    daemon.start()
    yield daemon
    daemon.kill()


@pytest.fixture(params=_NODES)
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """The RPC of a node: of an imitation, and (slow) of the daemon that all tests share."""
    yield from _address(request, "ipfs_daemon")


@pytest.fixture(params=_NODES)
def own_address(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, of a node of the test's own, whose garbage may be collected."""
    yield from _address(request, "own_daemon")


def _address(request: pytest.FixtureRequest, daemon: str) -> Iterator[str]:
    if request.param == "imitation":
        with HostileServer() as server:
            yield server.address
    else:
        yield request.getfixturevalue(daemon).address
