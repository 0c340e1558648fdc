"""The doctor against each fault that it names, and against stores that have none."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from daemons import JsIpfs, Remote
from hostile_http import HONEST, Answer, Exchange, HostileServer, reply, said, silence

from fedipfs.ipld import CID
from fedipfs.store import FolderStore, doctor, doctor_services
from fedipfs.store.doctor import Check, Finding, checks, examine
from fedipfs.store.doctor_services import exposure

PEER = "12D3KooWEZXjE41uU4EL2gpkAQeDXYok6wghN7wwNVPF5bwkaNfS"
HTML = "<html><body>404 pages</body></html>"


Usage = namedtuple("Usage", "total used free")
real_file_system = doctor._file_system


@pytest.fixture(autouse=True)
def a_disk_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has that runs the tests."""
    usage = Usage(10**12, 10**11, 9 * 10**11)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor, "_file_system", lambda path: "ext4")


def look(spec: Any) -> list[Finding]:
    return list(examine(checks(spec)))


def faults(spec: Any) -> list[Finding]:
    """What is not ok."""
    found = [finding for finding in look(spec) if finding.level != "ok"]
    assert all("\n" not in f.text + f.remedy for f in found)
    return found


def fault(spec: Any, level: str, part: str, check: str, says: str) -> Finding:
    """The only thing that is not ok."""
    found = faults(spec)
    assert [(f.level, f.part, f.check) for f in found] == [(level, part, check)], found
    assert says in f"{found[0].text}; {found[0].remedy}"
    return found[0]


def version(number: object = "0.35.0", late_s: float = 0, **more: object) -> Answer:
    told = {"Version": number, "Golang": "go1.24", **more}
    return reply(json.dumps(told), Date=formatdate(time.time() + late_s, usegmt=True))


@pytest.fixture
def node() -> Iterator[HostileServer]:
    """An honest Kubo with one peer; tests make it lie."""
    with HostileServer() as server:
        server.plan("/version", version())
        server.plan("/swarm/peers", reply(json.dumps({"Peers": [{"Addr": "/x", "Peer": PEER}]})))
        server.plan("/bootstrap/list", reply('{"Peers": []}'))
        yield server


def spec(node: HostileServer, **options: object) -> dict[str, object]:
    return {"kind": "kubo", "address": node.address, **options}


# ---- a node


def test_a_good_node_is_found_good_and_left_as_it_was(node: HostileServer) -> None:
    found = look(spec(node))
    assert {finding.level for finding in found} == {"ok"}
    checked = ["reached", "version", "clock", "exposure", "blocks", "pins", "space", "peers"]
    assert [finding.check for finding in found] == checked
    assert node.pins == set()
    trial = max(node.blocks.values(), key=len)
    assert len(trial) >= 64 << 10


@pytest.mark.slow
def test_a_real_daemon_has_no_problem(ipfs_daemon: JsIpfs | Remote) -> None:
    found = look(f"kubo:{ipfs_daemon.address}")
    assert [finding for finding in found if finding.level == "problem"] == []
    assert {"blocks", "pins", "clock"} <= {f.check for f in found if f.level == "ok"}


def test_nothing_listening_is_the_only_finding() -> None:
    found = fault("kubo:/ip4/127.0.0.1/tcp/9", "problem", "node", "reached", "`ipfs daemon`")
    assert "Connection refused" in found.text


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (reply(HTML), "is this an IPFS daemon?"),
        (reply("{", 200), "is this an IPFS daemon?"),
        (reply("", 401), "store.credentials"),
        (reply("", 403), "store.credentials"),
        (reply(HTML, 404), "not to its gateway"),
    ],
)
def test_what_answers_is_no_node_or_refuses(node: HostileServer, answer: Answer, says: str) -> None:
    node.plan("/version", answer)
    fault(spec(node), "problem", "node", "reached", says)


def test_an_rpc_on_another_machine_needs_credentials() -> None:
    fault("kubo:http://192.0.2.1:5001", "problem", "node", "reached", "SSH tunnel")


def test_a_node_that_is_silent_is_given_up(
    node: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_services, "TIMEOUT_S", 0.3)
    node.plan("/version", silence)
    began = time.monotonic()
    fault(spec(node), "problem", "node", "reached", "did not answer within 0.3 s")
    assert time.monotonic() - began < doctor.DEADLINE_S


