"""What crosses the worker's socket: a length of 4 bytes, and a frame (see exchange/frames.py).

A request's header is {"kind": "message"}, with a Flower message as body, or {"kind": "ping"}; a
reply's is {"kind": "answer"}, with a Flower message, {"kind": "failure", "reason": ...}, or
{"kind": "ready"}. One request a connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedipfs.errors import FormatError
from fedipfs.exchange.frames import frame, unframe

LIMIT = 64 << 10  # bytes of a frame; what crosses Flower has less than 17 KiB
_LENGTH = struct.Struct(">I")
_MOST_PATH = 107  # bytes that the address of a Unix socket has room for


def send(connection: socket.socket, header: dict[str, Any], body: bytes = b"") -> None:
    """Send one frame. Raises FormatError for one above the limit, and OSError."""
    data = frame(header, body)
    if len(data) > LIMIT:
        raise FormatError(f"a frame of {len(data)} bytes: at most {LIMIT} cross the socket")
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, within: float) -> tuple[dict[str, Any], bytes]:
    """One frame, which must have come after `within` seconds, however slowly it does.

    Raises FormatError for what is none, TimeoutError, and ConnectionError where it ends early.
    """
    deadline = time.monotonic() + within
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
    if length > LIMIT:
        raise FormatError(f"a frame of {length} bytes: at most {LIMIT} cross the socket")
    try:
        header, body = unframe(_exactly(connection, length, deadline))
    except (ValueError, RecursionError):
        raise FormatError("no frame: its header is not JSON") from None
    if not isinstance(header, dict):
        raise FormatError("no frame: its header is not a mapping")
    return header, body


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    found = bytearray()
    while len(found) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the frame does not come to its end")
        connection.settimeout(left)
        piece = connection.recv(count - len(found))
        if not piece:
            raise ConnectionResetError("the connection ended before the frame did")
        found += piece
    return bytes(found)


def connect(path: Path, within: float) -> socket.socket:
    """A connection to the socket at `path`, in `within` seconds. Raises OSError."""
    deadline = time.monotonic() + within
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(within)
            with _address(path) as address:
                connection.connect(address)
            return connection
        except BaseException as error:
            connection.close()
            # Others wait to be accepted, more than the system lets: that passes.
            if not isinstance(error, BlockingIOError) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def listen(path: Path, mode: int = 0o600, group: int | None = None) -> socket.socket:
    """A socket at `path`, in the place of one that nobody listens at; closed to all others.

    With `group`, a number, its members may use it too, if `mode` says so. Raises OSError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        before = os.umask(0o177)
        try:
            with _address(temporary) as address:
                listener.bind(address)
        finally:
            os.umask(before)
        if group is not None:
            os.chown(temporary, -1, group)
        os.chmod(temporary, mode)
        listener.listen(128)
        temporary.replace(path)  # now, when it answers: whoever waits looks for it
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """What binds and connects for `path`, which may be longer than an address can be."""
    if len(os.fsencode(path)) <= _MOST_PATH:
        yield os.fspath(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
