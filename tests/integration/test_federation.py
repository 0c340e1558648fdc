"""Three organizations with data, keys, stores and processes of their own, on one machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from daemon_fixtures import need
from daemons import JsIpfs, available
from federation import COORDINATOR, EXPERIMENT, HOSPITALS, Federation, demonstrate
from proxies import CountingProxy, free_ports
from swarm import Moved, Swarm

from fedipfs.errors import StoreTimeout
from fedipfs.ipld import CID
from fedipfs.store import dag
from fedipfs.store.kubo import KuboStore
from fedipfs.trust import nodekey

pytestmark = pytest.mark.slow

SMALL, LARGE = 33, 13836  # hidden values of sized.py: 26,245 and 10,999,630 parameters
MOST = 12_000  # bytes on the gRPC connection, per client and round
ROUND_S, IDLE_S = 4.0, 12.0  # a round on a machine that is free; four of Flower's idle polls


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST from $FEDIPFS_DATA or the cache, else its stand-in."""
    monkeypatch.setenv("FEDIPFS_OFFLINE", "1")


@contextlib.contextmanager
def federated(folder: Path, **options: Any) -> Iterator[Federation]:
    """A federation; what all of it has logged is printed if something fails."""
    federation = Federation(folder, say=print, **options)
    try:
        with federation:
            yield federation
    except BaseException:
        for log in federation.logs():
            print(f"--- {log.relative_to(folder)}\n{log.read_text(errors='replace')[-5000:]}")
        raise


@pytest.fixture
def swarm(tmp_path: Path):
    """Two parties, "here" and "there", each with a daemon; they are not connected."""
    need(available())
    daemons = [JsIpfs(tmp_path / name) for name in ("here", "there")]
    swarm = Swarm()
    try:
        for daemon in daemons:
            daemon.start()
            swarm.add(daemon.repo.name, daemon)
        yield swarm
    finally:
        swarm.stop()
        for daemon in daemons:
            daemon.kill()


def test_blocks_move_between_connected_daemons_and_only_on_demand(swarm, tmp_path: Path) -> None:
    here, there = swarm.relays["here"], swarm.relays["there"]
    near = KuboStore(here.address, timeout_s=20)
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3 << 20))
    root, wanted = dag.add_file(near, file), near.put(b"wanted")
    record = dag.put_record(near, {"file": root})
    near.publish()
    alone = KuboStore(there.address, timeout_s=2)
    with pytest.raises(StoreTimeout):
        alone.get(wanted)
    assert swarm.moved == {}
    far = KuboStore(there.address, timeout_s=20, peers=[here.swarm_address])
    assert far.get(wanted) == b"wanted" == far.get(wanted)
    assert swarm.moved == {("here", "there"): Moved(1, 6)}
    assert not far.has(root)
    assert b"".join(block for cid, block in far.leaves(root) if cid.codec == 0x55) == (
        file.read_bytes()
    )
    assert far.has(root) and not far.has(record)
    far.pin(record, "kept")  # fetches the record itself, and nothing that is there
    assert swarm.moved["here", "there"].blocks == 1 + 4 + 1
    assert far.pins() == {record: ("kept",)}
    swarm.cut("here")
    late = near.put(b"late")
    near.publish()
    with pytest.raises(StoreTimeout):
        KuboStore(there.address, timeout_s=2).get(late)
    swarm.mend("here")
    assert far.get(late) == b"late"
    far.put(b"back")
    far.publish()
    assert near.get(CID.of(b"back")) == b"back"
    assert swarm.moved["there", "here"] == Moved(1, 4)


def test_a_proxy_that_is_cut_is_silent_and_loses_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = CountingProxy(server.getsockname()[1])
        with socket.create_connection(("127.0.0.1", proxy.port)) as near:
            far, _ = server.accept()
            with far:
                near.sendall(b"before")
                assert far.recv(100) == b"before"
                proxy.cut()
                near.sendall(b"meanwhile")
                far.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    far.recv(100)
                proxy.mend()
                far.settimeout(10)
                assert far.recv(100) == b"meanwhile"
        assert proxy.bytes == len(b"before" + b"meanwhile")
        proxy.close()


@pytest.mark.timeout(600)
def test_three_organizations_train_the_model_of_the_local_engine(tmp_path: Path) -> None:
    """Each has its IPFS daemon, and everything is sealed, as by default."""
    need(available())
    with federated(tmp_path) as federation:
        sites = federation.sites.values()
        roles = ("worker", "supernode", "stub")
        pids = [federation.sites[name].pids(role) for name in HOSPITALS for role in roles]
        assert [len(each) for each in pids] == [1] * 9
        assert {"numpy", "parquet", "arrow"} == {_format(site.home) for site in sites}
        refuse_a_stranger(federation)
        ours, theirs = demonstrate(federation, 3, print)
        assert ours == theirs
        moved = federation.swarm.moved
        assert set(moved) == {(COORDINATOR, name) for name in HOSPITALS} | {
            (name, COORDINATOR) for name in HOSPITALS
        }
        # What is stored is sealed: no daemon holds the model that all trained.
        for relay in federation.swarm.relays.values():
            assert not relay.holds(CID.parse(ours))
        assert [federation.sites[n].pids(r) for n in HOSPITALS for r in roles] == pids