def test_a_node_that_counts_for_long_is_no_problem(
    node: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_services, "PATIENCE_S", 0.3)
    node.plan("/repo/stat", silence)
    fault(spec(node), "warning", "node", "space", "within 0.3 s")


@pytest.mark.parametrize("number", ["0.30.0", "0.41.1", "0.38.0-rc2"])
def test_known_versions(node: HostileServer, number: str) -> None:
    node.plan("/version", version(number))
    assert faults(spec(node)) == []


@pytest.mark.parametrize(
    ("number", "fields", "says"),
    [
        ("0.29.0", {}, "older"),
        ("0.42.0", {}, "newer"),
        ("1.0.0", {}, "newer"),
        ("0.18.1", {"ipfs-core": "0.18.1"}, "js-ipfs 0.18.1"),
        ("0.35.0", None, "unknown program"),
    ],
)
def test_other_versions_are_warned_of(
    node: HostileServer, number: str, fields: dict[str, str] | None, says: str
) -> None:
    bare = reply(json.dumps({"Version": number}), Date=formatdate(usegmt=True))
    node.plan("/version", bare if fields is None else version(number, **fields))
    fault(spec(node), "warning", "node", "version", says)


@pytest.mark.parametrize("number", [7, None, "", "new", ["0.35.0"]])
def test_a_version_that_is_none(node: HostileServer, number: object) -> None:
    node.plan("/version", version(number))
    fault(spec(node), "problem", "node", "version", "tells no version")


@pytest.mark.parametrize(
    ("late_s", "level", "says"),
    [
        (90, "warning", "ahead of"),
        (-90, "warning", "behind"),
        (3600, "problem", "ahead of"),
        (-3600, "problem", "behind"),
    ],
)
def test_clocks_that_differ(node: HostileServer, late_s: float, level: str, says: str) -> None:
    node.plan("/version", version(late_s=late_s))
    found = fault(spec(node), level, "node", "clock", says)
    assert "NTP" in found.remedy


def test_clocks_that_differ_a_little(node: HostileServer) -> None:
    node.plan("/version", version(late_s=50))
    assert faults(spec(node)) == []


@pytest.mark.parametrize("date", [None, "yesterday", "Mon, 99 Foo 2026 00:00:00 GMT"])
def test_a_date_that_is_none(node: HostileServer, date: str | None) -> None:
    told = '{"Version": "0.35.0", "Golang": "go1.24"}'
    node.plan("/version", reply(told, **({} if date is None else {"Date": date})))
    fault(spec(node), "warning", "node", "clock", "no date")


def test_wrong_bytes_on_read_back(node: HostileServer) -> None:
    node.plan("/block/get", reply(b"other bytes"))
    fault(spec(node), "problem", "node", "blocks", "do not hash to it")
    assert node.pins == set()


def test_a_wrong_cid(node: HostileServer) -> None:
    told = {"Root": {"Cid": {"/": str(CID.of(b"other"))}, "PinErrorMsg": ""}}
    node.plan("/dag/import", reply(json.dumps(told)))
    found = faults(spec(node))
    assert [(f.level, f.check) for f in found] == [("problem", "blocks"), ("problem", "pins")]
    assert str(CID.of(b"other")) in found[0].text


def test_no_space_left_while_uploading(node: HostileServer) -> None:
    node.plan("/dag/import", said("write: no space left on device"))
    found = faults(spec(node))
    assert [(f.level, f.check) for f in found] == [("problem", "blocks"), ("problem", "pins")]
    assert "no space left" in found[0].text


def test_a_pin_that_is_refused(node: HostileServer) -> None:
    node.plan("/dag/import", HONEST, HONEST, said("pins are off today"))
    fault(spec(node), "problem", "node", "pins", "pins are off today")
    assert node.pins == set()


def test_a_pin_that_is_not_kept(node: HostileServer) -> None:
    def forgetful(exchange: Exchange) -> None:
        before = set(node.pins)
        answer = node._do_dag_import(exchange.request, "")
        node.pins.intersection_update(before)
        reply(answer)(exchange)

    node.plan("/dag/import", HONEST, HONEST, forgetful)
    fault(spec(node), "problem", "node", "pins", "not among its pins")


def test_without_pinning_none_is_tried(node: HostileServer) -> None:
    assert faults(spec(node, pin=False)) == []
    assert node.calls("/pin/add") == []


