"""Blocks from trustless HTTP gateways, read-only, each checked.

Specification: the Trustless Gateway of the IPFS HTTP gateways: `GET /ipfs/CID?format=raw` gives
one block, `format=car` with `dag-scope=all` a DAG. Whoever answers is not believed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from ipfshttpclient.requests_wrapper import TooManyRedirects

from fedipfs.errors import (
    BlockCorrupt,
    BlockNotFound,
    CarError,
    ConfigError,
    StoreBadAnswer,
    StoreError,
    StoreTimeout,
    StoreUnreachable,
    StoreUnusable,
    one_line,
)
from fedipfs.ipld import CID, RAW, car, links
from fedipfs.store.base import MAX_BLOCK, Counters
from fedipfs.store.guard import FAILURES, Guard, innermost, new_session
from fedipfs.store.options import check_number

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAX_CAR = 1 << 40  # bytes; blocks that do not belong to the DAG end the reading long before
_KINDS = {
    "raw": "application/vnd.ipld.raw",
    "car": "application/vnd.ipld.car; version=1; order=dfs; dups=n",
}


class GatewayStore:
    """Reads from the gateways `urls` in turn: the next one for a missing, late or wrong block.

    `timeout_s` is for one gateway and block. The gateway that answered last is asked first.
    """

    streams = 4
    shared = False

    def __init__(self, urls: Sequence[str], *, timeout_s: float = 30.0) -> None:
        if isinstance(urls, str) or not urls:
            raise ConfigError(f"store.urls={urls!r} should be a list of at least one gateway's URL")
        self.urls = [_checked_url(url) for url in urls]
        check_number("timeout_s", timeout_s, least=0.1)
        self.timeout_s = timeout_s
        self.counters = Counters()
        self._session: Any = None
        self._process = 0

    def __repr__(self) -> str:
        return f"GatewayStore({self.urls!r})"

    def get(self, cid: CID) -> bytes:
        """A block's bytes, hashed, from the first gateway that has it.

        Raises BlockNotFound if none has it, else what the last one did wrong.
        """
        problems: list[StoreError] = []
        for url in list(self.urls):
            try:
                block = self._block(url, cid)
            except StoreError as error:
                problems.append(error)
                continue
            self._prefer(url)
            self.counters.count_fetched(len(block))
            self.counters.count_get(len(block))
            return block
        _give_up(cid, problems)

    def leaves(self, root: CID) -> Iterator[tuple[CID, bytes]]:
        """All blocks of a DAG, each once and checked, from one gateway's CAR.

        Raises what `get` does, after the first block, too: blocks that `root` does not lead to,
        that come twice or that are left out are errors.
        """
        problems: list[StoreError] = []
        for url in list(self.urls):
            stream = self._car(url, root)
            try:
                first = next(stream)
            except StoreError as error:
                problems.append(error)
                continue
            self._prefer(url)
            yield first
            yield from stream
            return
        _give_up(root, problems)

    def has(self, cid: CID) -> bool:
        """Whether any gateway gives the block; it is fetched to see."""
        try:
            self.get(cid)
        except StoreError:
            return False
        return True

    def size(self, cid: CID) -> int:
        """Bytes of that one block, which is fetched to see. Raises BlockNotFound."""
        return len(self.get(cid))

    def put(self, block: Buffer, codec: int = RAW) -> NoReturn:
        """Raises StoreUnusable: gateways only give."""
        raise StoreUnusable(_READ_ONLY)

    def pin(self, root: CID, name: str = "", *, recursive: bool = True) -> NoReturn:
        """Raises StoreUnusable: gateways only give."""
        raise StoreUnusable(_READ_ONLY)

    def unpin(self, root: CID, name: str | None = None) -> NoReturn:
        """Raises StoreUnusable: gateways only give."""
        raise StoreUnusable(_READ_ONLY)

    def pins(self) -> dict[CID, tuple[str, ...]]:
        """None."""
        return {}

    def ready(self) -> NoReturn:
        """Raises StoreUnusable: gateways only give."""
        raise StoreUnusable(_READ_ONLY)

    def flush(self) -> None:
        """Nothing."""

    def publish(self) -> None:
        """Nothing."""

    def fetch(self, root: CID) -> None:
        """Nothing: a gateway keeps no copies here."""

    def _block(self, url: str, cid: CID) -> bytes:
        with self._answer(url, cid, "raw", MAX_BLOCK) as (response, _):
            block = b"".join(response.iter_content(None))
        if not cid.matches(block):
            raise BlockCorrupt(f"block {cid}: {url} sent {len(block)} bytes that do not hash to it")
        return block

    def _car(self, url: str, root: CID) -> Iterator[tuple[CID, bytes]]:
        expected, seen = {root.to_v1()}, set()
        with self._answer(url, root, "car", _MAX_CAR) as (response, guard):
            _, blocks = car.read(_Stream(response.iter_content(None), guard))
            for name, block in blocks:
                cid = name.to_v1()
                if cid in seen or cid not in expected:
                    problem = "a second time" if cid in seen else "which is no part of it"
                    raise StoreBadAnswer(f"it sent {cid}, {problem}")
                seen.add(cid)
                expected.update(link.to_v1() for link in links(cid, block))
                self.counters.count_fetched(len(block))
                self.counters.count_get(len(block))
                yield name, block
            if expected != seen:
                raise StoreBadAnswer(f"it left out {len(expected - seen)} blocks")

    @contextmanager
    def _answer(self, url: str, cid: CID, form: str, limit: int) -> Iterator[tuple[Any, Guard]]:
        what = f"block {cid}: {url}"
        with Guard(self.timeout_s, limit) as guard:
            try:
                with guard.sending():
                    response = self._http().get(
                        f"{url}/ipfs/{cid}",
                        params={"format": form, **({"dag-scope": "all"} if form == "car" else {})},
                        headers={"Accept": _KINDS[form]},
                        stream=True,
                    )
                with response:
                    if response.status_code in (404, 410):
                        raise BlockNotFound(f"{what} has it not (HTTP {response.status_code})")
                    if response.status_code != 200:
                        raise StoreUnreachable(f"{what} answered HTTP {response.status_code}")
                    yield response, guard
            except StoreBadAnswer as error:
                raise StoreBadAnswer(f"{what}: {error}") from None
            except StoreError:
                raise
            except CarError as error:
                if guard.expired:
                    raise _late(what, self.timeout_s) from None
                raise StoreBadAnswer(f"{what} sent a CAR that is none: {error}") from None
            except TooManyRedirects:
                raise StoreBadAnswer(f"{what} sends us elsewhere again and again") from None
            except FAILURES as error:
                if guard.expired:
                    raise _late(what, self.timeout_s) from None
                raise StoreUnreachable(f"{what} does not answer ({innermost(error)})") from None

    def _http(self) -> Any:
        if self._session is None or self._process != os.getpid():  # sockets are not for two
            self._session, self._process = new_session(), os.getpid()
        return self._session

    def _prefer(self, url: str) -> None:
        self.urls = [url, *(other for other in self.urls if other != url)]


_READ_ONLY = "gateways are read-only: choose store=kubo or store=cached to write"


class _Stream:
    """What the CAR reader reads from; every piece that comes starts the time anew."""

    def __init__(self, pieces: Iterator[bytes], guard: Guard) -> None:
        self._pieces, self._guard = pieces, guard
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
            self._guard.progress(len(self._rest))
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)


def _late(what: str, timeout_s: float) -> StoreTimeout:
    return StoreTimeout(f"{what} did not answer within {timeout_s:g} s")


def _give_up(cid: CID, problems: list[StoreError]) -> NoReturn:
    if len(problems) == 1:
        raise problems[0]
    told = "; ".join(one_line(problem, 200) for problem in problems)
    if all(isinstance(problem, BlockNotFound) for problem in problems):
        raise BlockNotFound(f"block {cid} is on none of {len(problems)} gateways: {told}")
    worst = next(problem for problem in problems if not isinstance(problem, BlockNotFound))
    raise type(worst)(f"no gateway gives block {cid}: {told}")


def _checked_url(url: str) -> str:
    if "@" in str(url):  # before anything shows it
        raise ConfigError("store.urls: a gateway's URL holds no credentials: use https://HOST")
    wrong = f"store.urls: {url!r:.200} is no URL of a gateway: use https://HOST"
    try:
        parts = urlsplit(str(url))
        _ = parts.port
    except ValueError:
        raise ConfigError(wrong) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(wrong)
    return str(url).rstrip("/")
