"""One frozen transcript of a whole protocol, and its sum recomputed by other code.

`python tests/secagg/test_transcript.py` writes it anew, which only a new version of the protocol
may need: every byte that clients and server say is in it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedipfs.ipld import CID, dagcbor
from fedipfs.secagg import (
    Client,
    Floors,
    Journal,
    Parameters,
    Record,
    Server,
    Session,
    decode,
    encode,
)
from fedipfs.trust import Identity, Member, TrustList, sign, verify

VECTOR = Path(__file__).parent / "vectors" / "transcript.json"
NAMES = ("alder", "birch", "cedar", "elder", "maple")
LATE = "cedar"
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def bits(label: str, size: int = 32) -> bytes:
    return hashlib.shake_256(label.encode()).digest(size)


def identity(name: str) -> Identity:
    return Identity(
        name,
        Ed25519PrivateKey.from_private_bytes(bits(f"{name} signs")),
        X25519PrivateKey.from_private_bytes(bits(f"{name} seals")),
    )


IDENTITIES = {name: identity(name) for name in NAMES}
LISTED = TrustList(Member(each.public, "participant") for each in IDENTITIES.values())


def check(organization: str, statement: Any, signature: bytes) -> None:
    verify(LISTED, organization, "participant", statement, signature, NOW)


def updates() -> dict[str, np.ndarray]:
    return {name: (np.arange(7) - 3) * (place + 1) / 20 for place, name in enumerate(NAMES)}


def play(folder: Path) -> dict[str, Any]:
    """All that is said, as hex; randomness must come from `known_randomness`."""
    parameters = Parameters.choose(5, 7, numbers=("weight",), details={"model": "example"})
    session = Session("2026-06-01-example", 3, NAMES, parameters)
    clients = {
        name: Client(
            session,
            name,
            lambda statement, name=name: sign(IDENTITIES[name], statement),
            check,
            Floors(),
            Journal(folder / name, session, durable=False),
        )
        for name in NAMES
    }
    server, store = Server(session, check), {}
    said: dict[str, Any] = {"session": session.to_bytes()}

    def ask(stage: str, answer: Any) -> None:
        for name, client in clients.items():
            said[f"{stage} of {name}"] = message = answer(name, client)
            server.take(message, store.get(name))

    def masked(name: str, client: Client) -> Any:
        vector = encode(parameters, updates()[name], {"weight": 10.5}, 0.5, bits(name)).vector
        said[f"vector of {name}"] = vector.tobytes()
        message = client.mask(deliveries[name], vector, lambda v: str(CID.of(v.tobytes())))
        store[name] = vector
        said[f"masked vector of {name}"] = vector.tobytes()
        return message

    ask("advertise", lambda name, client: client.advertise())
    said["roster"] = roster = server.close_advertise()
    ask("share", lambda name, client: client.share(roster))
    deliveries = server.close_share()
    said |= {f"delivery to {name}": each for name, each in deliveries.items()}
    del clients[LATE]
    ask("masked", masked)
    said["survivors"] = survivors = server.close_masked()
    ask("confirm", lambda name, client: client.confirm(survivors))
    said["request"] = request = server.close_confirm()
    ask("unmask", lambda name, client: client.unmask(request))
    result = server.result()
    said["total"], said["record"] = result.total.tobytes(), result.record
    found = decode(parameters, result.total, 4, per="weight")
    expected = sum(updates()[name] for name in clients) * 0.5 / 42
    np.testing.assert_allclose(found.values, expected, atol=2e-7)
    return {
        name: (each if isinstance(each, bytes) else each.to_bytes()).hex()
        for name, each in said.items()
    }


def known_randomness(replace: Any) -> None:
    """Everything that a client draws, from a counter."""
    counter = iter(range(1 << 30))
    replace(secrets, "token_bytes", lambda size: bits(f"draw {next(counter)}", size))
    replace(
        secrets,
        "randbelow",
        lambda below: int.from_bytes(bits(f"draw {next(counter)}", 64), "big") % below,
    )


def test_every_byte_is_as_it_was(tmp_path, monkeypatch):
    known_randomness(monkeypatch.setattr)
    found, frozen = play(tmp_path), json.loads(VECTOR.read_text())
    assert list(found) == list(frozen)
    for name, each in found.items():
        assert each == frozen[name], name


def test_the_sum_by_other_code():
    # From the record and the masked vectors alone; nothing of fedipfs.secagg but the format.
    frozen = {name: bytes.fromhex(each) for name, each in json.loads(VECTOR.read_text()).items()}
    record = dagcbor.decode(frozen["record"])
    session, roster = frozen["session"], frozen["roster"]
    hashes = b"".join(hashlib.sha256(each).digest() for each in (session, roster))
    binding = hashlib.sha256(b"binding\0" + hashes).digest()
    masks = {each["by"]: each["mask_key"] for each in record["clients"]}
    survivors = [each["by"] for each in record["survivors"]]
    assert survivors == [name for name in NAMES if name != LATE]

    def stream(secret: bytes, *words: str) -> np.ndarray:
        info = b"\0".join(word.encode() for word in words)
        key = HKDF(SHA256(), 32, binding, b"fedipfs/secagg/v1/" + info).derive(secret)
        made = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(size))
        return np.frombuffer(made, "<u4").astype(object)

    size = len(frozen["total"])
    total = sum(
        np.frombuffer(frozen[f"masked vector of {name}"], "<u4").astype(object)
        for name in survivors
    )
    for name, seed in zip(survivors, record["seeds"], strict=True):
        total = total - stream(seed, "self mask", name)
    late = X25519PrivateKey.from_private_bytes(record["mask_keys"][0])
    assert late.public_key().public_bytes_raw() == masks[LATE]
    for name in survivors:
        shared = late.exchange(X25519PublicKey.from_public_bytes(masks[name]))
        mask = stream(shared, "pair mask", *sorted((name, LATE)))
        total = total - mask if name < LATE else total + mask
    vectors = [np.frombuffer(frozen[f"vector of {name}"], "<u4") for name in survivors]
    expected = np.sum(vectors, axis=0, dtype=np.uint32)
    np.testing.assert_array_equal((total % 2**32).astype(np.uint32), expected)
    assert expected.tobytes() == frozen["total"]


def test_an_auditor_takes_it():
    frozen = {name: bytes.fromhex(each) for name, each in json.loads(VECTOR.read_text()).items()}
    record = Record.from_bytes(frozen["record"])
    store = {
        each.vector: np.frombuffer(frozen[f"masked vector of {each.by}"], "<u4")
        for each in record.survivors
    }
    assert record.audit(check, store.__getitem__).tobytes() == frozen["total"]


if __name__ == "__main__":
    known_randomness(setattr)
    with tempfile.TemporaryDirectory() as folder:
        VECTOR.write_text(json.dumps(play(Path(folder)), indent=1) + "\n")
