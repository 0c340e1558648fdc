"""The coordinator's folder, its members, and what its SuperLink is told of them."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)

from fedipfs.errors import (
    ConfigError,
    JoinError,
    JoinRefused,
    KeyFileError,
    SignerRevoked,
    TrustListError,
)
from fedipfs.flower_deploy import NodeState
from fedipfs.server.membership import Home, Registry, federation_of, synchronise
from fedipfs.trust import Identity, TrustList, nodekey, tls
from fedipfs.trust.joining import Federation, JoinRequest

NOW = datetime.now(UTC)
PEER = "/dns4/fl.example.org/tcp/4001/p2p/12D3KooWGzBqd5eNkGp2MnTcNEGeFpYzTg4xgJhVfXHgLqVLGxGv"


def new_line() -> str:
    key = load_ssh_private_key(nodekey.new().encode(), None)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def request(name: str, identity: Identity | None = None, node_key: str = "") -> JoinRequest:
    public = (identity or Identity.new(name)).public
    return JoinRequest(public, node_key or new_line(), NOW)


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDIPFS_PASSPHRASE", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "hub", host="fl.example.org", organization="hub", peers=[PEER])


@pytest.fixture
def registry(home: Home) -> Registry:
    return Registry.open(home)


def trusted(registry: Registry) -> list[str]:
    now = datetime.now(UTC)
    current = TrustList.load(registry.home.trust).current("participant", now)
    return [one.identity.organization for one in current]


# ---- the folder


def test_a_folder_is_closed_and_comes_back(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        home = Home.create(tmp_path / "a" / "hub", host="FL.example.org", bind="::", peers=[PEER])
    finally:
        os.umask(umask)
    assert Home.load(home.path) == home
    assert (home.organization, home.address) == ("fl.example.org", "fl.example.org:9092")
    assert home.fleet_address == "[::]:9092"
    assert home.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in home.path.iterdir() if path.is_file()} == {
        0o600
    }
    (own,) = TrustList.load(home.trust).members
    assert own.role == "coordinator"
    assert own.identity == Identity.load(home.identity).public
    assert len(home.secret.read_bytes()) == 64


def test_two_folders_share_no_secret(tmp_path: Path) -> None:
    one, other = (Home.create(tmp_path / name, host="localhost") for name in "ab")
    for name in ("ca.key", "server.key", "superexec.secret", "identity.key"):
        assert (one.path / name).read_text() != (other.path / name).read_text()


def test_nothing_is_overwritten(home: Home) -> None:
    before = {path: path.read_bytes() for path in home.path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=r"has coordinator\.toml, trust\.toml, .* nothing is ov"):
        Home.create(home.path, host="fl.example.org", organization="hub")
    home.config.unlink()
    with pytest.raises(ConfigError, match=r"has trust\.toml"):
        Home.create(home.path, host="fl.example.org", organization="hub")
    del before[home.config]
    assert {path: path.read_bytes() for path in home.path.iterdir() if path.is_file()} == before


def test_keys_that_are_there_are_used(tmp_path: Path) -> None:
    keys = Identity.new("hub")
    keys.save(tmp_path / "identity.key", b"correct horse")
    with pytest.raises(KeyFileError, match="keys of hub, not of localhost"):
        Home.create(tmp_path, host="localhost", ask=lambda: b"correct horse")
    assert os.listdir(tmp_path) == ["flower", "identity.key"]
    home = Home.create(tmp_path, host="localhost", organization="hub", ask=lambda: b"correct horse")
    assert TrustList.load(home.trust).members[0].identity == keys.public


def test_new_keys_are_encrypted_if_a_passphrase_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "correct horse")
    assert Identity.is_encrypted(Home.create(tmp_path, host="localhost").identity)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"host": "fl.example.org:9092"}, "without a port"),
        ({"host": "0.0.0.0"}, "no one can dial"),
        ({"host": "2001:db8::5"}, "--org says it"),
        ({"organization": "a b"}, "organization 'a b'"),
        ({"fleet_port": 0}, "port 0"),
        ({"fleet_port": 8000}, "must differ"),
        ({"http_port": 65536}, "http_port 65536"),
        ({"bind": "everywhere!"}, "bind 'everywhere!'"),
        ({"peers": ["/ip4/203.0.113.5/tcp/4001"]}, "give the address and the id"),
        ({"peers": ["fl.example.org"]}, "peer 'fl.example.org'"),
    ],
)
def test_what_cannot_be_right_leaves_no_folder(tmp_path: Path, wrong: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Home.create(tmp_path / "hub", **{"host": "fl.example.org", **wrong})
    assert not (tmp_path / "hub").exists()


def test_no_folder_and_damaged_ones(home: Home, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedipfs-server init --host"):
        Home.load(tmp_path)
    text = home.config.read_text()
    for old, new, problem in (
        ("port = 9092", "port = '9092'", "port is not a int"),
        ("port = 9092", "ports = 9092", "'ports' is not known"),
        ("fl.example.org", "fl example", r"coordinator\.toml: host 'fl example'"),
        ('["', '[7, "', "peers: 7 is no text"),
        ("/v1", "/v2", "expected 'fedipfs-coordinator/v1'"),
    ):
        home.config.write_text(text.replace(old, new, 1))
        with pytest.raises(ConfigError, match=problem):
            Home.load(home.path)
    home.config.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod go-w"):
        Home.load(home.path)


def test_renewing_keeps_authority_and_key(home: Home) -> None:
    ca, key, old = (path.read_text() for path in (home.ca, home.certificate_key, home.certificate))
    home.renew(30)
    assert (home.ca.read_text(), home.certificate_key.read_text()) == (ca, key)
    new = home.certificate.read_text()
    assert new != old
    assert timedelta(days=29) < tls.ends(new) - datetime.now(UTC) <= timedelta(days=30)
    home.certificate_key.unlink()
    home.renew(30)
    assert home.certificate_key.read_text() != key
    assert home.certificate_key.stat().st_mode & 0o777 == 0o600
    home.ca_key.unlink()
    with pytest.raises(KeyFileError, match=r"ca\.key"):
        home.renew(30)


# ---- members


def test_numbers_are_in_order_and_for_ever(home: Home, registry: Registry) -> None:
    asked = [request(name) for name in ("a", "b", "c")]
    assert [registry.admit(one).number for one in asked] == [0, 1, 2]
    assert registry.serial == 3
    assert trusted(registry) == ["a", "b", "c"]
    registry.remove("b")
    assert [each.organization for each in registry.active] == ["a", "c"]
    assert trusted(registry) == ["a", "c"]
    assert registry.admit(request("d")).number == 3
    again = registry.admit(replace(asked[1], node_key=new_line()))
    assert (again.number, again.removed) == (1, None)
    assert trusted(registry) == ["a", "b", "c", "d"]
    assert Registry.open(home).members == registry.members
    assert registry.serial == 6


def test_other_keys_under_the_name_of_a_removed_member_are_a_new_member(
    registry: Registry,
) -> None:
    registry.admit(request("a"))
    registry.remove("a")
    assert registry.admit(request("a")).number == 1
    assert registry.find("a").number == 1
    assert trusted(registry) == ["a"]


def test_the_same_request_again_changes_nothing(home: Home, registry: Registry) -> None:
    asked = request("a")
    first = registry.admit(asked)
    before = home.members.read_bytes(), home.trust.read_bytes()
    assert registry.admit(replace(asked, created=NOW + timedelta(days=1))) == first
    assert (home.members.read_bytes(), home.trust.read_bytes()) == before


def test_a_member_gives_its_node_a_new_key(registry: Registry) -> None:
    asked = request("a")
    first = registry.admit(asked)
    registry.note_node(0, 17)
    second = registry.admit(replace(asked, node_key=new_line()))
    assert (second.number, second.node_id, second.admitted) == (0, None, first.admitted)
    assert second.retired == (first.node_key,)
    with pytest.raises(JoinRefused, match="node key of a was shut out"):
        registry.admit(asked)


def test_another_key_under_a_members_name(home: Home, registry: Registry) -> None:
    entry = registry.admit(request("hospital-a"))
    before = home.members.read_bytes(), home.trust.read_bytes()
    for name in ("hospital-a", "Hospital-A"):
        with pytest.raises(JoinRefused, match=entry.identity.fingerprint):
            registry.admit(request(name))
    assert (home.members.read_bytes(), home.trust.read_bytes()) == before


def test_names_and_keys_of_others(home: Home, registry: Registry) -> None:
    keys = Identity.new("a")
    registry.admit(request("a", keys, line := new_line()))
    with pytest.raises(JoinRefused, match="came with the node key of a"):
        registry.admit(request("b", node_key=line))
    with pytest.raises(JoinRefused, match="hub is the coordinator's own name"):
        registry.admit(request("hub"))
    theft = Identity("b", keys._signing, keys._sealing)
    with pytest.raises(TrustListError, match="share a key"):
        registry.admit(request("b", theft))
    own = Identity.load(home.identity)
    with pytest.raises(TrustListError, match="share a key"):
        registry.admit(request("b", Identity("b", own._signing, own._sealing)))
    registry.remove("a")
    with pytest.raises(JoinRefused, match="came with the node key of a"):
        registry.admit(request("b", node_key=line))
    with pytest.raises(JoinRefused, match="cannot be used again"):
        registry.admit(request("a", keys, line))
    assert [each.organization for each in registry.members] == ["a"]


def test_what_was_revoked_by_hand_stays_so(home: Home, registry: Registry) -> None:
    asked = request("a")
    registry.admit(asked)
    TrustList.load(home.trust).revoke("a", datetime.now(UTC)).save(home.trust)
    for node_key in (asked.node_key, new_line()):
        with pytest.raises(JoinRefused, match="a is a member, but revoked"):
            registry.admit(replace(asked, node_key=node_key))
    assert trusted(registry) == []


def test_removing_revokes_all_keys_of_the_name(home: Home, registry: Registry) -> None:
    entry = registry.admit(request("a"))
    removed = registry.remove("a")
    with pytest.raises(SignerRevoked):
        TrustList.load(home.trust).signer("a", "participant", datetime.now(UTC))
    assert removed.removed and removed == registry.remove("a")
    assert entry.number == removed.number
    with pytest.raises(ConfigError, match="'b' is no member: members are nobody"):
        registry.remove("b")
    assert TrustList.load(home.trust).current("coordinator", datetime.now(UTC))


def test_what_another_process_changes_counts_at_once(home: Home, registry: Registry) -> None:
    other = Registry.open(home)
    registry.admit(request("a"))
    assert [each.organization for each in other.active] == ["a"]
    other.remove("a")
    assert registry.active == ()


def admit_four(home: Home, name: str) -> None:
    for number in range(4):
        Registry.open(home).admit(request(f"{name}-{number}"))


def test_changes_at_the_same_time(home: Home) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=admit_four, args=(home, name)) for name in "xyz"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    registry = Registry.open(home)
    assert [each.number for each in registry.members] == list(range(12))
    assert len(trusted(registry)) == 12


def test_damaged_lists_of_members(home: Home, registry: Registry) -> None:
    for name in "ab":
        registry.admit(request(name))
    whole = json.loads(home.members.read_text())
    first, second = whole["members"]
    for wrong in (
        {**whole, "serial": "3"},
        {**whole, "members": [first, first]},
        {**whole, "members": [second]},
        {**whole, "members": [{**first, "node_key": "x"}, second]},
        {**whole, "members": [{**first, "removed": "x"}, second]},
        {**whole, "members": [{**first, "more": "x"}, second]},
        {**whole, "format": "x"},
    ):
        home.members.write_text(json.dumps(wrong))
        with pytest.raises(JoinError, match=r"members\.json"):
            Registry.open(home)
    home.members.unlink()
    with pytest.raises(JoinError, match=r"members\.json is gone"):
        _ = registry.members


def test_what_a_member_is_told(home: Home, registry: Registry) -> None:
    for name in ("a", "b", "c"):
        entry = registry.admit(request(name))
    registry.remove("b")
    keys = Identity.load(home.identity)
    federation = Federation.loads(federation_of(registry, entry, keys.public).dumps(keys))
    assert [(number, who.organization) for number, who in federation.members] == [
        (0, "a"),
        (2, "c"),
    ]
    assert (federation.number, federation.serial, federation.peers) == (2, 4, (PEER,))
    assert federation.ca_pem == home.ca.read_text()


# ---- the SuperLink


@dataclass
class Link:
    """What a SuperLink does with nodes: a key that was shut out is never let in again."""

    all: list[NodeState] = field(default_factory=list)

    def nodes(self) -> list[NodeState]:
        return list(self.all)

    def register(self, node_key: str, name: str) -> int:
        assert node_key not in [node.public_key for node in self.all]
        self.all.append(NodeState(100 + len(self.all), name, node_key, "registered"))
        return self.all[-1].node_id

    def unregister(self, node_id: int) -> None:
        (place,) = (i for i, node in enumerate(self.all) if node.node_id == node_id)
        assert self.all[place].status != "unregistered"
        self.all[place] = self.all[place]._replace(status="unregistered")

    def live(self) -> list[str]:
        return [node.name for node in self.all if node.status != "unregistered"]


def test_the_superlink_knows_the_members_nodes_and_no_others(registry: Registry) -> None:
    link = Link()
    asked = {name: request(name) for name in ("a", "b")}
    for each in asked.values():
        registry.admit(each)
    assert synchronise(registry, link) == ["let the node of a in", "let the node of b in"]
    assert [each.node_id for each in registry.active] == [100, 101]
    assert synchronise(registry, link) == []
    registry.remove("a")
    registry.admit(replace(asked["b"], node_key=new_line()))
    link.register(new_line(), "by hand")
    assert synchronise(registry, link) == [
        "shut out a node of a",
        "shut out a node of b",
        "shut out a node of nobody",
        "let the node of b in",
    ]
    assert link.live() == ["b"]
    assert [each.node_id for each in registry.members] == [None, 103]


def test_a_superlink_that_lost_its_database_is_told_again(registry: Registry) -> None:
    registry.admit(request("a"))
    synchronise(registry, Link())
    link = Link()
    link.register(new_line(), "first")
    link.unregister(100)
    assert synchronise(registry, link) == ["let the node of a in"]
    assert registry.find("a").node_id == 101


def test_a_key_that_was_shut_out_behind_our_back(registry: Registry) -> None:
    link = Link()
    registry.admit(request("a"))
    synchronise(registry, link)
    link.unregister(100)
    (line,) = synchronise(registry, link)
    assert "the node key of a was shut out and cannot be used again" in line
    assert registry.find("a").node_id is None
