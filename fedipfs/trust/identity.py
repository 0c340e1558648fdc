"""An organization's keys: Ed25519 (RFC 8032) to sign with, X25519 (RFC 7748) to be sealed to."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedipfs.errors import FormatError, KeyFileError, TrustListError
from fedipfs.trust import files
from fedipfs.trust.files import Path_

FORMAT = "fedipfs-identity/v1"
PUBLIC_FORMAT = "fedipfs-public-identity/v1"
MAX_FILE = 1 << 16  # bytes
PASSPHRASE = "FEDIPFS_PASSPHRASE"  # the environment variable

# The first character keeps names from looking like options, hidden files or `..`.
_ORGANIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Ed25519 keys of small order, y without its sign bit: 0, 1, -1, the two of order 8, and what
# else of 255 bits is 0 or 1 modulo p. Under such a key one signature fits many messages.
_P = 2**255 - 19
_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER = {0, 1, _P - 1, _P, _P + 1, _ORDER_8, _P - _ORDER_8}


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What others may know: a name and two raw public keys of 32 bytes.

    The name is 1 to 64 letters, digits, `.`, `_` and `-` (ASCII), the first a letter or digit.
    Raises FormatError for other names, and for keys of wrong size or small order.
    """

    organization: str
    signing: bytes
    sealing: bytes

    def __post_init__(self) -> None:
        name = self.organization
        check_organization(name)
        for kind, key in (("signing", self.signing), ("sealing", self.sealing)):
            if type(key) is not bytes or len(key) != 32:
                raise FormatError(f"{kind} key of {name}: a public key has 32 bytes")
        if int.from_bytes(self.signing, "little") & (2**255 - 1) in _SMALL_ORDER:
            raise FormatError(f"signing key of {name}: a point of small order is nobody's key")
        try:
            _exchange(_PROBE, self.sealing)
        except ValueError:
            raise FormatError(
                f"sealing key of {name}: a point of small order is nobody's key"
            ) from None

    @property
    def fingerprint(self) -> str:
        """160 bits of SHA-256 over both keys and the name, in base32 for reading out."""
        data = b"fedipfs/fingerprint/v1\0" + self.signing + self.sealing
        digest = hashlib.sha256(data + self.organization.encode()).digest()
        text = base64.b32encode(digest[:20]).decode().lower()
        return " ".join(text[start : start + 4] for start in range(0, len(text), 4))

    @property
    def key_id(self) -> bytes:
        """8 bytes that name the sealing key of a recipient in an envelope."""
        return hashlib.sha256(b"fedipfs/key-id/v1\0" + self.sealing).digest()[:8]

    @property
    def sender_id(self) -> bytes:
        """8 bytes that name the signing key of the sender in an envelope.

        Not its sealing key: anyone can give another's as its own, and need never use it.
        """
        return hashlib.sha256(b"fedipfs/sender-id/v1\0" + self.signing).digest()[:8]

    def fields(self) -> str:
        """The lines of TOML that a public file and a trust list share."""
        return (
            f'organization = "{self.organization}"\n'
            f'signing = "{self.signing.hex()}"\n'
            f'sealing = "{self.sealing.hex()}"\n'
            f'fingerprint = "{self.fingerprint}"\n'
        )

    def dumps(self) -> str:
        """The text to hand to others."""
        return f'format = "{PUBLIC_FORMAT}"\n{self.fields()}'

    @classmethod
    def loads(cls, text: str, where: Path_ = "public identity") -> PublicIdentity:
        """The identity that `dumps` wrote. Raises TrustListError."""
        found = files.table(text, where, TrustListError, PUBLIC_FORMAT)
        files.check(found, REQUIRED, {"fingerprint": str}, where, TrustListError)
        return from_fields(found, where)

    @classmethod
    def load(cls, path: Path_) -> PublicIdentity:
        """The identity in a public file. Raises TrustListError."""
        return cls.loads(files.read(path, TrustListError, limit=MAX_FILE), path)


def check_organization(name: str) -> None:
    """Refuse what cannot be an organization's name. Raises FormatError."""
    if type(name) is not str or not _ORGANIZATION.fullmatch(name):
        raise FormatError(
            f"organization {name!r:.80}: use 1 to 64 letters, digits, '.', '_' or '-', "
            "the first a letter or digit"
        )


REQUIRED = {"organization": str, "signing": str, "sealing": str}


def from_fields(found: dict[str, str], where: Path_) -> PublicIdentity:
    """The identity of checked TOML values. Raises TrustListError."""
    try:
        identity = PublicIdentity(
            found["organization"], _from_hex(found["signing"]), _from_hex(found["sealing"])
        )
    except FormatError as error:
        raise TrustListError(f"{where}: {error}") from None
    said = found.get("fingerprint", identity.fingerprint)
    if not same_fingerprint(said, identity.fingerprint):
        raise TrustListError(
            f"{where}: the keys of {identity.organization} have the fingerprint "
            f"{identity.fingerprint}, not {said!r:.80}"
        )
    return identity


