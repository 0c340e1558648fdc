"""Map a function over items on a few threads, in order, holding only a few results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """`map(function, items)` with up to `threads` calls at once and 2 * `threads` in hand.

    It pays where the function releases the GIL (hashing, file reads and writes, sockets). A
    pool is started only for more than one item and `threads` above 1.
    """
    source = iter(items)
    if threads > 1:
        head = list(islice(source, 2))
        if len(head) < 2:
            yield from map(function, head)
            return
        yield from _pooled(function, head, source, threads)
        return
    yield from map(function, source)


def _pooled(
    function: Callable[[Item], Result], head: list[Item], source: Iterator[Item], threads: int
) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="fedipfs-ahead") as pool:
        try:
            pending.extend(pool.submit(function, item) for item in head)
            for item in source:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
