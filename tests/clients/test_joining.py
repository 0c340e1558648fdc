"""A site makes its keys and joins: what is made, what is updated, and what is not believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from fedipfs.clients import joining
from fedipfs.errors import (
    ConfigError,
    FormatError,
    JoinError,
    JoinRefused,
    KeyFileError,
    SignatureWrong,
    TrustListError,
)
from fedipfs.trust import Identity, PublicIdentity, TrustList, nodekey, tls
from fedipfs.trust.joining import Federation, JoinRequest

NOW = datetime.now(UTC).replace(microsecond=0)
HUB, NORTH, SOUTH = (Identity.new(name) for name in ("hub", "north", "south"))
CA = tls.new_authority("hub", NOW).certificate


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDIPFS_PASSPHRASE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A site that asks to join."""
    joining.init(tmp_path / "site", "hospital-a")
    return tmp_path / "site"


def own(home: Path) -> PublicIdentity:
    return Identity.load(home / "identity.key").public


Answer = Callable[..., Path]


@pytest.fixture
def answer(home: Path, tmp_path: Path) -> Answer:
    """Writes the coordinator's answer, with changes."""

    def write(signer: Identity = HUB, others: tuple[Identity, ...] = (NORTH,), **changes) -> Path:
        members = [own(home), *(each.public for each in others)]
        federation = Federation(
            host="fl.example.org",
            port=9092,
            ca_pem=CA,
            coordinator=signer.public,
            organization="hospital-a",
            number=0,
            members=tuple(enumerate(members)),
            peers=(),
            serial=2,
            issued=NOW,
        )
        path = tmp_path / "answer.json"
        path.write_text(replace(federation, **changes).dumps(signer))
        return path

    return write


def yes(question: str) -> bool:
    assert "over another channel?" in question
    return True


def believe(home: Path) -> dict[str, list[str]]:
    trusted = TrustList.load(home / "trust.toml")
    now = datetime.now(UTC)
    return {
        role: [one.identity.organization for one in trusted.current(role, now)]
        for role in ("coordinator", "participant")
    }


def contents(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.iterdir()}


# ---- init


def test_a_sites_keys_are_made_here_and_closed(tmp_path: Path) -> None:
    home, said = tmp_path / "a" / "site", list[str]()
    umask = os.umask(0)
    try:
        path = joining.init(home, "hospital-a", say=said.append)
    finally:
        os.umask(umask)
    assert home.stat().st_mode & 0o777 == 0o700
    for name in ("identity.key", "node.key", "site.yaml"):
        assert (home / name).stat().st_mode & 0o777 == 0o600
    request = JoinRequest.load(path)
    assert request.identity == own(home)
    assert request.node_key == nodekey.public_of(home / "node.key")
    assert (home / "node.pub").read_text() == f"{request.node_key}\n"
    assert abs(request.created - datetime.now(UTC)) < timedelta(seconds=60)
    assert f"  {own(home).fingerprint}" in said and str(path) == "hospital-a.join.json"
    assert not (home / "trust.toml").exists()


def test_init_again_keeps_keys_and_configuration(home: Path, tmp_path: Path) -> None:
    before = contents(home)
    (home / "site.yaml").write_text("mine: true\n")
    (tmp_path / "out").mkdir()
    path = joining.init(home, "hospital-a", tmp_path / "out")
    assert contents(home) == {**before, "site.yaml": b"mine: true\n"}
    assert JoinRequest.load(path).identity == own(home)


def test_a_new_node_key_under_the_same_identity(home: Path) -> None:
    before = JoinRequest.load("hospital-a.join.json")
    (home / "node.key").unlink()
    joining.init(home, "hospital-a")
    after = JoinRequest.load("hospital-a.join.json")
    assert after.identity == before.identity and after.node_key != before.node_key


def test_keys_of_another_organization(home: Path) -> None:
    before = contents(home)
    with pytest.raises(KeyFileError, match="keys of hospital-a, not of hospital-b"):
        joining.init(home, "hospital-b")
    assert contents(home) == before


def test_where_no_site_is_made(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="organization 'a b'"):
        joining.init(tmp_path / "site", "a b")
    with pytest.raises(ConfigError, match="none is no folder"):
        joining.init(tmp_path / "site", "a", Path("none"))
    assert not (tmp_path / "site").exists()
    (tmp_path / "coordinator.toml").touch()
    with pytest.raises(ConfigError, match="is a coordinator's folder"):
        joining.init(tmp_path, "a")


def test_encrypted_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "correct horse")
    joining.init(tmp_path / "site", "a")
    assert Identity.is_encrypted(tmp_path / "site" / "identity.key")
    monkeypatch.delenv("FEDIPFS_PASSPHRASE")
    with pytest.raises(KeyFileError, match="is encrypted"):
        joining.init(tmp_path / "site", "a")
    joining.init(tmp_path / "site", "a", ask=lambda: b"correct horse")


def test_the_configuration_has_every_section(home: Path) -> None:
    found = yaml.safe_load((home / "site.yaml").read_text())
    assert list(found) == ["store", "seal", "data", "client", "policy", "node"]
    assert found["data"]["classes"] == ["no", "yes"]  # texts, which YAML 1.1 would make booleans
    assert found["policy"]["secagg"] == {"required": False, "min_clients": 3}


# ---- join


def test_joining_writes_whom_to_dial_and_whom_to_trust(home: Path, answer: Answer) -> None:
    said: list[str] = []
    path = answer()
    federation = joining.join(home, path, confirm=yes, say=said.append)
    assert federation == Federation.load(home / "federation.json")
    assert (home / "federation.json").read_text() == path.read_text()
    assert (home / "ca.pem").read_text() == CA
    assert believe(home) == {"coordinator": ["hub"], "participant": ["north"]}
    assert f"  {HUB.public.fingerprint}" in said
    assert f"+ north: {NORTH.public.fingerprint}" in said
    assert said[-1].startswith("hospital-a is member 0, one of 2; start with: fedipfs-client run")


