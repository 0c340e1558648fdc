"""Join and federation files: what comes back, and every file that is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.errors import (
    FedIPFSError,
    FormatError,
    JoinError,
    JoinRefused,
    KeyFileError,
    SignatureWrong,
)
from fedipfs.trust import Identity, document, files, nodekey, tls
from fedipfs.trust.joining import Federation, JoinRequest

NOW = datetime(2027, 3, 5, 9, 30, tzinfo=UTC)
HUB, SITE, OTHER = (Identity.new(name) for name in ("hub", "hospital-a", "hospital-b"))
PEER = "/dns4/fl.example.org/tcp/4001/p2p/12D3KooWGzBqd5eNkGp2MnTcNEGeFpYzTg4xgJhVfXHgLqVLGxGv"


def line_of(private: str) -> str:
    key = load_ssh_private_key(private.encode(), None)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


REQUEST = JoinRequest(SITE.public, line_of(nodekey.new()), NOW)
FEDERATION = Federation(
    host="fl.example.org",
    port=9092,
    ca_pem=tls.new_authority("hub", NOW).certificate,
    coordinator=HUB.public,
    organization="hospital-a",
    number=1,
    members=((0, OTHER.public), (1, SITE.public)),
    peers=(PEER,),
    serial=3,
    issued=NOW,
)
JOIN, ANSWER = REQUEST.dumps(SITE), FEDERATION.dumps(HUB)


def resigned(text: str, signer: Identity, change: Callable[[dict[str, Any]], Any]) -> str:
    """A document with a change, signed by somebody."""
    found = json.loads(text)
    del found["signature"]
    format = found.pop("format")
    change(found)
    return document.sign(format, found, signer)


# ---- what is not forged


def test_they_come_back() -> None:
    assert JoinRequest.loads(JOIN) == REQUEST
    assert Federation.loads(ANSWER) == FEDERATION
    assert FEDERATION.own == SITE.public
    assert FEDERATION.address == "fl.example.org:9092"
    assert replace(FEDERATION, host="2001:db8::5").address == "[2001:db8::5]:9092"


def test_blanks_and_the_order_of_keys_do_not_matter() -> None:
    found = json.loads(JOIN)
    assert JoinRequest.loads(json.dumps(dict(reversed(found.items())))) == REQUEST


# ---- what is


@given(st.data())
def test_no_changed_byte_goes_unseen(data: st.DataObject) -> None:
    kind, text = data.draw(st.sampled_from([(JoinRequest, JOIN), (Federation, ANSWER)]))
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(max_codepoint=126))
    changed = text[:place] + letter + text[place + 1 :]
    try:
        found = kind.loads(changed)
    except (JoinError, SignatureWrong):
        return
    assert found == kind.loads(text)  # a blank between values


@pytest.mark.parametrize(("text", "kind"), [(JOIN, JoinRequest), (ANSWER, Federation)])
def test_every_value_is_signed(text: str, kind: Any) -> None:
    whole = json.loads(text)
    for key, value in whole.items():
        other: Any = document.keys(OTHER.public)
        if type(value) is int:
            other = value + 1
        elif type(value) is not dict:
            other = value[:-1]
        with pytest.raises((JoinError, SignatureWrong)):
            kind.loads(json.dumps({**whole, key: other}))


def test_a_forged_join_file() -> None:
    with pytest.raises(SignatureWrong, match=r"hospital-a .* signed it: forged"):
        JoinRequest.loads(REQUEST.dumps(OTHER))
    other = line_of(nodekey.new())
    swapped = JOIN.replace(REQUEST.node_key, other)
    with pytest.raises(SignatureWrong):
        JoinRequest.loads(swapped)
    unsigned = json.loads(JOIN)
    del unsigned["signature"]
    with pytest.raises(JoinError, match="signature is missing"):
        JoinRequest.loads(json.dumps(unsigned))
    for signature in ("", "0" * 128, "Z" * 128, json.loads(JOIN)["signature"].upper()):
        with pytest.raises(SignatureWrong):
            JoinRequest.loads(json.dumps({**unsigned, "signature": signature}))


def test_a_signature_of_one_kind_does_not_fit_the_other() -> None:
    found = json.loads(JOIN)
    del found["signature"], found["format"]
    signature = json.loads(document.sign("fedipfs-federation/v1", found, SITE))["signature"]
    found |= {"format": "fedipfs-join/v1", "signature": signature}
    with pytest.raises(SignatureWrong):
        JoinRequest.loads(json.dumps(found))


def test_a_forged_federation_file() -> None:
    with pytest.raises(SignatureWrong, match=r"hub .* signed it"):
        Federation.loads(FEDERATION.dumps(OTHER))
    with pytest.raises(SignatureWrong):
        Federation.loads(ANSWER.replace('"port": 9092', '"port": 9093'))


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "[]", "null", '"a"', "{}", "[" * 100_000, '{"format": 1e999}', "NaN"),
        *('{"format": "fedipfs-join/v1"}', '{"format": "fedipfs-federation/v1"}'),
        JOIN.replace("fedipfs-join/v1", "fedipfs-join/v2"),
        JOIN.replace('"organization"', '"organisation"'),
        JOIN.replace("{", '{"organization": "hospital-a", ', 1),
        JOIN.replace("{", '{"note": "hello", ', 1),
        JOIN.replace('"hospital-a"', "7"),
        JOIN.replace('"hospital-a"', "1.5"),
        JOIN.replace('"hospital-a"', '"hospital-a\\ud800"'),
        JOIN.replace('"hospital-a"', '"../hospital-a"'),
        JOIN.replace(SITE.public.fingerprint, OTHER.public.fingerprint),
        JOIN.replace("}", ',"x": ' + "9" * 5000 + "}"),
    ],
)
def test_what_is_no_join_file(text: str) -> None:
    with pytest.raises(JoinError, match="join file") as caught:
        JoinRequest.loads(text)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("created", "yesterday"),
        ("created", "2027-03-05T09:30:00+00:00"),
        ("created", "2027-13-05T09:30:00Z"),
        ("node_key", ""),
        ("node_key", "ssh-ed25519 AAAA"),
        ("node_key", f"{nodekey.KIND} AAAA"),
        ("node_key", f"{nodekey.KIND} \u00e9"),
    ],
)
def test_signed_nonsense_in_a_join_file(key: str, value: str) -> None:
    with pytest.raises(JoinError, match="join file"):
        JoinRequest.loads(resigned(JOIN, SITE, lambda found: found.update({key: value})))


def _with_member(found: dict[str, Any], number: int, who: Identity) -> None:
    found["members"].append({"number": number, **document.keys(who.public)})


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(port=0),
        lambda found: found.update(port=True),
        lambda found: found.update(serial=-1),
        lambda found: found.update(number=0),
        lambda found: found.update(organization="hospital-c"),
        lambda found: found.update(host="fl.example.org:9092"),
        lambda found: found.update(host="FL.example.org"),
        lambda found: found.update(ca="x"),
        lambda found: found.update(ca=tls.new_certificate(CA, ["a"], NOW).certificate),
        lambda found: found.update(peers=[7]),
        lambda found: found.update(peers=["/ip4/127.0.0.1/tcp/4001"]),
        lambda found: found.update(peers=["x" * 10_000]),
        lambda found: found.update(issued="now"),
        lambda found: found.update(members=[]),
        lambda found: found.update(members=[None]),
        lambda found: found["members"].reverse(),
        lambda found: _with_member(found, 1, HUB),
        lambda found: _with_member(found, 2, Identity.new("hospital-a")),
        lambda found: found["members"][0].update(note="x"),
        lambda found: found["coordinator"].pop("sealing"),
        lambda found: found.pop("peers"),
    ],
)
def test_signed_nonsense_in_a_federation_file(change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(JoinError, match="federation file"):
        Federation.loads(resigned(ANSWER, HUB, change))


CA = tls.new_authority("hub", NOW)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.join.json"
    path.write_text(JOIN + " " * (1 << 14))
    with pytest.raises(JoinError, match="more than 16384 bytes"):
        JoinRequest.load(path)


def test_the_age_of_a_join_file() -> None:
    REQUEST.check_age(NOW + timedelta(days=30))
    REQUEST.check_age(NOW - timedelta(days=1))
    with pytest.raises(JoinRefused, match="dated 2027-03-05, and today is 2027-04-04"):
        REQUEST.check_age(NOW + timedelta(days=30, seconds=1))
    with pytest.raises(JoinRefused, match="set its clock"):
        REQUEST.check_age(NOW - timedelta(days=1, seconds=1))


# ---- node keys


def test_a_node_key_and_its_public_line(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    files.write_new(path, nodekey.new())
    assert path.stat().st_mode & 0o777 == 0o600
    line = nodekey.public_of(path)
    assert line == line_of(path.read_text()) and line.startswith("ecdsa-sha2-nistp384 AAAA")
    assert nodekey.check(f"{line} alice@example.org\n") == line


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no OpenSSH here")
def test_a_node_key_is_what_openssh_reads(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    files.write_new(path, nodekey.new())
    told = subprocess.run(["ssh-keygen", "-y", "-f", path], capture_output=True, text=True)
    assert told.stdout.split()[:2] == nodekey.public_of(path).split()


def test_files_that_hold_no_node_key(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    short = ec.generate_private_key(ec.SECP256R1())
    pem = short.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    for text, problem in (("x", "no OpenSSH key"), (pem, "no ECDSA P-384 key")):
        path.unlink(missing_ok=True)
        files.write_new(path, text)
        with pytest.raises(KeyFileError, match=problem):
            nodekey.public_of(path)
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        nodekey.public_of(path)
    public = short.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    with pytest.raises(FormatError, match="expected a line"):
        nodekey.check(public)


def test_the_errors_have_the_exit_codes_of_their_kind() -> None:
    kinds: list[type[FedIPFSError]] = [JoinError, JoinRefused, SignatureWrong]
    assert [kind.exit_code for kind in kinds] == [2, 3, 3]
