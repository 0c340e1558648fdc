"""The real IPFS daemons that other tests stand on: they start, keep, exchange and end."""

from __future__ import annotations

import io
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import daemons
import pytest
from daemon_fixtures import need
from daemons import DaemonFailed, JsIpfs, Remote, collect_garbage
from ipfshttpclient.client import Client
from kubo_node import KuboFailed, KuboNode, KuboTimeout, swarm_key
from kubo_node import available as kubo_available

from fedipfs.ipld import unixfs
from fedipfs.ipld.cid import CID

pytestmark = pytest.mark.slow
OPTIONS = {"cid-version": 1, "raw-leaves": True, "chunker": "size-1048576", "cid-base": "base32"}


@pytest.fixture
def kubo(tmp_path: Path):
    """Starts Kubo nodes by name; all end with the test."""
    need(kubo_available())
    nodes: list[KuboNode] = []

    def start(name: str, **options) -> KuboNode:
        nodes.append(KuboNode(tmp_path / name, **options))
        nodes[-1].start()
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop()


def add(client: Client, data: bytes, pin: bool = True) -> str:
    return client.add_bytes(data, opts={**OPTIONS, "pin": pin})


def blocks_of(data: bytes, cuts: list[int]) -> tuple[CID, dict[CID, bytes]]:
    """A file's root and blocks, its leaves ending at `cuts`."""
    blocks: dict[CID, bytes] = {}

    def put(block, codec: int) -> CID:
        cid = CID.of(block, codec)
        blocks[cid] = bytes(block)
        return cid

    return unixfs.build((data[a:b] for a, b in zip([0, *cuts], cuts, strict=False)), put), blocks


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.05)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_shared_daemon_keeps_what_is_added_under_our_cid(ipfs_daemon: JsIpfs | Remote) -> None:
    data = random.Random(1).randbytes(2_500_000)
    with closing(Client(ipfs_daemon.address, session=True)) as client:
        assert client.id()["ID"]
        assert client.version()["Version"]
        cid = add(client, data)
        assert cid == str(unixfs.cid_of(data))
        assert client.cat(cid) == data


def test_full_leaf_fits_in_a_block_put(ipfs_daemon: JsIpfs | Remote) -> None:
    leaf = random.Random(3).randbytes(unixfs.CHUNK)
    with closing(Client(ipfs_daemon.address, session=True)) as client:
        options = {"format": "raw", "version": 1, "cid-codec": "raw"}  # js-ipfs', then Kubo's
        key = client.block.put(io.BytesIO(leaf), opts=options)["Key"]
        assert CID.parse(key).to_v1() == CID.of(leaf)


def test_restart_keeps_pinned_blocks_and_garbage_collection_the_pinned(own_daemon: JsIpfs) -> None:
    address = own_daemon.address
    with closing(Client(address, session=True)) as client:
        kept, lost = add(client, b"kept"), add(client, b"lost", pin=False)
        own_daemon.restart()
        assert own_daemon.address == address
        assert client.cat(kept) == b"kept" and client.cat(lost) == b"lost"
        gone = collect_garbage(own_daemon)
        assert [CID.parse(cid).digest for cid in gone] == [CID.parse(lost).digest]
        assert client.cat(kept) == b"kept"


def test_killed_daemon_starts_again_on_its_repository(own_daemon: JsIpfs) -> None:
    with closing(Client(own_daemon.address, session=True)) as client:
        cid = add(client, b"before the power cut")
        own_daemon.kill()
        own_daemon.start()
        assert client.cat(cid) == b"before the power cut"


def test_stopping_frees_the_port(own_daemon: JsIpfs) -> None:
    port = own_daemon.port
    assert port and not is_free(port)
    own_daemon.stop()
    assert is_free(port)


