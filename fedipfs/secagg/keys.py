"""Keys of a session: X25519 (RFC 7748) agreed on, HKDF-SHA256 (RFC 5869) derived, AES-GCM sealed.

Every key that is derived is bound to the session and to the roster of all advertised keys, to what
it is for, and to the two organizations that share it, so the same two private keys never give the
same mask twice, and whoever was shown another roster can open nothing.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedipfs.errors import WrongKeys, WrongShare

KEY = 32  # bytes
TAG = 16  # bytes that sealing adds

_DOMAIN = b"fedipfs/secagg/v1/"
# Points of small order on X25519's curve, without the bit that it ignores: 0, 1, -1, the two of
# order 8, and what else of 255 bits is 0 or 1 modulo p.
_P = 2**255 - 19
_ORDER_8 = (
    0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
)
_SMALL_ORDER = {0, 1, _P - 1, _P, _P + 1, *_ORDER_8}

_NONCE = bytes(12)  # every key seals one message only


def public_of(private: bytes) -> bytes:
    """The public key of a private one, both raw."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


class Agreement:
    """One private key and what it agrees on with others. It cannot be printed."""

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)

    def exchange(self, public: bytes, owner: str) -> bytes:
        """The 32 bytes that this private key and a peer's public key agree on: derive from them.

        Raises WrongKeys, naming the owner, for a key of small order, with which anybody agrees.
        """
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise weak(owner) from None


def is_weak(public: bytes) -> bool:
    """Whether a public key is of small order: what it agrees on with others is always zero."""
    return int.from_bytes(public, "little") & (2**255 - 1) in _SMALL_ORDER


def weak(owner: str) -> WrongKeys:
    """The refusal of a weak key."""
    return WrongKeys(f"the key of {owner} is a point of small order: it is nobody's key")


def derive(secret: bytes, use: str, binding: bytes, *names: str) -> bytes:
    """A 32-byte key for one use, by HKDF-SHA256 of a secret.

    `binding` is the session's and roster's hash, `names` who has the key, in an order that all
    keep. Uses and names hold no zero byte.
    """
    info = b"\0".join([_DOMAIN + use.encode(), *(name.encode() for name in names)])
    return HKDF(SHA256(), KEY, salt=binding, info=info).derive(secret)


def commit(secret: bytes, binding: bytes, name: str) -> bytes:
    """A hash that fixes a random 32-byte secret of `name` and does not give it away."""
    return hashlib.sha256(
        _DOMAIN + b"commitment\0" + binding + name.encode() + b"\0" + secret
    ).digest()


def seal(key: bytes, content: bytes, binding: bytes) -> bytes:
    """AES-256-GCM under a key that seals nothing else: 16 bytes more than the content."""
    return AESGCM(key).encrypt(_NONCE, content, binding)


def unseal(key: bytes, sealed: bytes, binding: bytes, sender: str) -> bytes:
    """What `seal` sealed. Raises WrongShare, naming the sender, for anything else."""
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, binding)
    except InvalidTag:
        raise WrongShare(
            f"what {sender} sealed does not open: altered, sealed to another, or in a session "
            "in which other keys were shown"
        ) from None
