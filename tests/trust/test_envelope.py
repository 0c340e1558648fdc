"""Sealed envelopes: what comes back, what is refused, and that others can read and write them."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libipld
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedipfs.errors import (
    EnvelopeError,
    EnvelopeTampered,
    EnvelopeTruncated,
    EnvelopeVersion,
    NotRecipient,
    NotSealed,
)
from fedipfs.ipld import CID, dagcbor, unixfs
from fedipfs.trust import Identity, Opener, PublicIdentity, is_sealed, open_stream, seal
from fedipfs.trust.envelope import CHUNK, PLAIN, plain_size

VECTORS = Path(__file__).parent / "vectors"
ACME, OTHER, THIRD = (Identity.new(name) for name in ("acme", "other", "third"))
BOTH = [ACME.public, OTHER.public]
SENDER = Identity.new("sender").public
DATA = random.Random(0).randbytes(3 * CHUNK + 100)
EDGES = [0, 1, PLAIN - 1, PLAIN, PLAIN + 1, CHUNK, 2 * PLAIN, 2 * PLAIN + 1, 3 * PLAIN]


def sealed(content: bytes, recipients: list[PublicIdentity] = BOTH) -> list[bytes]:
    """Header and chunks."""
    return list(seal([content], recipients, SENDER))


def opened(stream: bytes, identity: Identity = ACME) -> bytes:
    return b"".join(open_stream([stream], identity))


def framed(fields: dict[str, Any]) -> bytes:
    """The header with this map."""
    block = dagcbor.encode(fields)
    return b"fedipfs/sealed\0\x01" + len(block).to_bytes(4, "big") + block


def altered(header: bytes, **fields: Any) -> bytes:
    """A header with other values in some fields."""
    return framed(libipld.decode_dag_cbor(header[20:]) | fields)


def pieces(data: bytes, cuts: list[int]) -> Iterator[memoryview]:
    """`data` cut at some places, in one buffer that is used again and again."""
    buffer = memoryview(bytearray(len(data)))
    for start, end in itertools.pairwise([0, *sorted(cuts), len(data)]):
        buffer[: end - start] = data[start:end]
        yield buffer[: end - start]
        buffer[: end - start] = b"\xee" * (end - start)


# ---- what comes back


@settings(max_examples=40)
@given(
    st.sampled_from(EDGES) | st.integers(0, len(DATA)),
    st.lists(st.integers(0, 3 * CHUNK), max_size=6),
    st.lists(st.integers(0, 3 * CHUNK), max_size=6),
)
def test_any_size_in_any_pieces(size: int, cuts: list[int], other_cuts: list[int]) -> None:
    content = DATA[:size]
    blocks = list(seal(pieces(content, [cut % (size + 1) for cut in cuts]), BOTH, SENDER))
    assert [len(block) for block in blocks[1:-1]] == [CHUNK] * (len(blocks) - 2)
    stream = b"".join(blocks)
    for identity in (ACME, OTHER):
        cut = [cut % (len(stream) + 1) for cut in other_cuts]
        assert b"".join(open_stream(pieces(stream, cut), identity)) == content
    assert plain_size(len(stream) - len(blocks[0])) == size


def test_pieces_of_one_byte_and_of_none() -> None:
    content = DATA[:300]
    stream = b"".join(seal((DATA[i : i + 1] for i in range(300)), BOTH, SENDER))
    assert b"".join(open_stream((stream[i : i + 1] for i in range(len(stream))), ACME)) == content
    assert opened(b"".join(seal([b"", content, b"", b""], BOTH, SENDER))) == content
    for nothing in ([], [b""]):
        assert opened(b"".join(seal(nothing, BOTH, SENDER))) == b""


def test_pieces_of_any_buffer() -> None:
    import numpy as np

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    stream = b"".join(seal([array, np.zeros((0, 3)), memoryview(b"x")], BOTH, SENDER))
    assert opened(stream) == array.tobytes() + b"x"


def test_every_block_is_one_unixfs_leaf_in_any_order() -> None:
    blocks = sealed(DATA)
    stored: dict[CID, bytes] = {}

    def put(block: Any, codec: int) -> CID:
        cid = CID.of(block, codec)
        stored[cid] = bytes(block)
        return cid

    root = unixfs.build(seal([DATA], BOTH, SENDER), put)
    header, *chunks = [stored[cid] for cid, _ in unixfs.leaf_links(root, stored.__getitem__)]
    assert len(chunks) == len(blocks) - 1 == 4
    assert is_sealed(header) and not any(map(is_sealed, chunks))
    opener = Opener(header, OTHER)
    for index in (2, 0, 3, 1, 2):
        content = opener.open(index, chunks[index], last=index == 3)
        assert content == DATA[index * PLAIN : (index + 1) * PLAIN]


def test_equal_content_gives_no_equal_block() -> None:
    one, other = sealed(DATA), sealed(DATA)
    assert not set(one) & set(other)
    assert len(set(one)) == len(one)
    headers = [libipld.decode_dag_cbor(blocks[0][20:]) for blocks in (one, other)]
    for secret in ("ephemeral", "nonce", "commitment"):  # the last one stands for the content key
        assert headers[0][secret] != headers[1][secret]


def test_memory_is_constant() -> None:
    piece = os.urandom(CHUNK + 5)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            blocks = seal((piece for _ in range(count)), BOTH, SENDER)
            total = sum(map(len, open_stream(blocks, ACME)))
            assert total == count * len(piece)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    small, large = peak(8), peak(64)
    assert large < small + CHUNK // 2
    assert large < 8 * CHUNK


@pytest.mark.parametrize("size", EDGES)
def test_sizes_that_no_envelope_has(size: int) -> None:
    cipher = size + max(1, -(-size // PLAIN)) * 16
    assert plain_size(cipher) == size
    full = size // PLAIN * CHUNK
    for wrong in (0, -1, *(full + extra for extra in range(1, 17) if full or extra < 16)):
        with pytest.raises(EnvelopeTruncated):
            plain_size(wrong)


# ---- recipients


def test_recipients_and_no_others() -> None:
    stream = b"".join(sealed(b"secret"))
    with pytest.raises(NotRecipient, match=r"not sealed to third \("):
        opened(stream, THIRD)
    assert b"secret" not in stream


def test_numbers_of_recipients() -> None:
    many = [PublicIdentity("p", ACME.public.signing, os.urandom(32)) for _ in range(4096)]
    for wrong in ([], many + BOTH):
        with pytest.raises(EnvelopeError, match="at least one, at most 4096"):
            seal([b""], wrong, SENDER)  # at once, not when it is read
    blocks = sealed(b"secret", [*many[1:], ACME.public])
    assert len(blocks[0]) < 1 << 18
    assert opened(b"".join(blocks)) == b"secret"
    once = sealed(b"secret", [ACME.public, ACME.public])
    assert len(once[0]) == len(sealed(b"secret", [ACME.public])[0])


# ---- senders


def test_the_sender_is_who_sealed_it() -> None:
    for sender in (SENDER, ACME.public, OTHER.public):  # a recipient or not
        header, chunk = seal([b"text"], BOTH, sender)
        for identity in (ACME, OTHER):
            opener = Opener(header, identity)
            assert opener.open(0, chunk, last=True) == b"text"
            assert opener.sender == sender.sender_id


@pytest.mark.parametrize("size", [0, 5, PLAIN, 2 * PLAIN + 5])
def test_a_copy_keeps_its_sender(size: int) -> None:
    # THIRD wants to sign what it cannot read as its own, and leaves all but the name as it was.
    header, *chunks = sealed(DATA[:size])
    copied = altered(header, sender=THIRD.public.sender_id)
    assert len(copied) == len(header)
    opener = Opener(copied, ACME)
    assert opener.sender == THIRD.public.sender_id
    for index, chunk in enumerate(chunks):
        with pytest.raises(EnvelopeTampered, match=f"chunk {index}"):
            opener.open(index, chunk, last=index == len(chunks) - 1)
    with pytest.raises(EnvelopeTampered):
        opened(copied + b"".join(chunks))
    assert Opener(header, ACME).sender == SENDER.sender_id


# ---- attacks


def test_every_truncation_is_refused() -> None:
    stream = b"".join(sealed(b"some content"))
    header = len(stream) - 28
    found: dict[type, list[int]] = {}
    for end in range(len(stream)):
        with pytest.raises(EnvelopeError) as caught:
            opened(stream[:end])
        found.setdefault(caught.type, []).append(end)
    assert found == {
        NotSealed: list(range(15)),
        EnvelopeTruncated: list(range(15, header + 16)),
        EnvelopeTampered: list(range(header + 16, header + 28)),  # a tag cannot tell why it fails
    }


@pytest.mark.parametrize("missing", [1, CHUNK - 16, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
@pytest.mark.parametrize("size", [3 * PLAIN, 2 * PLAIN + 1])
def test_truncated_large_envelopes(size: int, missing: int) -> None:
    header, *chunks = sealed(DATA[:size])
    stream = b"".join(chunks)
    end = max(0, len(stream) - missing)
    aligned = end % CHUNK <= 16
    with pytest.raises(EnvelopeTruncated if aligned else EnvelopeTampered):
        opened(header + stream[:end])


def test_every_bit_flip_is_refused_by_name() -> None:
    content = b"some content"
    stream = b"".join(sealed(content))
    header = len(stream) - len(content) - 16
    for bit in range(len(stream) * 8):
        changed = bytearray(stream)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EnvelopeError) as caught:
            opened(bytes(changed))
        if bit // 8 < 15:
            assert caught.type is NotSealed
        elif bit // 8 == 15:
            assert caught.type is EnvelopeVersion
        elif bit // 8 >= header:
            assert caught.type is EnvelopeTampered
        else:  # the length, the suite's name, the id of the recipient
            named = (EnvelopeTampered, EnvelopeTruncated, EnvelopeVersion, NotRecipient)
            assert caught.type in named


@settings(max_examples=30)
@given(st.integers(0, 3 * CHUNK * 8 - 1))
def test_bit_flips_in_large_envelopes(bit: int) -> None:
    header, *chunks = LARGE
    index, bit = divmod(bit, CHUNK * 8)
    changed = bytearray(chunks[index])
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(EnvelopeTampered, match=f"chunk {index} was changed"):
        Opener(header, ACME).open(index, changed, last=False)


LARGE = sealed(DATA)


def test_chunks_cannot_be_moved_or_taken_from_elsewhere() -> None:
    header, *chunks = LARGE
    _, *others = sealed(DATA)  # the same content to the same recipients
    arrangements = {
        "swapped": [chunks[1], chunks[0], *chunks[2:]],
        "first left out": chunks[1:],
        "one left out": [chunks[0], *chunks[2:]],
        "twice": [chunks[0], *chunks],
        "spliced": [chunks[0], others[1], *chunks[2:]],
        "another end": [*chunks[:3], others[3]],
        "another body": others,
        "end in the middle": [*chunks[:2], chunks[3]],
    }
    for name, arranged in arrangements.items():
        with pytest.raises(EnvelopeTampered):
            opened(header + b"".join(arranged))
            pytest.fail(name)
    assert opened(header + b"".join(chunks)) == DATA


@pytest.mark.parametrize("size", [0, 5, PLAIN, PLAIN + 5])
def test_nothing_can_be_appended(size: int) -> None:
    stream = b"".join(sealed(DATA[:size]))
    for extra in (b"\0", bytes(16), bytes(CHUNK), LARGE[1], stream):
        with pytest.raises(EnvelopeTampered):
            opened(stream + extra)


def test_openers_check_place_and_size() -> None:
    header, *chunks = LARGE
    opener = Opener(header, ACME)
    for index, chunk, last, error in (
        (1, chunks[0], False, EnvelopeTampered),
        (0, chunks[0], True, EnvelopeTruncated),  # others follow it
        (3, chunks[3], False, EnvelopeTampered),
        (0, chunks[0] + b"\0", False, EnvelopeTampered),
        (0, chunks[0][:-1], False, EnvelopeTampered),
        (1, chunks[0][:16], True, EnvelopeTruncated),
        (0, b"", True, EnvelopeTruncated),
        (-1, chunks[0], False, EnvelopeError),
        (1 << 32, chunks[0], False, EnvelopeError),
    ):
        with pytest.raises(error):
            opener.open(index, chunk, last=last)


def test_headers_of_another_length() -> None:
    header = LARGE[0]
    with pytest.raises(EnvelopeTampered, match="1 bytes too many"):
        Opener(header + b"\0", ACME)
    with pytest.raises(EnvelopeTruncated):
        Opener(header[:-1], ACME)


def test_plain_bytes_are_not_sealed() -> None:
    for plain in (b"", b"fedipfs", DATA[:100], b'\x40\0\0\0\0\0\0\0{"__metadata__":'):
        assert not is_sealed(plain)
        with pytest.raises(NotSealed):
            Opener(plain, ACME)
        with pytest.raises(NotSealed):
            opened(plain)


def test_other_versions_are_known_as_such() -> None:
    stream = b"".join(sealed(b"text"))
    later = stream[:15] + b"\x02" + stream[16:]
    assert is_sealed(later)
    with pytest.raises(EnvelopeVersion, match="version 2"):
        opened(later)
    with pytest.raises(EnvelopeVersion, match="suite 'x448'"):
        opened(write(b"text", BOTH, {"suite": "x448"}))


def test_a_length_beyond_the_limit_is_refused_before_it_is_read() -> None:
    taken = []

    def endless() -> Iterator[bytes]:
        yield b"fedipfs/sealed\0\x01" + b"\xff" * 4
        while True:
            taken.append(1)
            yield bytes(CHUNK)

    with pytest.raises(EnvelopeTampered, match="the limit is 262144"):
        list(open_stream(endless(), ACME))
    assert not taken


# ---- an independent reader and writer, from docs/trust.md alone


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, 32 bytes."""
    extracted = hmac.digest(salt or bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_hkdf_of_rfc_5869() -> None:
    # Appendix A.1 and A.3: the first 32 of their 42 bytes
    salt, info = bytes(range(13)), bytes(range(0xF0, 0xFA))
    assert hkdf(b"\x0b" * 22, salt, info).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    )
    assert hkdf(b"\x0b" * 22, b"", b"").hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    )


