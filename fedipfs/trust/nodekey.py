"""The key by which a SuperNode proves to the SuperLink who it is: ECDSA P-384, as Flower asks."""

from __future__ import annotations

import base64
import binascii

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedipfs.errors import FormatError, KeyFileError
from fedipfs.trust import files
from fedipfs.trust.files import Path_

KIND = "ecdsa-sha2-nistp384"
MAX_FILE = 1 << 13  # bytes


def new() -> str:
    """A fresh private key, in OpenSSH's format, to be written for its owner only."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()


def public_of(path: Path_) -> str:
    """The public line, "ecdsa-sha2-nistp384 AAAA...", of a file of the owner's private key.

    Raises KeyFileError.
    """
    text = files.read(path, KeyFileError, limit=MAX_FILE, private=True)
    try:
        key = load_ssh_private_key(text.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileError(f"{path} holds no OpenSSH key without a passphrase") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not _right(key.curve):
        raise KeyFileError(f"{path} holds no ECDSA P-384 key")
    return _line(key.public_key())


def check(line: str) -> str:
    """A public line without its comment: the one text of this key. Raises FormatError."""
    kind, _, rest = line.strip().partition(" ")
    data = rest.partition(" ")[0]
    try:
        if kind != KIND:
            raise ValueError
        base64.b64decode(data, validate=True)
        key = load_ssh_public_key(f"{kind} {data}".encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or not _right(key.curve):
            raise ValueError
    except (ValueError, binascii.Error, UnsupportedAlgorithm, UnicodeError):
        raise FormatError(f"node key {line!r:.80}: expected a line {KIND} AAAA...") from None
    return _line(key)


def _right(curve: ec.EllipticCurve) -> bool:
    return isinstance(curve, ec.SECP384R1)


def _line(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
