"""Signatures on what crosses Flower: one a message, over all that it holds.

What is signed is a Statement about the CID that the message's content has as DAG-CBOR: the CIDs of
its arrays, its metrics, its configuration, and what it asks of which node. The signature and the
signer's name travel in the same record as the CIDs, as `signature` and `by`, beside `run`, `round`
and `to`. An answer repeats these three: it cannot be handed in for another node, or twice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict

from fedipfs.errors import FormatError, SignatureMissing, SignatureWrong
from fedipfs.exchange.vault import Vault
from fedipfs.ipld import CID, DAG_CBOR, dagcbor
from fedipfs.trust import Member, Statement

KEY = "fedipfs"  # the record that carries references and signatures
_OWN = ("signature", "by")  # fields of that record that the signature does not cover
ATTEMPT = "attempt"  # in what a coordinator sends: how often it has begun anew on the run
SENT, ANSWERED = "model", "update"  # the roles of a coordinator's and a participant's messages


class Stamp(NamedTuple):
    """The run that a message belongs to, as both sides name it, and its round, from 1.

    `to` says what is asked of which node (see `address`).
    """

    run: str
    round: int
    to: str = ""


def address(message: Message, node: int) -> str:
    """What a message to a client asks, and of which node.

    The group tells apart several questions of a kind to one node in one round.
    """
    group = message.metadata.group_id
    return f"{message.metadata.message_type} {node}{f' {group}' if group else ''}"


def stamp_of(content: RecordDict) -> Stamp | None:
    """What a message says of where it belongs."""
    record = _own_record(content)
    run, number, to = (record.get(field) for field in Stamp._fields)
    if isinstance(run, str) and type(number) is int and number >= 0 and isinstance(to, str):
        return Stamp(run, number, to)
    return None


def sign(vault: Vault, content: RecordDict, stamp: Stamp) -> None:
    """Add this party's signature to a message's content."""
    party = vault.party
    assert party is not None
    record = own_record(content)
    record.update(stamp._asdict())
    role = SENT if party.role == "coordinator" else ANSWERED
    statement = Statement(digest(content), stamp.run, stamp.round, role)
    record["signature"] = party.sign(statement)
    record["by"] = party.name


def check(
    vault: Vault, content: RecordDict, expected: Stamp | None = None, name: str | None = None
) -> Member:
    """The member of the other side that signed a message's content.

    `expected` is what it must be for, `name` the organization it must be from.
    Raises the SignatureRefused that fits.
    """
    party = vault.party
    assert party is not None
    record = _own_record(content)
    if "signature" not in record:
        raise SignatureMissing(
            f"the message is not signed, which {party.name} requires of every {party.others}"
        )
    by, signature, stamp = record.get("by"), record["signature"], stamp_of(content)
    if not isinstance(by, str) or not isinstance(signature, bytes) or stamp is None:
        raise SignatureWrong("the message's signature is incomplete")
    if name is not None and by != name:
        raise SignatureWrong(f"the message is signed by {by!r:.80} instead of {name}")
    if expected is not None and stamp != expected:
        raise SignatureWrong(f"the message of {by!r:.80} was made for another run, round or node")
    role = ANSWERED if party.role == "coordinator" else SENT
    try:
        statement = Statement(digest(content), stamp.run, stamp.round, role)
    except FormatError as error:
        raise SignatureWrong(f"the message cannot have been signed: {error}") from None
    return party.verify(by, statement, signature)


def attempt_of(content: RecordDict) -> int:
    """How often the coordinator had begun anew on the run when it sent a message; 0 at first."""
    found = _own_record(content).get(ATTEMPT)
    return found if type(found) is int and found > 0 else 0


def signer_of(content: RecordDict) -> str | None:
    """The organization that a message names as its signer; `check` says whether it is."""
    found = _own_record(content).get("by")
    return found if isinstance(found, str) else None


def signature_of(content: RecordDict) -> bytes:
    """A message's signature; empty if it has none."""
    found = _own_record(content).get("signature")
    return found if isinstance(found, bytes) else b""


def own_record(content: RecordDict) -> ConfigRecord:
    """A message's record of references and signature, which it is given if it has none."""
    record = content.setdefault(KEY, ConfigRecord())
    assert isinstance(record, ConfigRecord)
    return record


def _own_record(content: RecordDict) -> ConfigRecord:
    """A message's record of references and signature; an empty one if it has none."""
    found = content.get(KEY)
    return found if isinstance(found, ConfigRecord) else ConfigRecord()


def digest(content: RecordDict) -> CID:
    """The CID of what a signature covers."""
    return CID.of(signed_bytes(content), DAG_CBOR)


def signed_bytes(content: RecordDict) -> bytes:
    """What a signature covers: all records, as DAG-CBOR, without the signature itself."""
    value: dict[str, Any] = {}
    for key, record in content.items():
        value[key] = {
            name: _plain(item) for name, item in record.items() if key != KEY or name not in _OWN
        }
    return dagcbor.encode(value)


def _plain(value: Any) -> Any:
    """A record's value as DAG-CBOR holds it: NaN and infinities, which it does not, by name."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value
