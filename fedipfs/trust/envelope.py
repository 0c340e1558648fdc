"""Sealed envelopes: bytes that only the holders of some keys can read (docs/trust.md).

A random content key seals the content chunk by chunk in the STREAM construction (Hoang,
Reyhanitabar, Rogaway and Vizár 2015) of AES-256-GCM: no chunk can be changed, moved, left out or
taken from another envelope. Every object gets fresh keys, so equal content never gives equal
bytes, and a CID confirms no guess of the content. The header names the sender, and every chunk is
bound to the header: whoever cannot open an envelope cannot put its own name on a copy.

The header is the first UnixFS leaf of a sealed file and every chunk is one leaf of 1 MiB, so a
reader can fetch and open any part.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedipfs.errors import EnvelopeError, EnvelopeTampered, EnvelopeTruncated
from fedipfs.trust import header
from fedipfs.trust.header import MAX_RECIPIENTS, is_sealed
from fedipfs.trust.identity import Identity, PublicIdentity

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CHUNK", "PLAIN", "Opener", "is_sealed", "open_stream", "plain_size", "seal"]

CHUNK = 1 << 20  # bytes of a sealed chunk; the last may be shorter
TAG = 16  # bytes that sealing adds to a chunk
PLAIN = CHUNK - TAG  # bytes of content in a chunk


def seal(
    pieces: Iterable[Buffer], recipients: Sequence[PublicIdentity], sender: PublicIdentity
) -> Iterator[bytes]:
    """Seal the bytes of `pieces`, which may have any sizes, to 1 to 4096 recipients.

    `sender` is who seals, the identity that signs the CID; it can read the content later only
    if it is also a recipient.

    Yields the header, then chunks of 1 MiB (the last may be shorter), in constant memory; a
    piece is not looked at any more once the next is taken. Raises EnvelopeError at once for no
    recipients or too many, and at the end of 4 PiB.
    """
    unique = {recipient.sealing: recipient for recipient in recipients}
    if not 0 < len(unique) <= MAX_RECIPIENTS:
        raise EnvelopeError(
            f"sealing to {len(unique)} recipients: name at least one, at most {MAX_RECIPIENTS}"
        )
    content_key, nonce = secrets.token_bytes(32), secrets.token_bytes(7)
    head = header.write(content_key, nonce, list(unique.values()), sender)
    payload = _Payload.of(content_key, nonce, head)
    chunks = enumerate(_cut(pieces, PLAIN))
    sealed = (payload.encrypt(index, chunk, last) for index, (chunk, last) in chunks)
    return itertools.chain((head,), sealed)


def plain_size(cipher_bytes: int) -> int:
    """Bytes of content in `cipher_bytes` of chunks, which is all that follows the header.

    Raises EnvelopeTruncated for a size that no envelope has.
    """
    if cipher_bytes == TAG:
        return 0  # no content at all is one chunk that holds nothing
    chunks = -(-cipher_bytes // CHUNK)
    if cipher_bytes <= 0 or cipher_bytes - (chunks - 1) * CHUNK <= TAG:
        raise EnvelopeTruncated(f"{cipher_bytes} bytes of sealed chunks: the end is missing")
    return cipher_bytes - chunks * TAG


class Opener:
    """Opens the chunks of one envelope, in any order.

    `header_leaf` is exactly the header that `seal` gave. Raises NotSealed, EnvelopeVersion,
    EnvelopeTruncated, EnvelopeTampered, and NotRecipient where it is sealed to others.

    `sender` is the `sender_id`, 8 bytes, of who sealed it, by its own account: compare it with that
    of the member whose signature came with the CID. In a changed header it may be another, but
    then no chunk opens.
    """

    sender: bytes

    def __init__(self, header_leaf: Buffer, identity: Identity) -> None:
        head = bytes(header_leaf)
        content_key, nonce, self.sender = header.read(head, identity)
        self._payload = _Payload.of(content_key, nonce, head)

    def open(self, index: int, ciphertext: Buffer, *, last: bool) -> bytes:
        """The content of chunk `index`, counted from 0; `last` says that no chunk follows it.

        Raises EnvelopeTampered, and EnvelopeTruncated where a chunk or its end is missing.
        """
        size = memoryview(ciphertext).nbytes
        if size > CHUNK or (size < CHUNK and not last):
            raise EnvelopeTampered(f"chunk {index} has {size} bytes: expected {CHUNK}")
        if size < TAG or (size == TAG and index):
            raise EnvelopeTruncated(f"chunk {index} has only {size} bytes: the end is missing")
        content = self._payload.decrypt(index, ciphertext, last)
        if content is not None:
            return content
        if last and self._payload.decrypt(index, ciphertext, False) is not None:
            raise EnvelopeTruncated(f"the envelope ends after chunk {index}, which is not its last")
        raise EnvelopeTampered(f"chunk {index} was changed, moved or cut short since it was sealed")


def open_stream(pieces: Iterable[Buffer], identity: Identity) -> Iterator[bytes]:
    """The content of an envelope given as bytes in pieces of any sizes, in constant memory.

    Every chunk that it yields is as it was sealed, but only the end shows that none is missing:
    do not act on the content before. It does not say who sealed it. Raises what `Opener` raises.
    """
    head, rest = _split(iter(pieces))
    opener = Opener(head, identity)
    for index, (chunk, last) in enumerate(_cut(rest, CHUNK)):
        yield opener.open(index, chunk, last=last)


@dataclass(frozen=True, slots=True)
class _Payload:
    """Seals and opens the chunks of one envelope."""

    aead: AESGCM
    prefix: bytes
    header_hash: bytes

    @classmethod
    def of(cls, content_key: bytes, prefix: bytes, head: bytes) -> _Payload:
        key = header.derive(content_key, b"", b"payload")
        return cls(AESGCM(key), prefix, hashlib.sha256(head).digest())

    def encrypt(self, index: int, chunk: Buffer, last: bool) -> bytes:
        return self.aead.encrypt(self._nonce(index, last), memoryview(chunk), self.header_hash)

    def decrypt(self, index: int, chunk: Buffer, last: bool) -> bytes | None:
        try:
            return self.aead.decrypt(self._nonce(index, last), memoryview(chunk), self.header_hash)
        except InvalidTag:
            return None

    def _nonce(self, index: int, last: bool) -> bytes:
        if not 0 <= index < 1 << 32:
            raise EnvelopeError(f"chunk {index}: an envelope has at most 2**32")
        return self.prefix + index.to_bytes(4, "big") + bytes((last,))


def _cut(pieces: Iterable[Buffer], size: int) -> Iterator[tuple[memoryview, bool]]:
    """The bytes of `pieces` as chunks of `size`, then one of at most that, marked as the last.

    A chunk is good until the next one is taken.
    """
    # Only what may turn out to be the end is copied: the owner of a piece may reuse it as soon as
    # the next one is asked for, and nothing tells earlier whether there is a next one.
    held, filled = memoryview(bytearray(size)), 0
    for piece in pieces:
        view, start = _flat(piece), 0
        if filled:
            start = min(size - filled, len(view))
            held[filled : filled + start] = view[:start]
            filled += start
            if start == len(view):
                continue
            yield held, False
        while len(view) - start > size:
            yield view[start : start + size], False
            start += size
        filled = len(view) - start
        held[:filled] = view[start:]
    yield held[:filled], True


def _split(pieces: Iterator[Buffer]) -> tuple[bytes, Iterator[Buffer]]:
    """The header at the start of `pieces`, and the pieces after it."""
    head, needed = bytearray(), header.START
    for piece in pieces:
        view = _flat(piece)
        while view and len(head) < needed:
            taken = view[: needed - len(head)]
            head += taken
            view = view[len(taken) :]
            if len(head) == header.START:
                needed += header.map_length(bytes(head))
        if len(head) == needed:
            return bytes(head), itertools.chain((view,), pieces)
    return bytes(head), iter(())


def _flat(piece: Buffer) -> memoryview:
    view = memoryview(piece)
    return view.cast("B") if view.nbytes else memoryview(b"")  # a shape with zeros is not cast
