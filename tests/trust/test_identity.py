"""Identities: published vectors, names, key files and who may read them."""

from __future__ import annotations

import copy
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedipfs.errors import FormatError, KeyFileError, TrustListError
from fedipfs.trust import Identity, PublicIdentity, files, new_swarm_key

P = 2**255 - 19


@pytest.fixture(autouse=True)
def usual_umask() -> Any:
    """The most permissive one: what is closed is closed by us."""
    before = os.umask(0)
    yield
    os.umask(before)


def pem(key: Any) -> str:
    return str(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


SIGNING, SEALING = pem(Ed25519PrivateKey.generate()), pem(X25519PrivateKey.generate())


def key_file(path: Path, **fields: str) -> Path:
    values = {"format": "fedipfs-identity/v1", "organization": "acme"}
    values |= {"signing": SIGNING, "sealing": SEALING} | fields
    path.write_text("".join(f"{name} = '''{value}'''\n" for name, value in values.items()))
    path.chmod(0o600)
    return path


# ---- keys


def test_keys_of_rfc_8032_and_rfc_7748(tmp_path: Path) -> None:
    # RFC 8032, 7.1, test 3; RFC 7748, 6.1, Alice
    signing = "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7"
    sealing = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
    path = key_file(
        tmp_path / "key",
        signing=pem(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(signing))),
        sealing=pem(X25519PrivateKey.from_private_bytes(bytes.fromhex(sealing))),
    )
    identity = Identity.load(path)
    assert identity.public.signing.hex() == (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
    )
    assert identity.sign(bytes.fromhex("af82")).hex() == (
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
    )
    assert identity.public.sealing.hex() == (
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    )
    bob = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert identity.exchange(bytes.fromhex(bob)).hex() == (
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )


def test_the_fingerprint_covers_both_keys_and_the_name() -> None:
    one, other = Identity.new("acme").public, Identity.new("acme").public
    assert re.fullmatch("([a-z2-7]{4} ){7}[a-z2-7]{4}", one.fingerprint)
    prints = {
        PublicIdentity(name, signing, sealing).fingerprint
        for name in ("acme", "acne")
        for signing in (one.signing, other.signing)
        for sealing in (one.sealing, other.sealing)
    }
    assert len(prints) == 8
    assert one.key_id == PublicIdentity("acne", other.signing, one.sealing).key_id
    assert one.key_id != other.key_id


def test_frozen_fingerprint_and_key_id() -> None:
    # Basepoints of both curves: people compare these texts, so they never change.
    public = PublicIdentity("acme", b"\x58" + b"\x66" * 31, b"\x09" + bytes(31))
    assert public.fingerprint == "bhnc sahe cso6 yslz wcjn 6g2g b4kh mctd"
    assert public.key_id.hex() == "010ee9e0262d1a8e"


@pytest.mark.parametrize("name", ["a", "A-1", "hospital.example_2", "9", "x" * 64])
def test_names(name: str) -> None:
    assert Identity.new(name).public.organization == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * 65, ".", "..", "-rf", "_a", "a b", "a/b", "a\n", "a\0", "é", "²", "\u0430", '"', 7],
)
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(FormatError, match="1 to 64 letters"):
        Identity.new(name)


@pytest.mark.parametrize("size", [0, 31, 33])
@pytest.mark.parametrize("which", ["signing", "sealing"])
def test_keys_of_other_sizes_are_refused(which: str, size: int) -> None:
    public = Identity.new("acme").public
    keys = {"signing": public.signing, "sealing": public.sealing, which: b"\x09" * size}
    with pytest.raises(FormatError, match=f"{which} key of acme: a public key has 32 bytes"):
        PublicIdentity("acme", **keys)


ORDER_8_X25519 = (
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
)
ORDER_8_ED25519 = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"


def encodings(*values: int) -> list[bytes]:
    """As 255 bits, with the highest bit (sign, or unused) of both kinds."""
    return [(v | bit << 255).to_bytes(32, "little") for v in values for bit in (0, 1)]


def number(text: str) -> int:
    return int.from_bytes(bytes.fromhex(text), "little")


@pytest.mark.parametrize(
    "key", encodings(0, 1, P - 1, P, P + 1, *map(number, ORDER_8_X25519)), ids=bytes.hex
)
def test_sealing_keys_of_small_order_are_refused(key: bytes) -> None:
    identity = Identity.new("acme")
    with pytest.raises(ValueError):  # what would be shared is known to all
        identity.exchange(key)
    with pytest.raises(FormatError, match="sealing key of acme: a point of small order"):
        PublicIdentity("acme", identity.public.signing, key)


@pytest.mark.parametrize(
    "key",
    encodings(0, 1, P - 1, number(ORDER_8_ED25519), P - number(ORDER_8_ED25519), P, P + 1),
    ids=bytes.hex,
)
def test_signing_keys_of_small_order_are_refused(key: bytes) -> None:
    with pytest.raises(FormatError, match="signing key of acme: a point of small order"):
        PublicIdentity("acme", key, Identity.new("acme").public.sealing)