def _format(home: Path) -> str:
    return str(yaml.safe_load((home / "site.yaml").read_text())["data"]["format"])


def refuse_a_stranger(federation: Federation) -> None:
    """Who knows the address and has the certificate, but was not admitted, gets nothing."""
    site, folder = federation.sites[HOSPITALS[0]], federation.folder / "stranger"
    folder.mkdir()
    (folder / "node.key").write_text(nodekey.new())
    command = [
        *(shutil.which("flower-supernode", path=Path(sys.executable).parent), "--isolation"),
        *("process", "--superlink", f"localhost:{federation.fleet_port}"),
        *("--root-certificates", site.home / "ca.pem"),
        *("--auth-supernode-private-key", folder / "node.key", "--max-retries", "0"),
        *("--port", str(free_ports(1)[0])),
    ]
    env = {**site.environment, "FEDIPFS_HOME": str(folder), "FLWR_HOME": str(folder)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Failed to activate SuperNode" in done.stderr, done.stderr
    assert federation.command(federation.coordinator, "fedipfs-server", "members").count(
        "online"
    ) == len(HOSPITALS)


@pytest.mark.timeout(300)
def test_unsealed_the_final_cid_itself_is_that_of_the_local_engine(tmp_path: Path) -> None:
    with federated(tmp_path, ipfs=False, seal="none") as federation:
        ours, theirs = federation.run(2), federation.local(2)
        assert ours.summary["final_model_cid"] == theirs.summary["final_model_cid"]
        assert federation.cid(ours) == ours.summary["final_model_cid"]
        assert ours.summary["metrics"] == theirs.summary["metrics"]


@pytest.mark.timeout(600)
def test_bytes_on_the_grpc_connection(tmp_path: Path) -> None:
    """TLS, node authentication and idle polls included; what the store carries is not in it.

    Sealed and signed as by default; the store is a folder, which changes nothing here.
    """
    target, paths = "sized:Sized", [str(Path(__file__).parents[1] / "support")]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    with federated(
        tmp_path,
        settings=(*EXPERIMENT, f"task.target={target}", "train.steps=3"),
        target=target,
        ipfs=False,
        seal="all",
        proxied=True,
        environment={"PYTHONPATH": os.pathsep.join(paths)},
    ) as federation:
        idle = idling(federation)
        print(f"an idle connection: {idle} bytes a second")
        steady, most = {}, {}
        for hidden in (SMALL, LARGE):
            few, many = (crossed(federation, rounds, hidden) for rounds in (2, 6))
            pairs = zip(many.bytes, few.bytes, strict=True)
            steady[hidden] = [(more - less) / 4 for more, less in pairs]
            # On a busy machine rounds are longer, and Flower polls while it waits.
            longer = max(0.0, (many.seconds - few.seconds) / 4 - ROUND_S)
            most[hidden] = MOST + longer * max(idle)
            print(f"{hidden * 795 + 10} parameters: {steady[hidden]} bytes per client and round")
            print(f"  with what a run takes to begin and end: {[each / 6 for each in many.bytes]}")
            print(f"  a round takes {longer:.1f} s more than {ROUND_S}")
    for hidden, each in steady.items():
        assert max(each) <= most[hidden]
    # 400 times the parameters, and the same bytes: but for idle polls.
    assert max(steady[LARGE]) - min(steady[SMALL]) < 2000 + most[LARGE] - MOST


class Crossed(NamedTuple):
    """Bytes on each client's connection during a run, and how long its rounds took in all."""

    bytes: list[int]
    seconds: float


def crossed(federation: Federation, rounds: int, hidden: int) -> Crossed:
    before = [proxy.bytes for proxy in federation.proxies.values()]
    run = federation.run(rounds, f"+task.options.hidden={hidden}")
    assert run.summary["rounds_completed"] == rounds
    after = [proxy.bytes for proxy in federation.proxies.values()]
    moved = [late - early for late, early in zip(after, before, strict=True)]
    return Crossed(moved, run.summary["seconds"]["rounds"])


def idling(federation: Federation) -> list[float]:
    """Bytes a second on each client's connection while nothing runs."""
    before = [proxy.bytes for proxy in federation.proxies.values()]
    time.sleep(IDLE_S)
    after = [proxy.bytes for proxy in federation.proxies.values()]
    return [(late - early) / IDLE_S for late, early in zip(after, before, strict=True)]
