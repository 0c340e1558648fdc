"""The header of a sealed envelope: who sealed it, for whom, and its content key for each of them.

A content key is wrapped for a recipient by X25519 (RFC 7748), HKDF-SHA256 (RFC 5869) and
AES-256-GCM (SP 800-38D). Bytes: magic, version, length (4, big endian), a DAG-CBOR map.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedipfs.errors import (
    DagCborError,
    EnvelopeTampered,
    EnvelopeTruncated,
    EnvelopeVersion,
    NotRecipient,
    NotSealed,
)
from fedipfs.ipld import dagcbor
from fedipfs.trust.identity import Identity, PublicIdentity

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"fedipfs/sealed\0"
VERSION = 1
SUITE = "x25519-hkdf-sha256-aes-256-gcm-stream"
START = len(MAGIC) + 1 + 4  # bytes before the map
MAX_MAP = 1 << 18  # bytes; 4096 recipients need 246 kB
MAX_RECIPIENTS = 4096
KEY_ID = 8  # bytes; also of a sender's id

# bytes of the map's plain values
_SIZES = {"sender": KEY_ID, "ephemeral": 32, "nonce": 7, "commitment": 32}


def write(
    content_key: bytes,
    nonce: bytes,
    recipients: Sequence[PublicIdentity],
    sender: PublicIdentity,
) -> bytes:
    """The header by which `sender` gives a content key (32 bytes) to its recipients.

    `nonce` is how the nonces of the chunks begin, 7 bytes.
    """
    ephemeral = X25519PrivateKey.generate()
    public, commitment = ephemeral.public_key().public_bytes_raw(), _commitment(content_key)
    wrapped = []
    for recipient in recipients:
        shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(recipient.sealing))
        aead = _wrapping(shared, public, recipient.sealing)
        wrapped.append([recipient.key_id, aead.encrypt(bytes(12), content_key, nonce + commitment)])
    block = dagcbor.encode(
        {
            "suite": SUITE,
            "sender": sender.sender_id,
            "ephemeral": public,
            "nonce": nonce,
            "commitment": commitment,
            "recipients": wrapped,
        }
    )
    return MAGIC + bytes((VERSION,)) + len(block).to_bytes(4, "big") + block


def read(header: bytes, identity: Identity) -> tuple[bytes, bytes, bytes]:
    """The content key, the nonce and the sender's id of a whole header.

    Raises NotSealed, EnvelopeVersion, EnvelopeTruncated, EnvelopeTampered and NotRecipient.
    """
    fields = _parse(header)
    key = _unwrap(fields, identity)
    # AES-GCM commits to no key: without this, whoever seals could make one CID that opens to
    # different content for different recipients.
    if not hmac.compare_digest(_commitment(key), fields["commitment"]):
        raise EnvelopeTampered("the envelope's content key is not the one that it commits to")
    return key, fields["nonce"], fields["sender"]


def derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    """A key of 32 bytes by HKDF-SHA256."""
    return HKDF(SHA256(), 32, salt, b"fedipfs/envelope/v1/" + purpose).derive(key)


def _commitment(content_key: bytes) -> bytes:
    return derive(content_key, b"", b"commitment")


def _wrapping(shared: bytes, ephemeral: bytes, recipient: bytes) -> AESGCM:
    """The cipher that wraps one content key for one recipient, and nothing else ever."""
    return AESGCM(derive(shared, ephemeral + recipient, b"wrap"))


def is_sealed(first_leaf: Buffer) -> bool:
    """Whether a file that begins with these bytes is an envelope, of any version."""
    return bytes(memoryview(first_leaf)[: len(MAGIC)]) == MAGIC


def map_length(start: bytes) -> int:
    """Bytes of the header's map, from a file's first 20 bytes, or fewer if it is shorter."""
    if not is_sealed(start):
        raise NotSealed("these bytes are not sealed: expected an envelope")
    if len(start) < START:
        raise EnvelopeTruncated("the envelope ends inside its header")
    version = start[len(MAGIC)]
    if version != VERSION:
        raise EnvelopeVersion(f"envelope of version {version}: this FedIPFS knows {VERSION}")
    length = int.from_bytes(start[START - 4 : START], "big")
    if length > MAX_MAP:
        raise EnvelopeTampered(f"envelope header of {length} bytes: the limit is {MAX_MAP}")
    return length


def _parse(header: bytes) -> dict[str, Any]:
    """The checked map of a header."""
    end = START + map_length(header[:START])
    if len(header) < end:
        raise EnvelopeTruncated("the envelope ends inside its header")
    if len(header) > end:
        raise EnvelopeTampered(f"{len(header) - end} bytes too many after the envelope's header")
    try:
        fields = dagcbor.decode(header[START:])
    except DagCborError as error:
        raise EnvelopeTampered(f"envelope header: {error}") from None
    if type(fields) is not dict or type(fields.get("suite")) is not str:
        raise EnvelopeTampered("envelope header: it names no suite")
    if fields["suite"] != SUITE:
        raise EnvelopeVersion(f"envelope with suite {fields['suite']!r:.80}: expected {SUITE!r}")
    if len(fields) != len(_SIZES) + 2 or not all(
        _is_bytes(fields.get(name), size) for name, size in _SIZES.items()
    ):
        raise EnvelopeTampered("envelope header: its fields are not those of its suite")
    recipients = fields.get("recipients")
    if type(recipients) is not list or not 0 < len(recipients) <= MAX_RECIPIENTS:
        raise EnvelopeTampered(f"envelope header: expected 1 to {MAX_RECIPIENTS} recipients")
    if not all(map(_is_entry, recipients)):
        raise EnvelopeTampered("envelope header: a recipient is malformed")
    return fields


def _is_entry(entry: Any) -> bool:
    if type(entry) is not list or len(entry) != 2:
        return False
    return _is_bytes(entry[0], KEY_ID) and _is_bytes(entry[1], 48)


def _is_bytes(value: Any, size: int) -> bool:
    return type(value) is bytes and len(value) == size


def _unwrap(fields: dict[str, Any], identity: Identity) -> bytes:
    """The content key, with one exchange of keys, however many entries have our key's id."""
    key_id = identity.public.key_id
    mine = [wrapped for other, wrapped in fields["recipients"] if other == key_id]
    if not mine:
        who = f"{identity.public.organization} ({identity.public.fingerprint})"
        raise NotRecipient(f"the envelope is not sealed to {who}: ask its sender to include it")
    try:
        shared = identity.exchange(fields["ephemeral"])
    except ValueError:
        raise EnvelopeTampered("envelope header: its ephemeral key is of small order") from None
    aead = _wrapping(shared, fields["ephemeral"], identity.public.sealing)
    for wrapped in mine:
        with contextlib.suppress(InvalidTag):
            return aead.decrypt(bytes(12), wrapped, fields["nonce"] + fields["commitment"])
    raise EnvelopeTampered("the envelope's header was changed since it was sealed")