def read(stream: bytes, private: X25519PrivateKey) -> tuple[bytes, bytes]:
    """The id of the sender, and the content."""
    assert stream[:16] == b"fedipfs/sealed\0\x01"
    end = 20 + int.from_bytes(stream[16:20], "big")
    header = libipld.decode_dag_cbor(stream[20:end])
    assert header["suite"] == "x25519-hkdf-sha256-aes-256-gcm-stream"
    mine = private.public_key().public_bytes_raw()
    key_id = hashlib.sha256(b"fedipfs/key-id/v1\0" + mine).digest()[:8]
    wrapped = next(wrapped for other, wrapped in header["recipients"] if other == key_id)
    shared = private.exchange(X25519PublicKey.from_public_bytes(header["ephemeral"]))
    wrap_key = hkdf(shared, header["ephemeral"] + mine, b"fedipfs/envelope/v1/wrap")
    bound = header["nonce"] + header["commitment"]
    content_key = AESGCM(wrap_key).decrypt(bytes(12), wrapped, bound)
    assert hkdf(content_key, b"", b"fedipfs/envelope/v1/commitment") == header["commitment"]
    cipher = AESGCM(hkdf(content_key, b"", b"fedipfs/envelope/v1/payload"))
    chunks = [stream[at : at + 2**20] for at in range(end, len(stream), 2**20)]
    content = b""
    for index, chunk in enumerate(chunks):
        last = index == len(chunks) - 1
        nonce = header["nonce"] + index.to_bytes(4, "big") + bytes([last])
        content += cipher.decrypt(nonce, chunk, hashlib.sha256(stream[:end]).digest())
    return header["sender"], content


