"""The time and the size of one HTTP exchange. What a store makes of them: test_kubo_faults.py."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_http import HostileServer, bomb, closing, drip, endless, head, redirect, reply, silence

from fedipfs.errors import StoreBadAnswer
from fedipfs.store.guard import FAILURES, PIECE, Guard, new_session, protect


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


def get(server: HostileServer, guard: Guard, session: Any = None) -> bytes:
    with guard:
        with guard.sending():
            response = (session or new_session()).get(f"{server.url}/x", stream=True)
        return b"".join(response.iter_content(None))


def test_an_answer_in_time_and_size(server: HostileServer) -> None:
    session = new_session()
    for body in (b"", b"x", bytes(5 * PIECE), bytes(5 * PIECE + 1)):
        server.plan("/x", reply(body))
        guard = Guard(5, len(body))
        assert get(server, guard, session) == body and not guard.expired


def test_one_byte_too_many(server: HostileServer) -> None:
    server.plan("/x", reply(bytes(1001)))
    with pytest.raises(StoreBadAnswer, match="1000 bytes"):
        get(server, Guard(5, 1000))


def test_what_is_packed_stays_packed(server: HostileServer) -> None:
    server.plan("/x", bomb(1 << 24))
    assert len(get(server, Guard(5, 1 << 20))) < 1 << 16


@pytest.mark.parametrize(
    "answer", [silence, drip(b""), drip(head()), drip(b"HTTP/1.0 200 OK\r\n\r\n")], ids=str
)
def test_the_time_holds(server: HostileServer, answer: Any) -> None:
    server.plan("/x", answer)
    guard = Guard(0.3, 1 << 20)
    began = time.monotonic()
    with pytest.raises(FAILURES):
        get(server, guard)
    assert guard.expired and time.monotonic() - began < 1


def test_a_connection_that_comes_too_late_is_shut_at_once(server: HostileServer) -> None:
    server.plan("/x", drip(head(Content_Length=10**6)))
    guard = Guard(0.05, 1 << 20)
    session = new_session()
    with guard:
        time.sleep(0.2)  # as a slow look-up of the name does
        began = time.monotonic()
        with pytest.raises(FAILURES), guard.sending():
            b"".join(session.get(f"{server.url}/x", stream=True).iter_content(None))
    assert time.monotonic() - began < 1


def test_a_connection_that_is_kept_is_guarded_anew(server: HostileServer) -> None:
    session = new_session()
    server.plan("/x", reply(b"a"))
    for _ in range(3):
        assert get(server, Guard(0.2, 10), session) == b"a"
    time.sleep(0.3)  # no timer is left of those that are over
    assert get(server, Guard(0.2, 10), session) == b"a"
    server.plan("/x", drip(head()))
    began = time.monotonic()
    with pytest.raises(FAILURES):
        get(server, Guard(0.2, 1000), session)
    assert time.monotonic() - began < 1


def test_progress_is_counted_in_bytes(server: HostileServer) -> None:
    guard = Guard(0.2, 1)
    with guard:
        for _ in range(4):
            time.sleep(0.1)
            guard.progress(PIECE)
        assert not guard.expired
        for _ in range(4):
            time.sleep(0.1)
            guard.progress(1)
        assert guard.expired


def test_errors_and_redirects_are_cut_off(server: HostileServer) -> None:
    server.plan("/x", endless(status=500))
    assert len(get(server, Guard(5, 1 << 30))) < 1 << 17
    server.plan("/x", endless(status=302, Location=f"{server.url}/y"))
    server.plan("/y", reply(b"there"))
    assert get(server, Guard(5, 1 << 30)) == b"there"


def test_redirects_end(server: HostileServer) -> None:
    server.plan("/x", redirect("/x"))
    with pytest.raises(FAILURES):
        get(server, Guard(5, 10))
    assert len(server.requests) == 4
    session = new_session()
    protect(session, elsewhere=False)
    with pytest.raises(FAILURES):
        get(server, Guard(5, 10), session)
    assert len(server.requests) == 5


def test_threads_have_guards_of_their_own(server: HostileServer) -> None:
    session = new_session()
    server.plan("/x", closing(bytes(1000)))
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(len(get(server, Guard(5, 1000), session))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [1000] * 8


def test_nothing_is_left_open(server: HostileServer) -> None:
    server.plan("/x", closing(b"x"))
    get(server, Guard(5, 10))
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    for _ in range(50):
        get(server, Guard(5, 10))
    deadline = time.monotonic() + 5
    while (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "cert.pem").write_bytes(made.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")


def test_the_time_holds_through_tls(
    server: HostileServer, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server._server.socket = context.wrap_socket(
        server._server.socket, server_side=True, do_handshake_on_connect=False
    )
    server.url = server.url.replace("http:", "https:")
    with pytest.raises(FAILURES, match="certificate"):
        get(server, Guard(5, 10))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certificate[0])
    session = new_session()
    protect(session, elsewhere=False)  # as of an RPC, which sees no proxies of the environment
    server.plan("/x", reply(bytes(10**6)))
    assert get(server, Guard(5, 10**6), session) == bytes(10**6)
    for answer in (silence, drip(b""), drip(head()), drip(head(Content_Length=10**6))):
        server.plan("/x", answer)
        guard = Guard(0.3, 1 << 20)
        began = time.monotonic()
        with pytest.raises(FAILURES):
            get(server, guard, session)
        assert guard.expired and time.monotonic() - began < 1.3


def test_the_time_holds_in_a_handshake_that_does_not_come(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts by the kernel, says nothing
        guard = Guard(0.3, 10)
        began = time.monotonic()
        with guard, pytest.raises(FAILURES), guard.sending():
            new_session().get(f"https://127.0.0.1:{silent.getsockname()[1]}/x")
        assert guard.expired and time.monotonic() - began < 1.3
