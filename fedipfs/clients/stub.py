"""The thin end of a site: what a SuperNode starts for a message, or `fedipfs-client node`.

It takes Flower's message to the worker that the partner started, and the worker's answer back.
No torch, no keys, no data here, and nothing that the coordinator sent is imported: the Flower app
that a coordinator submits names this module's `app` for its clients, and a stock SuperNode runs it
in a process of its own; `fedipfs-client run` does not even unpack that.
"""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedipfs.clients import wire
from fedipfs.clients.home import Home
from fedipfs.errors import FormatError, one_line
from fedipfs.flower_compat import (
    CLIENT_APP_CRASHED,
    CLIENT_APP_RAISED_EXCEPTION,
    message_from_bytes,
    message_to_bytes,
)

TIMEOUT_S = 24 * 3600.0  # the worker ends itself after client.timeout_s, long before
PATIENCE_S = 30.0  # for a worker that is starting
_AGAIN_S = 0.2


def forward(
    message: Message, path: Path, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S
) -> Message:
    """The worker's answer to `message`, or an error message that says why there is none.

    `path` is the worker's socket. A worker that is not there yet is waited for, for `patience_s`.
    """
    try:
        answer = _asked(message_to_bytes(message), path, timeout_s, patience_s)
    except _Failed as failure:
        return Message(Error(failure.code, str(failure)), reply_to=message)
    # Whom this answers is known here; what the answer says of it is not looked at.
    if answer.has_error():
        return Message(answer.error, reply_to=message)
    return Message(answer.content, reply_to=message)


class _Failed(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _asked(wanted: bytes, path: Path, timeout_s: float, patience_s: float) -> Message:
    if len(wanted) > wire.LIMIT - 1024:
        raise _Failed(
            CLIENT_APP_RAISED_EXCEPTION,
            f"EdgeError: a message of {len(wanted)} bytes: only CIDs and small values cross Flower",
        )
    deadline = time.monotonic() + patience_s
    while True:
        try:
            connection = wire.connect(path, within=10.0)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise _Failed(CLIENT_APP_CRASHED, "its worker is not there") from None
            time.sleep(_AGAIN_S)
        except OSError as error:
            raise _Failed(
                CLIENT_APP_CRASHED, f"its worker cannot be reached ({error.strerror or error})"
            ) from None
    with connection:
        try:
            wire.send(connection, {"kind": "message"}, wanted)
            header, body = wire.receive(connection, timeout_s)
        except TimeoutError:
            raise _Failed(CLIENT_APP_CRASHED, "its worker gives no answer") from None
        except (OSError, FormatError):
            raise _Failed(CLIENT_APP_CRASHED, "its worker ended") from None
    if header.get("kind") != "answer":
        reason = one_line(header.get("reason") or "its worker gave no answer")
        raise _Failed(CLIENT_APP_RAISED_EXCEPTION, reason)
    return message_from_bytes(body)


class _Forwarding(ClientApp):
    """Takes messages of all types, those of later versions too: the worker knows which it has."""

    def __call__(self, message: Message, context: Context) -> Message:
        return forward(message, Home.default().socket)


app = _Forwarding()
