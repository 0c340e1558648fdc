"""The RPC of a Kubo daemon, through ipfshttpclient: bounded, retried, its errors in our words.

The only file that touches what ipfshttpclient does not publish (`Client._client`): the session
that it keeps, for calls that it lacks and for the guard on everything that comes back.

Specification: the RPC API v0 of Kubo 0.30 to 0.41, of which js-ipfs serves the same part.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ipfshttpclient.exceptions as theirs
from ipfshttpclient import requests_wrapper as requests
from ipfshttpclient.client import Client

from fedipfs.errors import (
    BlockNotFound,
    StoreBadAnswer,
    StoreError,
    StoreFull,
    StoreTimeout,
    StoreUnreachable,
    StoreUnusable,
    one_line,
)
from fedipfs.store.address import Address, Credentials
from fedipfs.store.guard import FAILURES, Guard, innermost, protect

MAX_JSON = 1 << 20  # bytes of an ordinary answer
MAX_LISTING = 16 << 20  # bytes of a list of pins or of removed blocks: about 150,000 of them
_LATE_S = 0.5  # the daemon shall give up a little before we do, and say why
_BUSY = (429, 502, 503, 504)
_NOT_THERE = ("not found", "could not find", "cannot find", "no such block", "notfound")
_LATE = ("deadline exceeded", "timed out", "timeout")

_BLANK = re.compile(r"\s*")

Result = TypeVar("Result")


class DaemonGaveUp(StoreTimeout):
    """The daemon answered that it had not found in time what was asked."""


class Upload:
    """The multipart body of one file whose pieces are in memory; it knows its length."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        boundary = secrets.token_hex(16)
        self.headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        head = (
            f"--{boundary}\r\n"
            'Content-Disposition: form-data; name="file"; filename="blocks.car"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        self._pieces = [head.encode(), *pieces, f"\r\n--{boundary}--\r\n".encode()]

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pieces)