def write(
    content: bytes,
    recipients: list[PublicIdentity],
    forced: dict[str, Any] | None = None,
    keys: list[bytes] | None = None,
    cut: int = PLAIN,
) -> bytes:
    """An envelope with fixed secrets; header fields, a content key each, other cuts on demand."""
    private = X25519PrivateKey.from_private_bytes(b"\x07" * 32)
    keys = keys or [b"\x01" * 32] * len(recipients)
    header: dict[str, Any] = {
        "suite": "x25519-hkdf-sha256-aes-256-gcm-stream",
        "sender": b"\x08" * 8,
        "ephemeral": private.public_key().public_bytes_raw(),
        "nonce": b"\x02" * 7,
        "commitment": hkdf(keys[0], b"", b"fedipfs/envelope/v1/commitment"),
    }
    header["recipients"] = []
    for recipient, key in zip(recipients, keys, strict=True):
        shared = private.exchange(X25519PublicKey.from_public_bytes(recipient.sealing))
        salt = private.public_key().public_bytes_raw() + recipient.sealing
        wrap = AESGCM(hkdf(shared, salt, b"fedipfs/envelope/v1/wrap"))
        bound = header["nonce"] + header["commitment"]
        wrapped = wrap.encrypt(bytes(12), key, bound)
        header["recipients"].append([recipient.key_id, wrapped])
    head = framed(header | (forced or {}))
    cipher, stream = AESGCM(hkdf(keys[0], b"", b"fedipfs/envelope/v1/payload")), head
    count = max(1, -(-len(content) // cut))
    for index in range(count):
        nonce = header["nonce"] + index.to_bytes(4, "big") + bytes([index == count - 1])
        chunk = content[index * cut : (index + 1) * cut]
        stream += cipher.encrypt(nonce, chunk, hashlib.sha256(head).digest())
    return stream


@pytest.mark.parametrize("size", EDGES)
def test_others_read_what_is_written_and_write_what_is_read(size: int) -> None:
    private = X25519PrivateKey.generate()
    public = PublicIdentity("other", ACME.public.signing, private.public_key().public_bytes_raw())
    sender = hashlib.sha256(b"fedipfs/sender-id/v1\0" + SENDER.signing).digest()[:8]
    theirs = read(b"".join(sealed(DATA[:size], [ACME.public, public])), private)
    assert theirs == (sender, DATA[:size])
    ours = write(DATA[:size], BOTH)
    assert opened(ours, OTHER) == DATA[:size]
    end = 20 + int.from_bytes(ours[16:20], "big")
    assert Opener(ours[:end], OTHER).sender == b"\x08" * 8


def test_a_frozen_envelope_opens_for_ever(tmp_path: Path) -> None:
    key = tmp_path / "identity.key"
    key.write_bytes((VECTORS / "identity-for-tests-only.key").read_bytes())
    key.chmod(0o600)
    identity = Identity.load(key)
    stream = bytes.fromhex((VECTORS / "sealed.hex").read_text())
    assert opened(stream, identity) == b"Sealed once, to be opened for ever.\n"
    end = 20 + int.from_bytes(stream[16:20], "big")
    assert Opener(stream[:end], identity).sender.hex() == "d456e6a63e950318"


# ---- headers from hostile hands


def test_one_cid_cannot_hold_two_contents() -> None:
    # AES-GCM would let a sender find one ciphertext for two keys: the commitment names one.
    stream = write(b"text", BOTH, keys=[b"\x01" * 32, b"\x03" * 32])
    assert opened(stream, ACME) == b"text"
    with pytest.raises(EnvelopeTampered, match="not the one that it commits to"):
        opened(stream, OTHER)


def test_chunks_of_other_sizes_are_refused_whoever_sealed_them() -> None:
    # Sizes would not add up, and one content could be cut in several ways.
    stream = write(b"some content", [ACME.public], cut=6)
    header, first, last = stream[:-44], stream[-44:-22], stream[-22:]
    opener = Opener(header, ACME)
    with pytest.raises(EnvelopeTampered, match="chunk 0 has 22 bytes"):
        opener.open(0, first, last=False)
    assert opener.open(1, last, last=True) == b"ontent"


entry = [ACME.public.key_id, bytes(48)]
MALFORMED: dict[str, dict[str, Any]] = {
    "no suite": {"suite": None},
    "low order": {"ephemeral": bytes(32)},
    "short key": {"ephemeral": bytes(31)},
    "text for bytes": {"ephemeral": "x" * 32},
    "long nonce": {"nonce": bytes(8)},
    "short commitment": {"commitment": bytes(31)},
    "long sender": {"sender": bytes(9)},
    "a name as sender": {"sender": "acme"},
    "one more field": {"note": 1},
    "nobody": {"recipients": []},
    "no list": {"recipients": {}},
    "no pairs": {"recipients": [[]]},
    "no lists": {"recipients": [b"12345678"]},
    "long id": {"recipients": [[bytes(9), bytes(48)]]},
    "short wrapping": {"recipients": [[ACME.public.key_id, bytes(47)]]},
    "three": {"recipients": [[*entry, 1]]},
    "all ours, none fits": {"recipients": [entry] * 4096},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers(case: str) -> None:
    began = time.monotonic()
    with pytest.raises(EnvelopeTampered):
        opened(write(b"text", [ACME.public], MALFORMED[case]))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("field", ["sender", "ephemeral", "nonce", "commitment", "recipients"])
def test_headers_that_lack_a_field(field: str) -> None:
    fields = libipld.decode_dag_cbor(LARGE[0][20:])
    del fields[field]
    for instead in ({}, {"note": bytes(8)}):
        with pytest.raises(EnvelopeTampered, match="envelope header"):
            Opener(framed({**fields, **instead}), ACME)


def test_a_second_entry_with_our_id_does_not_hide_the_first() -> None:
    recipients = libipld.decode_dag_cbor(LARGE[0][20:])["recipients"]
    head = altered(LARGE[0], recipients=[entry, *recipients])
    with pytest.raises(EnvelopeTampered, match="chunk 0"):  # the key is found, the hash differs
        Opener(head, ACME).open(0, LARGE[1], last=False)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_random_bytes_are_refused(data: bytes, magic: bool, sized: bool) -> None:
    stream = data
    if magic:
        length = len(data).to_bytes(4, "big") if sized else b""
        stream = b"fedipfs/sealed\0\x01" + length + data
    with pytest.raises(EnvelopeError):
        opened(stream)


values = st.recursive(
    st.none() | st.integers(-(2**64), 2**64 - 1) | st.text(max_size=9) | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@settings(max_examples=300)
@given(
    st.sampled_from(["suite", "sender", "ephemeral", "nonce", "commitment", "recipients", ""]),
    values,
)
def test_random_headers_are_refused(field: str, value: Any) -> None:
    forced = {field: value} if field else value
    if isinstance(forced, dict):
        assume(forced)
        stream = write(b"text", [ACME.public], forced)
    else:
        block = dagcbor.encode(forced)
        stream = b"fedipfs/sealed\0\x01" + len(block).to_bytes(4, "big") + block
    with pytest.raises(EnvelopeError):
        opened(stream)


@pytest.mark.parametrize(
    "block",
    [
        b"\x9a\x00\x03\xff\xf0" + bytes(0x3FFF0),  # a list of 262,128 numbers
        b"\x9a\x00\x03\xff\xf0" + b"\x80" * 0x3FFF0,  # of empty lists
        b"\x81" * (1 << 18),
        b"\xa1\x61a" * 80_000,
        b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
    ],
    ids=["numbers", "lists", "deep lists", "deep maps", "endless list", "endless bytes"],
)
def test_costly_headers_cost_little(block: bytes) -> None:
    stream = b"fedipfs/sealed\0\x01" + len(block).to_bytes(4, "big") + block
    began = time.monotonic()
    with pytest.raises(EnvelopeTampered):
        opened(stream)
    assert time.monotonic() - began < 10
