"""The coordinator's TLS: an authority of its own, and the server certificate that it issues.

Keys are ECDSA P-256; certificates follow RFC 5280. Partners trust this authority alone, so
nothing is bought, and no public authority can issue a certificate that they would accept.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedipfs.errors import ConfigError, FormatError, KeyFileError

CA_DAYS, SERVER_DAYS = 3650, 365
WARN_DAYS = 30  # before a certificate ends
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # where the coordinator's own processes dial

_EARLY = timedelta(days=1)  # a certificate counts this long already: partners' clocks differ
_USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, as PEM texts; the key is not shown."""

    certificate: str
    key: str

    def __repr__(self) -> str:
        return "Pair(...)"


def host(text: str, what: str = "host") -> str:
    """A DNS name or an IP address as certificates hold it. Raises ConfigError."""
    wrong = f"{what} {text!r:.80}: "
    name = text.strip().lower().removesuffix(".")
    try:
        address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        pass
    else:
        if address.is_unspecified or address.is_multicast or "%" in name:
            raise ConfigError(f"{wrong}no one can dial that; give the machine's own name")
        return str(address)
    labels = name.split(".")
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdecimal():
        raise ConfigError(
            f"{wrong}give a DNS name such as fl.example.org (a name in other letters in its xn-- "
            "form) or an IP address, without a port"
        )
    return name


def new_authority(organization: str, at: datetime, days: int = CA_DAYS) -> Pair:
    """A fresh certificate authority, without others below it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(organization, "FedIPFS certificate authority")
    builder = _builder(name, key.public_key(), at, at + timedelta(days=days))
    builder = builder.issuer_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    return Pair(_pem(builder.sign(key, SHA256())), _key_pem(key))


def new_certificate(
    authority: Pair,
    names: Iterable[str],
    at: datetime,
    days: int = SERVER_DAYS,
    key: str | None = None,
) -> Pair:
    """A server's certificate for `names` (DNS names and IP addresses) and the loopback ones.

    `key` is the server's private key as PEM; None makes one. It ends no later than the authority.
    Raises KeyFileError for keys and certificates that are damaged or do not belong together, and
    ConfigError once the authority has ended.
    """
    issuer, issuer_key = (
        _certificate(authority.certificate, "ca.pem"),
        _key(authority.key, "ca.key"),
    )
    if issuer.public_key() != issuer_key.public_key():
        raise KeyFileError("ca.key is not the key of ca.pem: put back a copy of the two")
    end = min(at + timedelta(days=days), issuer.not_valid_after_utc)
    if end <= at:
        raise ConfigError(
            f"the certificate authority ended at {end:%Y-%m-%d %H:%M} UTC: make a new home with "
            "`fedipfs-server init`, and have all partners join again"
        )
    own = ec.generate_private_key(ec.SECP256R1()) if key is None else _key(key, "server.key")
    (organization,) = issuer.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    name = _name(str(organization.value), "FedIPFS coordinator")
    builder = _builder(name, own.public_key(), at, end).issuer_name(issuer.subject)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    for extension, critical in (
        (x509.SubjectAlternativeName(_alternatives((*names, *LOOPBACK))), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(digital_signature=True), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (identifier, False),
    ):
        builder = builder.add_extension(extension, critical)
    return Pair(_pem(builder.sign(issuer_key, SHA256())), _key_pem(own))


def ends(certificate: str, where: str = "certificate") -> datetime:
    """The moment, in UTC, until which a certificate (PEM) counts. Raises KeyFileError."""
    return _certificate(certificate, where).not_valid_after_utc


def check_authority(certificate: str) -> None:
    """Refuse what is not exactly one certificate of an authority (PEM). Raises FormatError."""
    try:
        found = x509.load_pem_x509_certificates(certificate.encode())
        constraints = found[0].extensions.get_extension_for_class(x509.BasicConstraints)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, UnicodeError):
        raise FormatError("not the certificate of an authority") from None
    if len(found) != 1 or not constraints.value.ca:
        raise FormatError("not the certificate of one authority")


def warning(end: datetime, now: datetime) -> str:
    """What to say of a server's certificate that ends soon or has ended; "" while it is good."""
    if end <= now:
        state = f"ended at {end:%Y-%m-%d %H:%M} UTC, and partners refuse it"
    elif end - now < timedelta(days=WARN_DAYS):
        state = f"ends in {(end - now).days} days, at {end:%Y-%m-%d %H:%M} UTC"
    else:
        return ""
    return f"the server's certificate {state}: run fedipfs-server renew"


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, at: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(at - _EARLY).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _name(organization: str, what: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, what),
        ]
    )


def _alternatives(names: Iterable[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _usage(**uses: bool) -> x509.KeyUsage:
    return x509.KeyUsage(**{**dict.fromkeys(_USES, False), **uses})


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _certificate(pem: str, where: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        raise KeyFileError(f"{where} holds no certificate: put back a copy") from None


def _key(pem: str, where: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileError(f"{where} holds no private key: put back a copy") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{where} holds no ECDSA key: put back a copy")
    return key
