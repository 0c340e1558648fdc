"""Signed statements: an organization says that a CID is its model, update or record of a round.

The CID commits to every byte below it, and for sealed files that is the envelope's header as
well as its chunks. So this one short signature covers the content, whom it was sealed to, and
the place it was made for: it cannot be moved to another run, round, role or organization.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedipfs.errors import FormatError, SignatureMissing, SignatureWrong
from fedipfs.ipld import CID, dagcbor
from fedipfs.trust.identity import Identity
from fedipfs.trust.trustlist import Member, Role, TrustList

SIGNATURE = 64  # bytes
MAX_RUN, MAX_ROLE = 128, 32  # characters

_DOMAIN = b"fedipfs/statement/v1\0"


@dataclass(frozen=True, slots=True)
class Statement:
    """What is signed: the CID, its run's id, its round (0 or more), and what it is there.

    `role` is "model", "update", "record" or another printable text of at most 32 characters,
    `run` one of at most 128. Raises FormatError.
    """

    cid: CID
    run: str
    round: int
    role: str

    def __post_init__(self) -> None:
        if type(self.cid) is not CID:
            raise FormatError(f"statement about {self.cid!r:.80}: expected a CID")
        for name, text, limit in (("run", self.run, MAX_RUN), ("role", self.role, MAX_ROLE)):
            if type(text) is not str or not 0 < len(text) <= limit or not text.isprintable():
                raise FormatError(
                    f"statement with {name}={text!r:.80}: expected 1 to {limit} printable "
                    "characters"
                )
        if type(self.round) is not int or not 0 <= self.round < 1 << 63:
            raise FormatError(f"statement with round={self.round!r:.80}: expected 0 or more")


def sign(identity: Identity, statement: Statement) -> bytes:
    """The organization's Ed25519 signature (RFC 8032), 64 bytes."""
    return identity.sign(_message(statement, identity.public.organization))


def verify(
    trusted: TrustList,
    organization: str,
    role_of_signer: Role,
    statement: Statement,
    signature: bytes | None,
    at: datetime,
) -> Member:
    """The member whose key made the signature, which may sign at the moment `at` (aware).

    Raises SignatureMissing, SignerUnknown, SignerExpired, SignerRevoked and SignatureWrong. Take
    `at` from a clock of your own: who stole a key can write any date into what it signs.
    """
    if signature is None:
        raise SignatureMissing(f"{organization!r:.80} did not sign its {statement.role}")
    able = trusted.signer(organization, role_of_signer, at)
    for member in able:
        if _fits(member, statement, signature):
            return member
    for member in trusted.entries(organization, role_of_signer):
        if member not in able and _fits(member, statement, signature):
            raise member.refusal(at)  # an old key of an organization that has a new one
    raise SignatureWrong(
        f"{organization}'s signature does not fit its {statement.role} {statement.cid} "
        f"of round {statement.round}: other content, another place or another key"
    )


def _fits(member: Member, statement: Statement, signature: bytes) -> bool:
    if not isinstance(signature, bytes) or len(signature) != SIGNATURE:
        return False
    key = Ed25519PublicKey.from_public_bytes(member.identity.signing)
    try:
        key.verify(signature, _message(statement, member.identity.organization))
    except InvalidSignature:
        return False
    return True


def _message(statement: Statement, organization: str) -> bytes:
    return _DOMAIN + dagcbor.encode(
        {
            "cid": statement.cid,
            "run": statement.run,
            "round": statement.round,
            "role": statement.role,
            "organization": organization,
        }
    )
