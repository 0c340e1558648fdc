"""The coordinator's certificates, as the TLS of Python's own ssl module takes or refuses them."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedipfs.errors import ConfigError, FormatError, KeyFileError
from fedipfs.trust import tls

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def authority() -> tls.Pair:
    return tls.new_authority("hub", NOW)


def shake_hands(folder: Path, server: tls.Pair, ca: str, name: str) -> None:
    """A TLS handshake in memory with a client that trusts `ca` alone and dials `name`."""
    (folder / "server.pem").write_text(server.certificate)
    (folder / "server.key").write_text(server.key)
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(folder / "server.pem", folder / "server.key")
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    here.verify_flags |= ssl.VERIFY_X509_STRICT
    here.load_verify_locations(cadata=ca)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = here.wrap_bio(down, up, server_hostname=name)
    listener = there.wrap_bio(up, down, server_side=True)
    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for side in (client, listener):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass


@pytest.mark.parametrize(
    ("host", "dialled"),
    [
        ("fl.example.org", "fl.example.org"),
        ("203.0.113.5", "203.0.113.5"),
        ("2001:db8::5", "2001:db8::5"),
        ("fl.example.org", "localhost"),
        ("fl.example.org", "127.0.0.1"),
        ("fl.example.org", "::1"),
    ],
)
def test_partners_and_the_coordinators_own_processes_take_it(
    tmp_path: Path, authority: tls.Pair, host: str, dialled: str
) -> None:
    server = tls.new_certificate(authority, [host], NOW)
    shake_hands(tmp_path, server, authority.certificate, dialled)


def test_another_name_is_refused(tmp_path: Path, authority: tls.Pair) -> None:
    server = tls.new_certificate(authority, ["fl.example.org"], NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'fl\.example\.net'"):
        shake_hands(tmp_path, server, authority.certificate, "fl.example.net")


def test_another_authority_is_refused(tmp_path: Path, authority: tls.Pair) -> None:
    server = tls.new_certificate(authority, ["fl.example.org"], NOW)
    other = tls.new_authority("hub", NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, server, other.certificate, "fl.example.org")


def test_an_expired_one_is_refused(tmp_path: Path, authority: tls.Pair) -> None:
    server = tls.new_certificate(authority, ["fl.example.org"], NOW - 2 * DAY, days=1)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake_hands(tmp_path, server, authority.certificate, "fl.example.org")


def test_a_servers_certificate_issues_no_other(tmp_path: Path, authority: tls.Pair) -> None:
    server = tls.new_certificate(authority, ["fl.example.org"], NOW)
    forged = tls.new_certificate(server, ["bank.example.org"], NOW)
    chain = tls.Pair(forged.certificate + server.certificate, forged.key)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, chain, authority.certificate, "bank.example.org")


def test_what_the_certificates_may_be_used_for(authority: tls.Pair) -> None:
    ca = x509.load_pem_x509_certificate(authority.certificate.encode()).extensions
    basic = ca.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value == x509.BasicConstraints(ca=True, path_length=0)
    server = tls.new_certificate(authority, ["fl.example.org"], NOW)
    own = x509.load_pem_x509_certificate(server.certificate.encode()).extensions
    usage = own.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not own.get_extension_for_class(x509.BasicConstraints).value.ca


def test_dates(authority: tls.Pair) -> None:
    assert tls.ends(authority.certificate) == NOW + 3650 * DAY
    assert tls.ends(tls.new_certificate(authority, ["a"], NOW).certificate) == NOW + 365 * DAY
    late = tls.new_certificate(authority, ["a"], NOW + 3500 * DAY)
    assert tls.ends(late.certificate) == NOW + 3650 * DAY
    with pytest.raises(ConfigError, match="authority ended"):
        tls.new_certificate(authority, ["a"], NOW + 3650 * DAY)


def test_a_warning_from_thirty_days_before() -> None:
    assert tls.warning(NOW + 30 * DAY, NOW) == ""
    assert "ends in 29 days" in tls.warning(NOW + 30 * DAY, NOW + timedelta(seconds=1))
    assert "fedipfs-server renew" in tls.warning(NOW, NOW)
    assert "partners refuse it" in tls.warning(NOW, NOW)


def test_a_key_is_kept_and_never_shown(authority: tls.Pair) -> None:
    first = tls.new_certificate(authority, ["a"], NOW)
    second = tls.new_certificate(authority, ["a"], NOW, key=first.key)
    assert second.key == first.key and second.certificate != first.certificate
    assert "PRIVATE" in first.key and "PRIVATE" not in repr(first)


def test_files_that_do_not_fit_or_are_damaged(authority: tls.Pair) -> None:
    other = tls.new_authority("hub", NOW)
    with pytest.raises(KeyFileError, match=r"not the key of ca\.pem"):
        tls.new_certificate(tls.Pair(authority.certificate, other.key), ["a"], NOW)
    with pytest.raises(KeyFileError, match=r"ca\.key holds no private key"):
        tls.new_certificate(tls.Pair(authority.certificate, "x"), ["a"], NOW)
    with pytest.raises(KeyFileError, match=r"ca\.pem holds no certificate"):
        tls.new_certificate(tls.Pair("x", authority.key), ["a"], NOW)


def test_what_is_an_authority(authority: tls.Pair) -> None:
    tls.check_authority(authority.certificate)
    server = tls.new_certificate(authority, ["a"], NOW)
    for wrong in ("", "x", server.certificate, authority.certificate * 2, authority.key):
        with pytest.raises(FormatError, match="authority"):
            tls.check_authority(wrong)


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ("FL.Example.org.", "fl.example.org"),
        (" localhost ", "localhost"),
        ("[2001:DB8::5]", "2001:db8::5"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)
def test_names_as_certificates_hold_them(given: str, held: str) -> None:
    assert tls.host(given) == held


@pytest.mark.parametrize(
    "given",
    [
        *("", ".", "a b", "a_b", "-a", "a-", "a..b", "*.example.org", "bücher.example"),
        *("fl.example.org:9092", "https://fl.example.org", "1.2.3", "256.1.1.1", "a" * 64),
        *("0.0.0.0", "::", "[::]", "224.0.0.1", "fe80::1%eth0", "a.\nb"),
    ],
)
def test_what_nobody_can_dial(given: str) -> None:
    with pytest.raises(ConfigError, match="host "):
        tls.host(given)