def test_a_key_of_small_order_would_sign_anything() -> None:
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(ORDER_8_ED25519))
    accepted = 0
    for message in range(200):
        try:
            key.verify(b"\x01" + bytes(63), bytes((message,)))  # nobody made this signature
            accepted += 1
        except Exception:
            continue
    assert accepted


def test_an_identity_is_not_shown_pickled_or_copied(tmp_path: Path) -> None:
    identity = Identity.load(key_file(tmp_path / "key"))
    assert repr(identity) == f"Identity(acme, {identity.public.fingerprint})"
    for spread in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled or copied"):
            spread(identity)
    with pytest.raises(AttributeError):
        identity.note = 1  # type: ignore[attr-defined]


# ---- key files


@pytest.mark.parametrize("passphrase", [None, b"correct horse", b"\xff\x00 any bytes"])
def test_saved_keys_come_back(tmp_path: Path, passphrase: bytes | None) -> None:
    identity, path = Identity.new("acme"), tmp_path / "key"
    identity.save(path, passphrase)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert os.listdir(tmp_path) == ["key"]
    again = Identity.load(path, passphrase)
    assert again.public == identity.public
    assert again.sign(b"text") == identity.sign(b"text")
    assert Identity.is_encrypted(path) == (passphrase is not None)


def test_a_passphrase_encrypts_both_keys(tmp_path: Path) -> None:
    Identity.new("acme").save(tmp_path / "key", b"correct horse")
    text = (tmp_path / "key").read_text()
    assert text.count("BEGIN ENCRYPTED PRIVATE KEY") == 2
    assert "correct horse" not in text
    Identity.new("acme").save(tmp_path / "other", b"correct horse")
    salts = {(tmp_path / name).read_text().split("salt")[1][:40] for name in ("key", "other")}
    assert len(salts) == 2


def test_passphrases_that_do_not_fit_are_named(tmp_path: Path) -> None:
    closed, plain = tmp_path / "closed", key_file(tmp_path / "plain")
    Identity.new("acme").save(closed, b"correct horse")
    with pytest.raises(KeyFileError, match="closed is encrypted: give its passphrase"):
        Identity.load(closed)
    with pytest.raises(KeyFileError, match="closed has another passphrase, or is damaged"):
        Identity.load(closed, b"wrong")
    for give_none in (lambda: Identity.load(closed, b""), lambda: Identity.new("a").save("x", b"")):
        with pytest.raises(KeyFileError, match="passphrase is empty"):
            give_none()
    with pytest.raises(KeyFileError, match="plain has no passphrase: leave it out"):
        Identity.load(plain, b"correct horse")


def never() -> bytes:
    raise AssertionError("asked for a passphrase")


def test_a_file_is_unlocked_with_the_passphrase_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, plain = tmp_path / "closed", key_file(tmp_path / "plain")
    Identity.new("acme").save(closed, b"not \xff UTF-8")
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", os.fsdecode(b"not \xff UTF-8"))
    assert Identity.unlock(closed, never).public == Identity.load(closed, b"not \xff UTF-8").public
    assert Identity.unlock(plain, never).public == Identity.load(plain).public  # needless
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "wrong")
    with pytest.raises(KeyFileError, match="closed has another passphrase"):
        Identity.unlock(closed, never)


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_passphrase_in_the_environment_it_is_asked_for_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    closed, plain = tmp_path / "closed", key_file(tmp_path / "plain")
    Identity.new("acme").save(closed, b"correct horse")
    monkeypatch.delenv("FEDIPFS_PASSPHRASE", raising=False)
    if value is not None:
        monkeypatch.setenv("FEDIPFS_PASSPHRASE", value)
    assert Identity.unlock(plain, never).public.organization == "acme"
    assert Identity.unlock(closed, lambda: b"correct horse").public.organization == "acme"
    with pytest.raises(KeyFileError, match="closed is encrypted: set FEDIPFS_PASSPHRASE"):
        Identity.unlock(closed)


@pytest.mark.parametrize("there", ["file", "dangling link", "folder"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    path = tmp_path / "key"
    if there == "file":
        path.write_text("precious")
    elif there == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError, match="exists and keys are never overwritten"):
        Identity.new("acme").save(path)
    assert there != "file" or path.read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_cannot_be_synced_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        assert os.fstat(file).st_mode & 0o777 == 0o600  # closed already while it is written
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Identity.new("acme").save(tmp_path / "key")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
def test_files_open_to_others_are_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path / "key")
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"key is open to other users: chmod 600 {path}"):
        Identity.load(path)
    path.chmod(0o400)
    assert Identity.load(path).public.organization == "acme"


