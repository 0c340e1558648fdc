"""Signed JSON documents: what organizations send each other once, to be read by people, too.

The signature is Ed25519 (RFC 8032) over the document's format, a zero byte and the DAG-CBOR of
everything else in it: no other text says the same, and no blank or order of keys matters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedipfs.errors import DagCborError, JoinError, SignatureWrong, TrustListError, one_line
from fedipfs.ipld import dagcbor
from fedipfs.trust import files, identity
from fedipfs.trust.files import Path_
from fedipfs.trust.identity import Identity, PublicIdentity

_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")


def dumps(format: str, content: Mapping[str, Any]) -> str:
    """A document that is not signed, as JSON of one value a line."""
    return json.dumps({"format": format, **content}, indent=1, ensure_ascii=False) + "\n"


def loads(text: str, where: Path_, format: str) -> dict[str, Any]:
    """The content of a document with this format, made of texts, whole numbers, lists and tables.

    Raises JoinError, also for a key that is there twice.
    """
    try:
        found = json.loads(
            text, object_pairs_hook=_table, parse_float=_refuse, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as failure:
        raise JoinError(f"{where} is not such a file: {one_line(failure, 200)}") from None
    named = found.pop("format", None) if type(found) is dict else None
    if named != format:
        raise JoinError(f"{where} has the format {named!r:.80}: expected {format!r}")
    return dict(found)


def sign(format: str, content: Mapping[str, Any], signer: Identity) -> str:
    """`content` as a document with the signature of `signer` at its end."""
    signature = signer.sign(_message(format, content))
    return dumps(format, {**content, "signature": signature.hex()})


def verify(found: dict[str, Any], where: Path_, format: str, signer: PublicIdentity) -> None:
    """Refuse what `loads` found if `signer` did not sign it. Raises SignatureWrong, JoinError."""
    content = {key: value for key, value in found.items() if key != "signature"}
    try:
        message = _message(format, content)
    except DagCborError as failure:
        raise JoinError(f"{where}: {one_line(failure, 200)}") from None
    signature = found.get("signature")
    try:
        if type(signature) is not str or not re.fullmatch("[0-9a-f]{128}", signature):
            raise InvalidSignature
        Ed25519PublicKey.from_public_bytes(signer.signing).verify(bytes.fromhex(signature), message)
    except InvalidSignature:
        raise SignatureWrong(
            f"{where} is not as {signer.organization} ({signer.fingerprint}) signed it: forged, "
            "or changed on its way; have it sent again"
        ) from None


def keys(public: PublicIdentity) -> dict[str, str]:
    """How a document shows an identity."""
    return {
        "organization": public.organization,
        "signing": public.signing.hex(),
        "sealing": public.sealing.hex(),
        "fingerprint": public.fingerprint,
    }


KEYS: dict[str, type] = {**identity.REQUIRED, "fingerprint": str}


def identity_of(found: Mapping[str, Any], where: Path_) -> PublicIdentity:
    """The identity that `keys` showed, whose values are checked to be texts. Raises JoinError."""
    try:
        return identity.from_fields({key: found[key] for key in KEYS}, where)
    except TrustListError as failure:
        raise JoinError(str(failure)) from None


def check(found: Any, required: Mapping[str, type], where: Path_) -> None:
    """Refuse a table that has not exactly the keys and types of `required`. Raises JoinError."""
    files.check(found, required, {}, where, JoinError)


def moment(value: datetime) -> str:
    """A moment as documents write it: in UTC, with Z."""
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def moment_of(text: str, where: str) -> datetime:
    """The moment that `moment` wrote. Raises JoinError."""
    try:
        if not _MOMENT.fullmatch(text):
            raise ValueError
        return datetime.fromisoformat(text)
    except ValueError:
        raise JoinError(
            f"{where} {text!r:.80}: expected a moment such as 2027-03-05T09:30:00Z"
        ) from None


def _message(format: str, content: Mapping[str, Any]) -> bytes:
    return format.encode() + b"\0" + dagcbor.encode(dict(content))


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no whole number")