@pytest.mark.parametrize(
    ("free", "level"), [(5 * 10**8, "warning"), (5 * 10**7, "problem"), (-(10**6), "problem")]
)
def test_little_space(node: HostileServer, free: int, level: str) -> None:
    told = {"RepoSize": 10**10, "StorageMax": 10**10 + free}
    node.plan("/repo/stat", reply(json.dumps(told)))
    fault(spec(node), level, "node", "space", "StorageMax")


def test_sizes_that_are_none(node: HostileServer) -> None:
    node.plan("/repo/stat", reply('{"RepoSize": []}'))
    fault(spec(node), "problem", "node", "space", "no sizes")


def test_peers(node: HostileServer) -> None:
    here, other = f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}", "/ip4/192.0.2.2/tcp/4001/p2p/12D3KooWother"
    found = [f.text for f in look(spec(node, peers=[here, other])) if f.check == "peers"]
    assert found == ["1 nodes are connected", f"{here} is connected", f"{other} was connected"]
    node.plan("/swarm/connect", said("dial backoff"))
    fault(spec(node, peers=[here, other]), "problem", "node", "peers", "firewall")


def test_no_peers_and_the_public_network(node: HostileServer) -> None:
    node.plan("/swarm/peers", reply('{"Peers": null}'))
    fault(spec(node), "warning", "node", "peers", "store.peers")
    first = f"/dnsaddr/bootstrap.libp2p.io/p2p/{PEER}"
    node.plan("/bootstrap/list", reply(json.dumps({"Peers": [first]})))
    assert "public" in fault(spec(node), "warning", "node", "peers", "store.peers").text


def test_who_may_use_the_rpc(node: HostileServer) -> None:
    port = node.address.rpartition("/")[2]
    everywhere = {"kind": "kubo", "address": f"http://0.0.0.0:{port}"}
    fault(everywhere, "problem", "node", "reached", "no credentials")
    fault({**everywhere, "open_rpc": True}, "warning", "node", "exposure", "API.Authorizations")
    assert exposure(local=False, asks=True, open_rpc=False).level == "ok"
    assert exposure(local=False, asks=False, open_rpc=False).level == "problem"


def test_credentials_that_others_can_read(node: HostileServer, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("bearer:secret-token")
    file.chmod(0o644)
    found = fault(spec(node, credentials=str(file)), "problem", "node", "reached", "chmod 600")
    assert "secret-token" not in found.text
    file.chmod(0o600)
    assert faults(spec(node, credentials=str(file))) == []
    shown = [request.headers.get("authorization") for request in node.calls("/version")]
    assert sorted(shown, key=str) == ["Bearer secret-token", None], "the clock is asked without"


def test_wrong_options() -> None:
    for options in ({"retries": -1}, {"timeout_s": "soon"}, {"foo": 1}):
        fault({"kind": "kubo", **options}, "problem", "node", "reached", next(iter(options)))
    fault({"kind": "ftp"}, "problem", "store", "settings", "'ftp'")
    fault("{", "problem", "store", "settings", "JSON")


# ---- gateways


def gateway(answer: Answer) -> HostileServer:
    server = HostileServer()
    server.plan("/ipfs/", answer)
    return server


def block(date: str | None = None, **headers: object) -> Answer:
    date = date or formatdate(usegmt=True)
    return reply(b"", Content_Type="application/vnd.ipld.raw", Date=date, **headers)


def test_a_good_gateway() -> None:
    with gateway(block()) as server:
        assert [f.level for f in look(f"gateway:{server.url}")] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (reply(HTML, Content_Type="text/html"), "'text/html' instead of a block"),
        (reply(HTML), "'nothing' instead of a block"),
        (reply(HTML, Content_Type="application/vnd.ipld.raw"), "instead of a block"),
        (reply(HTML, 404), "HTTP 404"),
        (reply("", 500), "HTTP 500"),
        (reply(bytes(1 << 20)), "larger than"),
    ],
)
def test_what_answers_is_no_gateway(answer: Answer, says: str) -> None:
    with gateway(answer) as server:
        fault(f"gateway:{server.url}", "problem", "gateway", "reached", says)


def test_gateways_that_are_away_or_none() -> None:
    fault("gateway:http://127.0.0.1:9", "problem", "gateway", "reached", "does not answer")
    fault("gateway:ftp://host", "problem", "gateway", "settings", "https://HOST")
    fault({"kind": "gateway", "urls": []}, "problem", "gateway", "settings", "at least one")


