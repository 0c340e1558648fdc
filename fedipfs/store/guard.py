"""HTTP to services that may be slow, hostile or gone: every answer within a time and a size.

`requests` bounds the wait for a piece, not for the answer, and reads whatever comes. Here a Guard
gives one exchange a deadline (the socket is shut at that moment, whatever it was waiting for) and
a limit on the bytes of the body. Built on ipfshttpclient's own flavour of requests, so that its
sessions can be guarded.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from http.cookiejar import DefaultCookiePolicy
from typing import Any

from ipfshttpclient import requests_wrapper as requests
from urllib3.exceptions import HTTPError

from fedipfs.errors import StoreBadAnswer, one_line

# ipfshttpclient passes it to urllib3, which has ignored it for years.
warnings.filterwarnings("ignore", "The 'strict' parameter is no longer needed", FutureWarning)

PIECE = 256 << 10  # bytes read from a socket at a time, and those that count as progress
WORDS = 16 << 10  # bytes read of an error or a redirect; one longer is cut off
FAILURES = (requests.RequestException, HTTPError, OSError)  # of the connection, at any moment

_guard: ContextVar[Guard | None] = ContextVar("guard", default=None)


class Guard:
    """One HTTP exchange: at most `timeout_s` seconds without progress, at most `limit` bytes.

    Use as a context manager around the request, made within `sending`, and the reading of its
    body. `progress` starts the time anew, for long bodies. `expired` tells why a read failed.
    """

    def __init__(self, timeout_s: float, limit: int) -> None:
        self.limit = limit
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._since = 0  # bytes that came since the time was started anew
        self._rung = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Guard:
        self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            self._forget()

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Requests made within, by this thread, are under this guard; so are their bodies."""
        token = _guard.set(self)
        try:
            yield
        finally:
            _guard.reset(token)

    @property
    def remaining(self) -> float:
        """Seconds left; never negative."""
        return max(self._deadline - time.monotonic(), 0.0)

    @property
    def expired(self) -> bool:
        """Whether the time is over, or was when the socket was shut."""
        return self._rung or not self.remaining

    def progress(self, size: int) -> None:
        """`size` more bytes came; with every `PIECE` of them the time starts anew."""
        self._since += size
        if self._since >= PIECE:
            self._since = 0
            self._deadline = time.monotonic() + self._timeout_s

    def watch(self, handle: int) -> None:
        """Shut the socket behind the file descriptor `handle` when the time is over."""
        # A duplicate: http.client may close its own before the body is read, TLS replaces it.
        copy = socket.socket(fileno=os.dup(handle))
        with self._lock:
            self._forget()
            self._socket = copy
            if self._rung:
                self._shut()

    def _arm(self) -> None:
        self._timer = threading.Timer(self.remaining, self._ring)
        self._timer.daemon = True
        self._timer.start()

    def _ring(self) -> None:
        with self._lock:
            if self._timer is None:
                return  # over in time
            if self.remaining > 0:
                self._arm()
                return
            self._rung = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None


class _Body:
    """A response's raw body within the guard's time and limit."""

    def __init__(self, raw: Any, guard: Guard, status: int) -> None:
        self._raw, self._guard, self._status = raw, guard, status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, amt: int | None = None, decode_content: bool | None = None) -> Iterator[bytes]:
        try:
            yield from self._stream()
        except ValueError as error:  # so does http.client refuse a chunk of negative length
            raise StoreBadAnswer(f"the answer is not HTTP ({error})") from None

    def _stream(self) -> Iterator[bytes]:
        seen = 0
        # Never the whole at once, and never unpacked: a small answer may unpack to a huge one.
        for piece in self._raw.stream(PIECE, decode_content=False):
            seen += len(piece)
            self._check()  # what has arrived can be read for long after the shutdown
            if self._status != 200 and seen > WORDS:
                self._raw.close()
                return
            if seen > self._guard.limit:
                raise StoreBadAnswer(f"the answer is larger than {self._guard.limit} bytes")
            yield piece
        self._check()  # the shutdown looks like the end of headers and of a body without length

    def _check(self) -> None:
        if self._guard.expired:
            raise TimeoutError("the time is over")


class _Watched:
    """A connection whose socket the guard of the moment watches, from its first moment on."""

    sock: socket.socket | None

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        if (guard := _guard.get()) is not None:
            guard.watch(sock.fileno())
        return sock

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None and (guard := _guard.get()) is not None:
            guard.watch(self.sock.fileno())
        super().request(*args, **kwargs)  # type: ignore[misc]


class _WatchedHTTP(_Watched, requests.HTTPConnection):
    pass


class _WatchedHTTPS(_Watched, requests.HTTPSConnection):
    pass


class _HTTPPool(requests.HTTPConnectionPool):
    ConnectionCls = _WatchedHTTP


class _HTTPSPool(requests.HTTPSConnectionPool):
    ConnectionCls = _WatchedHTTPS


class _Adapter(requests.HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        schemes = self.poolmanager.pool_classes_by_scheme
        for scheme in schemes:
            schemes[scheme] = _HTTPSPool if scheme.startswith("https") else _HTTPPool

    def send(self, request: Any, **kwargs: Any) -> Any:
        guard = _guard.get()
        assert guard is not None, "a request without a guard"
        kwargs["timeout"] = max(guard.remaining, 0.001)
        response = super().send(request, **kwargs)
        response.raw = _Body(response.raw, guard, response.status_code)
        return response


def protect(session: Any, *, elsewhere: bool) -> None:
    """Make all requests of a session guarded ones; it keeps no cookies.

    `elsewhere` allows the environment's proxies and a few redirects.
    """
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.trust_env = elsewhere
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True  # an organization's own CA
    session.max_redirects = 3 if elsewhere else 0
    adapter = _Adapter(pool_maxsize=16)
    for scheme in list(session.adapters):
        session.mount(scheme, adapter)


def new_session() -> Any:
    """A guarded session of plain HTTP, for what ipfshttpclient does not speak."""
    session = requests.Session()
    session.headers = {"Accept-Encoding": "identity", "User-Agent": "fedipfs"}
    protect(session, elsewhere=True)
    return session


def innermost(problem: BaseException) -> str:
    """The innermost words of a failed connection."""
    while (inner := problem.__cause__ or problem.__context__) is not None:
        problem = inner
    return one_line(getattr(problem, "strerror", None) or problem, 100)
