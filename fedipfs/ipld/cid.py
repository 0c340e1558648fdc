"""Content identifiers (CIDv0 and CIDv1 of the multiformats CID spec), sha2-256 only.

CID.of(b"hello")                      the CID of a raw block
CID.parse("bafkrei...")               from text: base32, base36, base58btc, base16, or Qm...
str(cid), cid.bytes, CID.decode(...)  canonical text and binary forms
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import libipld

from fedipfs.errors import CidError
from fedipfs.ipld import varint

if TYPE_CHECKING:
    from typing_extensions import Buffer

RAW = 0x55
DAG_PB = 0x70
DAG_CBOR = 0x71

_SHA2_256 = b"\x12\x20"  # multihash code, then the digest's length
_MAX_TEXT = 128  # base 10 text of our longest CID is shorter; keeps base58 decoding cheap
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE16 = "0123456789abcdef"
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, order=True, slots=True)
class CID:
    """The name of a block: CID version (0 or 1), codec (multicodec code) and sha2-256 digest."""

    version: int
    codec: int
    digest: bytes

    def __post_init__(self) -> None:
        if self.version not in (0, 1):
            raise CidError(f"CID version {self.version} is not supported: use 0 or 1")
        if self.version == 0 and self.codec != DAG_PB:
            raise CidError(f"CIDv0 with codec {self.codec:#x}: version 0 is dag-pb only")
        if not 0 <= self.codec <= varint.MAX:
            raise CidError(f"codec {self.codec} is out of range: use 0 to 2**63 - 1")
        if type(self.digest) is not bytes or len(self.digest) != 32:
            raise CidError(f"digest {self.digest!r:.80} is not 32 bytes")

    @classmethod
    def of(cls, block: Buffer, codec: int = RAW) -> CID:
        """The CIDv1 of a block's bytes."""
        return cls(1, codec, hashlib.sha256(block).digest())

    @classmethod
    def parse(cls, text: str) -> CID:
        """A CID from its text, in any of the usual bases. Raises CidError for anything else."""
        if not isinstance(text, str) or not 2 <= len(text) <= _MAX_TEXT:
            raise CidError(f"{text!r:.80} is not a CID: expected text like bafy... or Qm...")
        try:
            if len(text) == 46 and text.startswith("Qm"):
                data = _from_base(_BASE58, text)
            else:
                data = _MULTIBASES[text[0]](text[1:])
            cid = cls.decode(data)
        except (KeyError, ValueError) as error:
            if isinstance(error, CidError):
                raise CidError(f"{text!r} is not a CID: {error}") from None
            raise CidError(f"{text!r} is not a CID: expected text like bafy... or Qm...") from None
        if cid.version == 0 and not text.startswith("Qm"):
            raise CidError(f"{text!r} is a CIDv0 with a multibase prefix: drop its first character")
        return cid

    @classmethod
    def decode(cls, data: Buffer) -> CID:
        """A CID from exactly its binary form. Raises CidError."""
        view = bytes(data) if not isinstance(data, bytes) else data
        if len(view) == 36 and view[0] == 1 and view[1] < 0x80 and view[2:4] == _SHA2_256:
            return cls(1, view[1], view[4:])  # nearly all of them: skip the general reader
        cid, end = cls.read(view, 0)
        if end != len(view):
            raise CidError(f"{len(view) - end} bytes too many after the CID {cid}")
        return cid

    @classmethod
    def read(cls, buffer: Any, position: int) -> tuple[CID, int]:
        """The CID that starts at `position` of `buffer` (bytes-like), and where it ends."""
        version, codec, start = 0, DAG_PB, position
        if bytes(buffer[position : position + 2]) != _SHA2_256:
            version, start = varint.decode(buffer, position, CidError)
            if version != 1:
                raise CidError(f"CID version {version} in binary is not supported: use 0 or 1")
            codec, start = varint.decode(buffer, start, CidError)
        if bytes(buffer[start : start + 2]) != _SHA2_256:
            found = bytes(buffer[start : start + 2]).hex() or "nothing"
            raise CidError(f"multihash starts with {found}: only sha2-256 (1220) is supported")
        end = start + 34
        digest = bytes(buffer[start + 2 : end])
        if len(digest) != 32:
            raise CidError(f"digest of {len(digest)} bytes: the CID is cut short")
        return cls(version, codec, digest), end

    @property
    def bytes(self) -> bytes:
        """The binary form: bare multihash for version 0."""
        if self.version == 0:
            return _SHA2_256 + self.digest
        return b"\x01" + varint.encode(self.codec) + _SHA2_256 + self.digest

    def to_v1(self) -> CID:
        """The same block's name as CIDv1."""
        return self if self.version else CID(1, self.codec, self.digest)

    def matches(self, block: Buffer) -> bool:
        """Whether `block` hashes to this CID."""
        return hashlib.sha256(block).digest() == self.digest

    def __str__(self) -> str:
        if self.version == 0:
            return _to_base(_BASE58, self.bytes)
        return str(libipld.encode_multibase("b", self.bytes))  # ten times as fast as base64

    def __repr__(self) -> str:
        return f"CID({self})"


def _from_base(alphabet: str, text: str) -> bytes:
    value = 0
    for character in text:
        value = value * len(alphabet) + alphabet.index(character)
    zeros = len(text) - len(text.lstrip(alphabet[0]))
    return b"\0" * zeros + value.to_bytes((value.bit_length() + 7) // 8, "big")


def _to_base(alphabet: str, data: bytes) -> str:
    value, out = int.from_bytes(data, "big"), ""
    while value:
        value, digit = divmod(value, len(alphabet))
        out = alphabet[digit] + out
    return out


def _from_base16(text: str) -> bytes:
    if not set(text) <= set(_BASE16):  # fromhex would skip blanks
        raise CidError("base16 text holds other characters than 0 to 9 and a to f")
    return bytes.fromhex(text)


def _from_base32(text: str) -> bytes:
    whole = "b" + text.lower()
    _, data = libipld.decode_multibase(whole)
    # The last character has spare bits; with them set, two texts would name one block.
    if libipld.encode_multibase("b", data) != whole:
        raise CidError("base32 text is not in canonical form")
    return bytes(data)


def _one_case(text: str, decode: Callable[[str], bytes]) -> bytes:
    if text not in (text.lower(), text.upper()):
        raise CidError("base32 text mixes upper and lower case")
    return decode(text)


_MULTIBASES: dict[str, Callable[[str], bytes]] = {
    "b": lambda text: _one_case(text, _from_base32),
    "B": lambda text: _one_case(text, _from_base32),
    "k": lambda text: _from_base(_BASE36, text),
    "z": lambda text: _from_base(_BASE58, text),
    "f": _from_base16,
}