def _from_hex(text: str) -> bytes:
    # One text a key: bytes.fromhex alone would also take blanks and upper case.
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise FormatError(f"key {text!r:.80}: expected 64 digits of lower-case hex")
    return bytes.fromhex(text)


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two texts show one fingerprint, however they are grouped."""
    return _bare(one) == _bare(other)


def _bare(fingerprint: str) -> str:
    return "".join(fingerprint.split()).replace("-", "").lower()


class Identity:
    """An organization's private keys. They cannot be pickled, copied or printed."""

    __slots__ = ("_sealing", "_signing", "public")

    def __init__(
        self, organization: str, signing: Ed25519PrivateKey, sealing: X25519PrivateKey
    ) -> None:
        self._signing = signing
        self._sealing = sealing
        self.public = PublicIdentity(
            organization,
            signing.public_key().public_bytes_raw(),
            sealing.public_key().public_bytes_raw(),
        )

    @classmethod
    def new(cls, organization: str) -> Identity:
        """Fresh keys from the operating system's generator. Raises FormatError for the name."""
        return cls(organization, Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature, 64 bytes."""
        return self._signing.sign(message)

    def exchange(self, public: bytes) -> bytes:
        """The 32 bytes that this sealing key shares with another's. Raises ValueError if weak."""
        return _exchange(self._sealing, public)

    def save(self, path: Path_, passphrase: bytes | None = None) -> None:
        """Write the keys to a new file, closed to other users; nothing is ever overwritten.

        Raises KeyFileError if there is a file, or the passphrase is empty; OSError.
        """
        salt = None if passphrase is None else secrets.token_bytes(16)
        encryption: KeySerializationEncryption = NoEncryption()
        if passphrase is not None and salt is not None:
            encryption = BestAvailableEncryption(_stretch(passphrase, salt))
        text = f'format = "{FORMAT}"\norganization = "{self.public.organization}"\n'
        text += f'salt = "{salt.hex()}"\n' if salt else ""
        for name, key in (("signing", self._signing), ("sealing", self._sealing)):
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode()
            text += f"{name} = '''\n{pem}'''\n"
        try:
            files.write_new(path, text)
        except FileExistsError:
            raise KeyFileError(
                f"{path} exists and keys are never overwritten: choose another name"
            ) from None

    @classmethod
    def load(cls, path: Path_, passphrase: bytes | None = None) -> Identity:
        """The identity in a file that belongs to this user and is closed to all others.

        Raises KeyFileError, also for a missing, wrong or needless passphrase.
        """
        found = _read(path)
        password = _password(found.get("salt"), passphrase, path)
        try:
            signing = load_pem_private_key(found["signing"].encode(), password)
            sealing = load_pem_private_key(found["sealing"].encode(), password)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            what = "is damaged" if password is None else "has another passphrase, or is damaged"
            raise KeyFileError(f"{path} {what}") from None
        if not (isinstance(signing, Ed25519PrivateKey) and isinstance(sealing, X25519PrivateKey)):
            raise KeyFileError(f"{path}: expected an Ed25519 key to sign and an X25519 key to seal")
        try:
            return cls(found["organization"], signing, sealing)
        except FormatError as error:
            raise KeyFileError(f"{path}: {error}") from None

    @classmethod
    def unlock(cls, path: Path_, ask: Callable[[], bytes] | None = None) -> Identity:
        """As `load`; the passphrase of an encrypted file is $FEDIPFS_PASSPHRASE, else from `ask`.

        A plain file needs none, and the variable is not looked at. Raises KeyFileError, also for
        an encrypted file if there is neither, and what `ask` raises.
        """
        if not cls.is_encrypted(path):
            return cls.load(path)
        if secret := os.environ.get(PASSPHRASE):
            return cls.load(path, os.fsencode(secret))
        if ask is None:
            raise KeyFileError(f"{path} is encrypted: set {PASSPHRASE} to its passphrase")
        return cls.load(path, ask())

    @staticmethod
    def is_encrypted(path: Path_) -> bool:
        """Whether `load` will need a passphrase. Raises KeyFileError."""
        return "salt" in _read(path)

    def __repr__(self) -> str:
        return f"Identity({self.public.organization}, {self.public.fingerprint})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Identity is not pickled or copied: load it where it is needed")


def _read(path: Path_) -> dict[str, str]:
    text = files.read(path, KeyFileError, limit=MAX_FILE, private=True)
    found = files.table(text, path, KeyFileError, FORMAT)
    files.check(found, REQUIRED, {"salt": str}, path, KeyFileError)
    return found


def _password(salt: str | None, passphrase: bytes | None, path: Path_) -> bytes | None:
    """What the PEM texts of a file are encrypted with, None for nothing."""
    if salt is None and passphrase is None:
        return None
    if salt is None:
        raise KeyFileError(f"{path} has no passphrase: leave it out")
    if passphrase is None:
        raise KeyFileError(f"{path} is encrypted: give its passphrase")
    if not re.fullmatch("[0-9a-f]{32}", salt):
        raise KeyFileError(f"{path}: salt={salt!r:.80} is not 32 digits of lower-case hex")
    return _stretch(passphrase, bytes.fromhex(salt))


def _stretch(passphrase: bytes, salt: bytes) -> bytes:
    """A password that takes 128 MiB and a third of a second for every guess (RFC 7914).

    PKCS8 encryption itself does 2048 rounds of PBKDF2: a graphics card tries millions a second.
    """
    if not passphrase:
        raise KeyFileError("the passphrase is empty: give one, or none at all")
    return Scrypt(salt=salt, length=32, n=1 << 17, r=8, p=1).derive(passphrase).hex().encode()


def _exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    return private.exchange(X25519PublicKey.from_public_bytes(public))


_PROBE = X25519PrivateKey.from_private_bytes(bytes(32))  # any key: small order gives all zeros