def test_a_cached_answer_is_as_old_as_it_says() -> None:
    an_hour_ago = formatdate(time.time() - 3600, usegmt=True)
    with gateway(block(an_hour_ago, Age=3600)) as server:
        assert faults(f"gateway:{server.url}") == []
    with gateway(block(an_hour_ago)) as server:
        fault(f"gateway:{server.url}", "problem", "gateway", "clock", "behind")


# ---- a folder


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    found = look(str(tmp_path / "new" / "store"))
    assert {finding.level for finding in found} == {"ok"}
    assert "not there yet" in found[0].text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert look(str(tmp_path / "empty"))[0].level == "ok"
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_is_left_as_it_was(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.pin(store.put(b"mine"), "mine")
    assert look(str(store.path))[0].text.endswith("can be written and read")
    assert list(store) == [CID.of(b"mine")]
    assert store.pins() == {CID.of(b"mine"): ("mine",)}


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    fault("/proc/nowhere/store", "problem", "folder", "usable", "/proc/nowhere")  # root, too
    (tmp_path / "file").write_text("")
    fault(str(tmp_path / "file"), "problem", "folder", "usable", "is a file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    fault(str(tmp_path / "other"), "problem", "folder", "usable", "is not a store")
    store = FolderStore(tmp_path / "store")
    os.rmdir(store.path / "blocks")
    (store.path / "blocks").write_text("")
    fault(str(store.path), "problem", "folder", "usable", "Not a directory")
    options = {"kind": "folder", "path": str(tmp_path / "new"), "max_bytes": -1}
    fault(options, "problem", "folder", "usable", "max_bytes")
    fault({**options, "max_bytes": None, "foo": 1}, "problem", "folder", "usable", "foo")


def test_the_file_system_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert real_file_system(Path("/proc/self")) == "proc"
    monkeypatch.setattr(doctor, "_file_system", lambda path: "nfs4")
    fault(str(tmp_path), "warning", "folder", "files", "locks")
    monkeypatch.setattr(doctor, "_file_system", lambda path: "tmpfs")
    fault(str(tmp_path), "warning", "folder", "files", "restarts")


@pytest.mark.parametrize(("free", "level"), [(5 * 10**8, "warning"), (5 * 10**7, "problem")])
def test_little_space_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    usage = Usage(10**10, 10**10, free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    fault(str(tmp_path), level, "folder", "space", "gc")


def test_a_cap_that_is_nearly_or_wholly_reached(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(bytes(900_001))
    options = {"kind": "folder", "path": str(store.path), "max_bytes": 1_000_000}
    fault(options, "warning", "folder", "cap", "900 kB of at most 1.0 MB")
    store.put(bytes(90_000))
    fault(options, "problem", "folder", "usable", "raise max_bytes")


# ---- several parts, and checks that misbehave


def test_a_cached_store_has_the_checks_of_all_its_parts(
    node: HostileServer, tmp_path: Path
) -> None:
    options = {"kind": "cached", "path": str(tmp_path / "cache"), "kubo": spec(node)}
    with gateway(reply(HTML)) as server:
        both = {**options, "gateway": {"kind": "gateway", "urls": [server.url]}}
        fault(both, "problem", "gateway", "reached", "instead of a block")
    assert {f.part for f in look(options)} == {"folder", "node"}
    store = FolderStore(options["path"])
    store.put(bytes(90_000))
    found = fault({**options, "max_bytes": 100_000}, "warning", "folder", "usable", "100000")
    assert found.level == "warning", "in front of a node it may be full"
    for wrong in ({"foo": 1}, {"kubo": "here"}, {"gateway": 7}):
        fault({**options, **wrong}, "problem", "store", "settings", "store")


def test_a_check_that_hangs_is_given_up_and_the_next_ones_follow() -> None:
    over = threading.Event()

    def hang() -> list[Finding]:
        over.wait()
        return []

    good = Finding("a", "b", "ok", "fine")
    found = list(examine([Check("x", "y", hang), Check("a", "b", lambda: [good])], 0.05))
    over.set()
    assert [(f.part, f.level) for f in found] == [("x", "problem"), ("a", "ok")]
    assert "0.05 s" in found[0].text


def test_a_bug_in_a_check_is_not_hidden() -> None:
    def wrong() -> list[Finding]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(examine([Check("x", "y", wrong)]))