def test_suspended_daemon_accepts_but_does_not_answer(own_daemon: JsIpfs) -> None:
    assert own_daemon.port
    own_daemon.suspend()
    with socket.create_connection(("127.0.0.1", own_daemon.port), timeout=10) as connection:
        connection.sendall(b"POST /api/v0/id HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        connection.settimeout(1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        own_daemon.resume()
        connection.settimeout(10)
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_second_daemon_on_a_repository_fails_and_shows_why(own_daemon: JsIpfs) -> None:
    with pytest.raises(DaemonFailed, match=r"(?i)lock"):
        JsIpfs(own_daemon.repo).start()
    with closing(Client(own_daemon.address, session=True)) as client:
        assert client.id()["ID"], "the first one runs on"


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_daemon_ends_with_the_process_that_started_it(tmp_path: Path, end: str) -> None:
    need(daemons.available())
    code = (
        "import os, sys, pathlib, daemons\n"
        "daemon = daemons.JsIpfs(pathlib.Path(sys.argv[1])); daemon.start()\n"
        "print(daemon.port, flush=True)\n"
        "sys.stdin.read(1)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "repo")],
        env={**os.environ, "PYTHONPATH": str(Path(daemons.__file__).parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout
        port = int(parent.stdout.readline())
        assert not is_free(port)
        if end == "kill":
            parent.kill()
    wait_until(lambda: is_free(port))


def test_missing_node_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert daemons.available() == "js-ipfs: no node on PATH"


def test_missing_daemon_skips_or_fails_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDIPFS_REQUIRE_DAEMONS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no node"):
        need("no node")
    monkeypatch.setenv("FEDIPFS_REQUIRE_DAEMONS", "1")
    with pytest.raises(pytest.fail.Exception, match="no node"):
        need("no node")


def test_two_processes_install_once(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time, daemons\n"
        "def fill(folder):\n"
        "    pathlib.Path(sys.argv[1]).open('a').write('x'); time.sleep(0.3)\n"
        "    (folder / 'a').write_text('')\n"
        "print((daemons.installed_once('thing', fill) / 'a').exists())\n"
    )
    path = {"PYTHONPATH": str(Path(daemons.__file__).parent), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path / "fills")]
    two = [
        subprocess.Popen(command, env={**os.environ, **path}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in two] == ["True", "True"]
    assert (tmp_path / "fills").read_text() == "x"


def test_failed_install_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        daemons.run_installer("thing", [sys.executable, "-c", "print('why'); exit(1)"], folder)

    with pytest.raises(daemons.Unavailable, match=r"thing: .* failed: why"):
        daemons.installed_once("thing", fail)
    assert [path.name for path in (tmp_path / "fedipfs/test-daemons").iterdir()] == ["thing.lock"]


def test_kubo_fetches_a_file_of_uneven_leaves_by_our_root(kubo, tmp_path: Path) -> None:
    """The leaves of a safetensors file: its header, then a leaf or more a tensor."""
    data = random.Random(2).randbytes(3_000_000)
    root, blocks = blocks_of(
        data, [248, 760, 1_049_336, 1_600_000, 1_600_010, 2_600_000, 3_000_000]
    )
    assert len(blocks) == 8 and root != unixfs.cid_of(data)
    holder, fetcher = kubo("holder", blocks=blocks), kubo("fetcher")
    fetcher.connect(holder.address())
    assert fetcher.peers() == [holder.peer_id()]
    fetcher.download(root, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == data
    holder.stop()
    fetcher.pin(root)  # all of it is here now


def test_kubo_adds_files(kubo, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello world\n")
    # The CID that the IPFS documentation shows for these bytes and Kubo's defaults.
    wanted = "QmT78zSuBmuS4z925WZfrqQ1qHaJ56DQaTfyMUF7F8ff5o"
    assert kubo("node").add(tmp_path / "file") == wanted


def test_private_swarm_lets_in_its_own_key_only(kubo) -> None:
    key = swarm_key()
    one, two, stranger = (
        kubo("one", swarm_key=key),
        kubo("two", swarm_key=key),
        kubo("stranger", swarm_key=swarm_key()),
    )
    two.connect(one.address())
    assert one.peers() == [two.peer_id()]
    with pytest.raises(KuboFailed, match="failed to negotiate security protocol"):
        stranger.connect(one.address())
    assert one.peers() == [two.peer_id()] and stranger.peers() == []


def test_kubo_call_that_hangs_is_cut_off(kubo, tmp_path: Path) -> None:
    node = kubo("node")
    with pytest.raises(KuboTimeout, match="no answer after 1 s"):
        node.download(CID.of(b"nobody has this"), tmp_path / "never", deadline=1)
    with pytest.raises(KuboFailed, match="does not run"):
        node.peer_id()
