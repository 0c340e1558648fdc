"""Addresses of an RPC, credentials, and which of them are refused."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedipfs.errors import ConfigError
from fedipfs.store.address import VARIABLE, Address, Credentials, permit
from fedipfs.store.kubo import KuboStore

TOKEN = "Zq7-very-secret"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("text", "multiaddr", "host", "secure", "local"),
    [
        ("/ip4/127.0.0.1/tcp/5001", None, "127.0.0.1", False, True),
        ("/ip4/127.9.9.9/tcp/5001/http", None, "127.9.9.9", False, True),
        ("/ip6/::1/tcp/5001", None, "::1", False, True),
        ("/dns/localhost/tcp/5001", None, "localhost", False, True),
        ("/dns4/ipfs.example/tcp/443/https", None, "ipfs.example", True, False),
        ("/ip4/10.0.0.5/tcp/5001", None, "10.0.0.5", False, False),
        ("/ip4/0.0.0.0/tcp/5001", None, "0.0.0.0", False, False),
        ("http://127.0.0.1:5001", "/ip4/127.0.0.1/tcp/5001/http", "127.0.0.1", False, True),
        ("http://localhost:5001/", "/dns/localhost/tcp/5001/http", "localhost", False, True),
        ("http://[::1]:5001", "/ip6/::1/tcp/5001/http", "::1", False, True),
        ("https://ipfs.example", "/dns/ipfs.example/tcp/443/https", "ipfs.example", True, False),
        ("http://localhost.example", "/dns/localhost.example/tcp/80/http", None, False, False),
        ("http://127.0.0.1.example:80", "/dns/127.0.0.1.example/tcp/80/http", None, False, False),
    ],
)
def test_addresses(
    text: str, multiaddr: str | None, host: str | None, secure: bool, local: bool
) -> None:
    address = Address.parse(text)
    assert address.text == text and address.multiaddr == (multiaddr or text)
    assert host in (None, address.host)
    assert (address.secure, address.local, address.base) == (secure, local, "api/v0")


def test_the_path_of_a_proxied_rpc_is_kept() -> None:
    assert Address.parse("https://ipfs.example/node-7/api/v0/").base == "node-7/api/v0"


def test_a_unix_socket_is_local() -> None:
    assert Address.parse("/unix/run/ipfs/api.sock").local


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:5001",
        "ftp://127.0.0.1",
        "http://",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:x",
        "http://[::1",
        "http://[fe80::1%25eth0]:5001",
        "http://127.0.0.1:5001?a=b",
        "http://127.0.0.1:5001#a",
        "http://white space:5001",
        "/",
        "/ip4/127.0.0.1",
        "/ip4/300.0.0.1/tcp/5001",
        "/ip4/127.0.0.1/tcp/70000",
        "/ip4/127.0.0.1/udp/5001",
        "/ip4/127.0.0.1/tcp/5001/ws",
        "/ip4/127.0.0.1/tcp/5001/p2p/QmYT46md5J68yTn8ULYW3QxXoacuW1tP5g3N7xiGWqRARt",
        "/nonsense/1",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"use /ip4/127\.0\.0\.1/tcp/5001") as caught:
        KuboStore(text)
    assert "\n" not in str(caught.value)


@given(st.one_of(st.text(), st.text().map("/ip4/".__add__), st.text().map("http://".__add__)))
@example("http://\x00")
@example("http://a/\ud800")
@example("/ip4/\ud800/tcp/1")
@example("/unix/\x00")
@example("/dns/%2f/tcp/1")
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        if address.local:
            KuboStore(text)  # ipfshttpclient takes it, too


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{TOKEN}@ipfs.example",
        f"https://:{TOKEN}@ipfs.example",
        f"https://{TOKEN}@ipfs.example",
        f"ftp://user:{TOKEN}@ipfs.example",
        f"http://user:{TOKEN}@[::1",
        f"user:{TOKEN}@ipfs.example:5001",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.credentials") as caught:
        KuboStore(text)
    assert TOKEN not in str(caught.value)


def private(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "credentials"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    file.chmod(0o600)
    return str(file)


def test_credentials_of_kubos_two_kinds(tmp_path: Path) -> None:
    found = Credentials.find(private(tmp_path, f"bearer:{TOKEN}\n"))
    assert found == Credentials(f"Bearer {TOKEN}")
    assert TOKEN not in repr(found)
    found = Credentials.find(private(tmp_path, f"basic:alice:{TOKEN}:x"))
    assert found is not None
    kind, _, secret = found.header.partition(" ")
    assert kind == "Basic" and base64.b64decode(secret) == f"alice:{TOKEN}:x".encode()


def test_the_file_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Credentials.find(None) is None
    monkeypatch.setenv(VARIABLE, "bearer:env")
    assert Credentials.find(None) == Credentials("Bearer env")
    assert Credentials.find(private(tmp_path, "bearer:file")) == Credentials("Bearer file")
    monkeypatch.setenv(VARIABLE, TOKEN)
    with pytest.raises(ConfigError, match=VARIABLE) as caught:
        Credentials.find(None)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        TOKEN,
        f"Bearer {TOKEN}",
        f"token:{TOKEN}",
        "bearer:",
        f"basic:{TOKEN}",
        f"bearer:{TOKEN}\nX-Other: header",
        f"bearer:{TOKEN}é",
        f"bearer:{TOKEN}".encode() + b"\xff\x00",
    ],
)
def test_other_contents_are_refused_and_not_shown(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ConfigError, match="bearer:TOKEN or basic:USER:PASSWORD") as caught:
        Credentials.find(private(tmp_path, text))
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path, f"bearer:{TOKEN}")
    os.chmod(path, mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Credentials.find(path)


def test_what_is_not_a_small_file_is_refused_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="larger than"):
        Credentials.find(private(tmp_path, "bearer:" + "x" * 9000))
    for name, make in (("folder", os.mkdir), ("pipe", os.mkfifo)):
        make(tmp_path / name)
        os.chmod(tmp_path / name, 0o700)
        with pytest.raises(ConfigError, match="not a file"):
            Credentials.find(str(tmp_path / name))
    with pytest.raises(ConfigError, match="No such file"):
        Credentials.find(str(tmp_path / "absent"))
    assert time.monotonic() - began < 2


REMOTE = ("http://10.0.0.5:5001", "/dns/ipfs.example/tcp/5001", "http://0.0.0.0:5001")


@pytest.mark.parametrize("text", REMOTE)
def test_an_rpc_elsewhere_needs_credentials_and_https(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whoever reaches that port controls the node") as caught:
        KuboStore(text)
    for remedy in ("SSH tunnel", "store.credentials", "store.open_rpc=true", text):
        assert remedy in str(caught.value)
    file = private(tmp_path, f"bearer:{TOKEN}")
    with pytest.raises(ConfigError, match="unencrypted") as caught:
        KuboStore(text, credentials=file)
    assert "https" in str(caught.value) and TOKEN not in str(caught.value)
    KuboStore(text, credentials=file, open_rpc=True)
    KuboStore(text, open_rpc=True)


def test_an_rpc_elsewhere_with_both_is_allowed(tmp_path: Path) -> None:
    secret = Credentials("Bearer x")
    permit(Address.parse("https://ipfs.example"), secret, open_rpc=False)
    with pytest.raises(ConfigError):
        permit(Address.parse("https://ipfs.example"), None, open_rpc=False)
    KuboStore("https://ipfs.example", credentials=private(tmp_path, "bearer:x"))


@pytest.mark.parametrize("text", ["/ip4/127.0.0.1/tcp/5001", "http://[::1]:1", "/unix/tmp/api"])
def test_loopback_needs_nothing(text: str) -> None:
    permit(Address.parse(text), None, open_rpc=False)