def test_files_of_other_users_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, me = key_file(tmp_path / "key"), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(KeyFileError, match="belongs to another user"):
        Identity.load(path)


def test_the_file_behind_a_link_is_what_is_checked(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key")
    (tmp_path / "link").symlink_to(path)
    assert Identity.load(tmp_path / "link").public == Identity.load(path).public
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="open to other users"):
        Identity.load(tmp_path / "link")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    problems = {"pipe": "not a regular file", "folder": "not a regular", "none": "No such file"}
    for name, problem in problems.items():
        with pytest.raises(KeyFileError, match=problem):
            Identity.load(tmp_path / name)


DAMAGED = {
    "format": ("fedipfs-identity/v2", "expected 'fedipfs-identity/v1'"),
    "organization": ("a b", "1 to 64 letters"),
    "signing": (SEALING, "expected an Ed25519 key to sign"),
    "sealing": (pem(Ed448PrivateKey.generate()), "an X25519 key to seal"),
    "more": ("", "'more' is not known"),
    "salt": ("xyz", "encrypted"),
}


@pytest.mark.parametrize("field", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, field: str) -> None:
    value, problem = DAMAGED[field]
    with pytest.raises(KeyFileError, match=problem) as caught:
        Identity.load(key_file(tmp_path / "key", **{field: value}))
    assert str(caught.value).startswith(str(tmp_path / "key"))
    assert SIGNING[40:60] not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"x = ",
        b"x" * (1 << 17),
        b"x = " + b"[" * 5000,
        b"x = " + b"1" * 5000,
        b"format = 'fedipfs-identity/v1'",
        b"format = 'fedipfs-identity/v1'\norganization = 1",
    ],
    ids=range(8),
)
def test_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(KeyFileError):
        Identity.load(tmp_path / "key")


def test_a_damaged_pem_shows_nothing_of_itself(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key", signing=SIGNING.replace("MC4C", "MC5C"))
    with pytest.raises(KeyFileError, match=r"key is damaged$"):
        Identity.load(path)
    with pytest.raises(KeyFileError, match="salt='xyz'"):
        Identity.load(key_file(tmp_path / "key", salt="xyz"), b"secret")


@pytest.mark.parametrize("value", ["7", "['MC4CAQAwBQYDK2Vw']", "{pem = 'MC4CAQAwBQYDK2Vw'}"])
def test_a_key_in_another_form_shows_nothing_of_itself(tmp_path: Path, value: str) -> None:
    path = tmp_path / "key"
    Identity.new("acme").save(path)
    start, rest = path.read_text().split("signing = ")
    path.write_text(f"{start}signing = {value}\nsealing{rest.split('sealing')[1]}")
    with pytest.raises(KeyFileError, match=r"signing is not a str but [a-z]+$"):
        Identity.load(path)


# ---- the public part


def test_the_public_text_comes_back() -> None:
    public = Identity.new("acme").public
    assert PublicIdentity.loads(public.dumps()) == public
    bare = [line for line in public.dumps().splitlines() if "fingerprint" not in line]
    assert PublicIdentity.loads("\n".join(bare)) == public


CHANGES = {
    "another version": ("public-identity/v1", "public-identity/v2", "expected"),
    "another name": ('"acme"', '"acne"', "have the fingerprint"),
    "a bad name": ('"acme"', '".."', "1 to 64 letters"),
    "upper-case hex": ('signing = "a', 'signing = "A', "lower-case hex"),
    "a blank in hex": ('signing = "a', 'signing = " a', "lower-case hex"),
    "an unknown field": ("organization", "color = 1\norganization", "'color' is not known"),
    "a missing field": ("sealing", "#", "sealing is missing"),
    "a number": ('"acme"', "7", "organization is not a str but int"),
    "a role": ("organization", 'role = "participant"\norganization', "'role' is not known"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_public_texts_are_refused(change: str) -> None:
    while True:
        public = Identity.new("acme").public
        if public.signing[0] >> 4 == 10:  # its hex begins with a letter
            break
    old, new, problem = CHANGES[change]
    text = public.dumps()
    assert old in text
    with pytest.raises(TrustListError, match=problem):
        PublicIdentity.loads(text.replace(old, new))


def test_fingerprints_compare_as_people_write_them() -> None:
    public = Identity.new("acme").public
    text = public.dumps()
    shouted = public.fingerprint.upper().replace(" ", "-")
    assert PublicIdentity.loads(text.replace(public.fingerprint, shouted)) == public


def test_swarm_keys_are_fresh_and_in_libp2p_form(tmp_path: Path) -> None:
    pattern = "/key/swarm/psk/1.0.0/\n/base16/\n[0-9a-f]{64}\n"
    one, other = new_swarm_key(), new_swarm_key()
    assert re.fullmatch(pattern, one)
    assert one != other
    files.write_new(tmp_path / "swarm.key", one)
    assert (tmp_path / "swarm.key").stat().st_mode & 0o777 == 0o600
