"""Signed statements: what is signed cannot be moved, and every refusal has its name."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import libipld
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import (
    FormatError,
    SignatureMissing,
    SignatureWrong,
    SignerExpired,
    SignerRevoked,
    SignerUnknown,
)
from fedipfs.ipld import CID, DAG_CBOR
from fedipfs.trust import Identity, Member, PublicIdentity, Statement, TrustList, sign, verify

ACME, OTHER = Identity.new("acme"), Identity.new("other")
KNOWN = TrustList([Member(ACME.public, "participant"), Member(OTHER.public, "participant")])
NOW = datetime(2026, 6, 1, tzinfo=UTC)
MADE = Statement(CID.of(b"sealed"), "2026-06-01-mnist", 3, "update")


def check(
    statement: Statement = MADE,
    signature: Any = None,
    known: TrustList = KNOWN,
    organization: str = "acme",
    at: datetime = NOW,
) -> Member:
    return verify(known, organization, "participant", statement, signature, at)


def test_what_was_signed_is_accepted() -> None:
    signature = sign(ACME, MADE)
    assert len(signature) == 64
    assert check(signature=signature).identity == ACME.public


def test_every_field_counts() -> None:
    signature = sign(ACME, MADE)
    for changed in (
        replace(MADE, cid=CID.of(b"other")),
        replace(MADE, cid=CID(1, DAG_CBOR, MADE.cid.digest)),
        replace(MADE, run="2026-06-02-mnist"),
        replace(MADE, round=4),
        replace(MADE, role="model"),
    ):
        with pytest.raises(SignatureWrong, match="does not fit"):
            check(changed, signature)
    with pytest.raises(SignatureWrong):
        check(signature=signature, organization="other")


def test_one_key_in_another_name_does_not_take_signatures_along() -> None:
    public = ACME.public
    renamed = TrustList(
        [Member(PublicIdentity("acne", public.signing, public.sealing), "participant")]
    )
    with pytest.raises(SignatureWrong):
        check(signature=sign(ACME, MADE), known=renamed, organization="acne")


@settings(max_examples=30)
@given(st.integers(0, 511))
def test_every_bit_of_the_signature_counts(bit: int) -> None:
    signature = bytearray(sign(ACME, MADE))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureWrong):
        check(signature=bytes(signature))


@pytest.mark.parametrize(
    "signature", [b"", bytes(64), bytes(63), bytes(65), "text", 7, bytearray(64)]
)
def test_what_is_no_signature(signature: Any) -> None:
    with pytest.raises(SignatureWrong):
        check(signature=signature)


def test_refusals_have_names() -> None:
    signature = sign(ACME, MADE)
    with pytest.raises(SignatureMissing, match="'acme' did not sign its update"):
        check(signature=None)
    with pytest.raises(SignerUnknown):
        check(signature=signature, organization="nobody")
    with pytest.raises(SignerUnknown, match="as coordinator"):
        verify(KNOWN, "acme", "coordinator", MADE, signature, NOW)
    with pytest.raises(SignerRevoked):
        check(signature=signature, known=KNOWN.revoke("acme", NOW))
    with pytest.raises(SignerExpired):
        ended = TrustList([Member(ACME.public, "participant", valid_to=NOW)])
        check(signature=signature, known=ended)


def test_any_valid_key_of_an_organization_signs_and_an_old_one_is_named() -> None:
    new, stolen = Identity.new("acme"), Identity.new("acme")
    known = TrustList(
        [
            Member(ACME.public, "participant", valid_to=NOW + timedelta(days=1)),
            Member(stolen.public, "participant", revoked=NOW),
            Member(new.public, "participant"),
        ]
    )
    for identity in (ACME, new):
        assert check(signature=sign(identity, MADE), known=known).identity == identity.public
    with pytest.raises(SignerRevoked, match="acme's key as participant is revoked"):
        check(signature=sign(stolen, MADE), known=known)
    with pytest.raises(SignerExpired):
        later = NOW + timedelta(days=2)
        check(signature=sign(ACME, MADE), known=known, at=later)
    with pytest.raises(SignatureWrong):
        check(signature=sign(OTHER, MADE), known=known)


@pytest.mark.parametrize(
    "field",
    [
        {"cid": "bafy"},
        *({"run": run} for run in ("", "x" * 129, "a\nb", "\ud800", 7)),
        *({"round": number} for number in (-1, True, 1.0, 1 << 63)),
        *({"role": role} for role in ("", "x" * 33, "\x1b", None)),
    ],
    ids=ascii,
)
def test_malformed_statements_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="statement"):
        replace(MADE, **field)


def test_frozen_signature() -> None:
    identity = Identity(
        "acme",
        Ed25519PrivateKey.from_private_bytes(bytes(range(32))),
        X25519PrivateKey.from_private_bytes(bytes(range(32))),
    )
    # Ed25519 is deterministic: a change here would refuse every record signed so far.
    assert sign(identity, MADE).hex() == (
        "d7791f2eddbe90bddc038dac5a75f852287e19df48f67d1e57daa011f42a1411"
        "0861557b92c57038e5f6f564fb513cd3d5dc40a26eedb04fed58cd4344e6230a"
    )


def test_others_can_check_it_from_the_documentation() -> None:
    message = b"fedipfs/statement/v1\0" + bytes.fromhex("a5")
    for key, value in (
        ("cid", b"\xd8\x2a\x58\x25\x00" + MADE.cid.bytes),
        ("run", libipld.encode_dag_cbor(MADE.run)),
        ("role", libipld.encode_dag_cbor("update")),
        ("round", b"\x03"),
        ("organization", libipld.encode_dag_cbor("acme")),
    ):
        message += libipld.encode_dag_cbor(key) + value
    key = Ed25519PublicKey.from_public_bytes(ACME.public.signing)
    key.verify(sign(ACME, MADE), message)