def test_the_fingerprint_that_was_read_out_is_enough(home: Path, answer: Answer) -> None:
    spoken = HUB.public.fingerprint.upper().replace(" ", "")
    assert joining.join(home, answer(), fingerprint=spoken).coordinator == HUB.public


def test_no_coordinator_is_trusted_silently(home: Path, answer: Answer) -> None:
    before = contents(home)
    for confirm in (None, lambda question: False):
        with pytest.raises(JoinRefused, match="nothing was changed"):
            joining.join(home, answer(), confirm=confirm)
    with pytest.raises(JoinRefused, match="another coordinator than"):
        joining.join(home, answer(), fingerprint=NORTH.public.fingerprint, confirm=yes)
    assert contents(home) == before


def test_a_later_file_brings_the_members_up_to_date(home: Path, answer: Answer) -> None:
    joining.join(home, answer(others=(NORTH,)), confirm=yes)
    said: list[str] = []
    joining.join(home, answer(others=(SOUTH,), serial=4), say=said.append)  # nothing is asked
    assert believe(home) == {"coordinator": ["hub"], "participant": ["south"]}
    assert f"- north has left: {NORTH.public.fingerprint}" in said
    assert f"+ south: {SOUTH.public.fingerprint}" in said
    joining.join(home, answer(others=(SOUTH,), serial=4))  # again, harmless
    assert believe(home) == {"coordinator": ["hub"], "participant": ["south"]}


def test_a_member_that_has_new_keys(home: Path, answer: Answer) -> None:
    joining.join(home, answer(), confirm=yes)
    new = Identity.new("north")
    joining.join(home, answer(others=(new,), serial=4))
    (member,) = TrustList.load(home / "trust.toml").current("participant", datetime.now(UTC))
    assert member.identity == new.public


def test_who_is_revoked_here_stays_so(home: Path, answer: Answer) -> None:
    joining.join(home, answer(), confirm=yes)
    path = home / "trust.toml"
    TrustList.load(path).revoke("north", NOW).save(path)
    said: list[str] = []
    joining.join(home, answer(others=(NORTH, SOUTH), serial=3), say=said.append)
    assert believe(home)["participant"] == ["south"]
    assert [line for line in said if line.startswith("! north")]


def test_a_coordinator_that_is_revoked_here(home: Path, answer: Answer) -> None:
    joining.join(home, answer(), confirm=yes)
    path = home / "trust.toml"
    TrustList.load(path).revoke("hub", NOW).save(path)
    with pytest.raises(JoinRefused, match="hub's key as coordinator is revoked"):
        joining.join(home, answer(serial=3), fingerprint=HUB.public.fingerprint)


def test_an_older_file(home: Path, answer: Answer) -> None:
    joining.join(home, answer(), confirm=yes)
    before = contents(home)
    for older in ({"serial": 1}, {"issued": NOW - timedelta(seconds=1)}):
        with pytest.raises(JoinRefused, match="is older than what this site has"):
            joining.join(home, answer(others=(NORTH, SOUTH), **older), confirm=yes)
    assert contents(home) == before


def test_another_coordinator_than_before(home: Path, answer: Answer) -> None:
    joining.join(home, answer(), confirm=yes)
    before = contents(home)
    for other in (Identity.new("hub"), Identity.new("bank")):
        path = answer(signer=other, serial=9)
        with pytest.raises(JoinRefused, match=r"this site has joined hub .* FEDIPFS_HOME"):
            joining.join(home, path, fingerprint=other.public.fingerprint, confirm=yes)
    assert contents(home) == before


def test_a_file_for_another_site(home: Path, answer: Answer) -> None:
    members = ((0, own(home)), (1, NORTH.public))
    path = answer(organization="north", number=1, members=members)
    with pytest.raises(JoinRefused, match=r"is for north, and this site is hospital-a: take hosp"):
        joining.join(home, path, confirm=yes)


def test_a_file_that_names_other_keys_for_this_site(home: Path, answer: Answer) -> None:
    path = answer(members=((0, Identity.new("hospital-a").public),))
    with pytest.raises(JoinRefused, match="names other keys for hospital-a"):
        joining.join(home, path, confirm=yes)


def test_a_forged_file(home: Path, answer: Answer) -> None:
    path = answer()
    path.write_text(path.read_text().replace("fl.example.org", "fl.example.net"))
    with pytest.raises(SignatureWrong, match="forged"):
        joining.join(home, path, confirm=yes)
    path.write_text(answer().read_text().replace(str(HUB.public.signing.hex()), "00" * 32))
    with pytest.raises(JoinError, match="coordinator"):
        joining.join(home, path, confirm=yes)
    assert not (home / "trust.toml").exists()


def test_members_that_share_a_key(home: Path, answer: Answer) -> None:
    theft = Identity("south", NORTH._signing, NORTH._sealing)
    with pytest.raises(TrustListError, match="share a key"):
        joining.join(home, answer(others=(NORTH, theft)), confirm=yes)
    assert not (home / "trust.toml").exists()


def test_before_there_are_keys(tmp_path: Path, home: Path, answer: Answer) -> None:
    with pytest.raises(ConfigError, match="first run fedipfs-client init"):
        joining.join(tmp_path / "none", answer(), confirm=yes)
    with pytest.raises(JoinError, match="No such file"):
        joining.join(home, tmp_path / "none.json", confirm=yes)