class Rpc:
    """Calls to one daemon; safe to use from several threads.

    A call takes at most `timeout_s` seconds with all its retries. What failed for want of a
    connection is tried again up to `retries` times, after 0.2 s and then twice as long each time.
    A fork has connections of its own.

    Raises StoreUnreachable, StoreTimeout, StoreUnusable (credentials), StoreFull, BlockNotFound,
    StoreBadAnswer (too large, garbage) and, for what else the daemon reports, StoreError.
    """

    def __init__(
        self, address: Address, credentials: Credentials | None, timeout_s: float, retries: int
    ) -> None:
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "fedipfs"}
        if credentials is not None:
            self._headers["Authorization"] = credentials.header
        self.name = f"the IPFS daemon at {address.text}"
        self._address = address
        self.timeout_s, self._retries = timeout_s, retries
        self._client, self._process = self._connect(), os.getpid()

    @property
    def client(self) -> Client:
        """ipfshttpclient's client of this process."""
        if self._process != os.getpid():  # sockets are not for two
            self._client, self._process = self._connect(), os.getpid()
        return self._client

    def _connect(self) -> Client:
        address = self._address
        client = Client(address.multiaddr, address.base, session=True, headers=self._headers)
        protect(client._client._session, elsewhere=False)
        return client

    def call(
        self,
        what: str,
        request: Callable[[dict[str, str]], Result],
        *,
        limit: int = MAX_JSON,
        timeout_s: float | None = None,
        retries: int | None = None,
    ) -> Result:
        """`request(options)` within the time and the size; `what` names it in errors.

        `options` are query parameters that every call has: CIDs in base32, and the time after
        which the daemon gives up.
        """
        timeout_s = timeout_s or self.timeout_s
        retries = self._retries if retries is None else retries
        end = time.monotonic() + timeout_s
        for attempt in range(retries + 1):
            left = max(end - time.monotonic(), 0.001)
            options = {"cid-base": "base32", "timeout": f"{max(left - _LATE_S, left / 2):.3f}s"}
            with Guard(left, limit) as guard:
                try:
                    with guard.sending():
                        return request(options)
                except Exception as problem:
                    error = self._translated(problem, what, timeout_s, guard.expired)
            pause = 0.2 * 2**attempt * random.uniform(0.8, 1.2)
            again = isinstance(error, StoreUnreachable) and time.monotonic() + pause < end
            if not again or attempt == retries:
                try:
                    raise error
                finally:
                    del error  # a cycle with this frame would keep what was being uploaded
            time.sleep(pause)
        raise AssertionError("unreachable")

    def ask(self, what: str, path: str, *arguments: str, **options: Any) -> Any:
        """As `post`, for calls that answer one object."""
        answers = self.post(what, path, *arguments, **options)
        if len(answers) != 1:
            raise StoreBadAnswer(f"{what}: {self.name} gave {len(answers)} answers instead of one")
        return answers[0]

    def post(
        self,
        what: str,
        path: str,
        *arguments: str,
        upload: Upload | None = None,
        limit: int = MAX_JSON,
        timeout_s: float | None = None,
        retries: int | None = None,
        **options: str,
    ) -> list[Any]:
        """The JSON objects that a call answers, for what ipfshttpclient lacks or reads amiss."""
        body = {} if upload is None else {"data": upload, "headers": upload.headers}

        def request(common: dict[str, str]) -> list[Any]:
            http: Any = self.client._client
            # Not its own JSON decoder, whose time grows with the cube of the answer's lines.
            return _objects(http.request(path, arguments, opts={**common, **options}, **body))

        return self.call(what, request, limit=limit, timeout_s=timeout_s, retries=retries)

    def stream(
        self, what: str, path: str, argument: str, limit: int, **options: str
    ) -> Iterator[bytes]:
        """A long answer piece by piece; the time is for each `guard.PIECE` bytes of it.

        Not retried: what has been read has been used.
        """
        http: Any = self.client._client
        with Guard(self.timeout_s, limit) as guard:
            try:
                with guard.sending():
                    pieces = http.request(path, (argument,), opts=options, stream=True)
            except Exception as problem:
                raise self._translated(problem, what, self.timeout_s, guard.expired) from None
            try:
                while True:
                    try:
                        piece = next(pieces, None)
                    except Exception as problem:
                        expired = guard.expired
                        raise self._translated(problem, what, self.timeout_s, expired) from None
                    if piece is None:
                        return
                    guard.progress(len(piece))
                    yield piece
            finally:
                pieces.close()

    def _translated(
        self, problem: Exception, what: str, timeout_s: float, expired: bool
    ) -> Exception:
        """A failure as one of ours."""
        where = f"{what}: {self.name}"
        if expired or isinstance(problem, theirs.TimeoutError):
            return StoreTimeout(
                f"{where} did not answer within {timeout_s:g} s: it is overloaded, or no "
                "node that it can reach has what was asked; try again, or raise store.timeout_s"
            )
        if isinstance(problem, StoreBadAnswer):
            return StoreBadAnswer(f"{where}: {problem}; is this an IPFS daemon?")
        if isinstance(problem, StoreError):
            return problem
        if isinstance(problem, theirs.ErrorResponse):
            return self.reported(str(problem.args[0]), what)
        if isinstance(problem, theirs.StatusError):
            return self._status(problem, what)
        if isinstance(problem, requests.TooManyRedirects):
            return StoreBadAnswer(
                f"{where} sends us elsewhere, which no IPFS daemon does; set store.address to its "
                "RPC address"
            )
        if isinstance(problem, (theirs.CommunicationError, *FAILURES)):
            return StoreUnreachable(
                f"{where} does not answer ({innermost(problem)}); start it with `ipfs daemon`, or "
                "set store.address to its RPC address"
            )
        # Garbage instead of JSON, missing fields, a depth that exceeds the parser's.
        return StoreBadAnswer(
            f"{where} gave an answer that cannot be read "
            f"({type(problem).__name__}: {one_line(problem, 120)}); is this an IPFS daemon?"
        )

    def _status(self, problem: theirs.StatusError, what: str) -> StoreError:
        response: Any = getattr(problem.original, "response", None)
        code = getattr(response, "status_code", 0)
        where = f"{what}: {self.name}"
        if code in (401, 403):
            return StoreUnusable(
                f"{where} refuses these credentials (HTTP {code}); set store.credentials to a "
                "file with bearer:TOKEN or basic:USER:PASSWORD that its API.Authorizations allow"
            )
        if code in _BUSY:
            return StoreUnreachable(f"{where} is busy or restarting (HTTP {code}); try again later")
        return StoreBadAnswer(
            f"{where} answered HTTP {code}; set store.address to the RPC of an IPFS daemon "
            "(port 5001), not to its gateway"
        )

    def reported(self, message: str, what: str) -> StoreError:
        """What the daemon itself says went wrong, as one of our errors."""
        text, where = message.lower(), f"{what}: {self.name}"
        for secret in self._headers.get("Authorization", "").split(" ")[1:]:
            message = message.replace(secret, "***")
        said = f'says "{one_line(message, 160)}"'
        if "no space left" in text or "quota" in text or "storagemax" in text:
            return StoreFull(f"{where} {said}; free space there or run `fedipfs store gc`")
        if any(word in text for word in _LATE):
            return DaemonGaveUp(
                f"{where} {said}: no node that it can reach has it, or they are slow; connect the "
                "peers (store.peers) or raise store.timeout_s"
            )
        if any(word in text for word in _NOT_THERE):
            return BlockNotFound(f"{where} {said}; import it, or connect a peer that has it")
        return StoreError(f"{where} {said}")


def _objects(body: bytes) -> list[Any]:
    """The JSON values that follow each other in an answer. Raises ValueError, RecursionError."""
    text, decoder, found = body.decode(), json.JSONDecoder(), []
    position = _end_of_blank(text, 0)
    while position < len(text):
        value, end = decoder.raw_decode(text, position)
        found.append(value)
        position = _end_of_blank(text, end)
    return found


def _end_of_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position
