"""A cap on a store's bytes, kept cheaply."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fedipfs.errors import StoreFull


class Cap:
    """Counts what this process adds to what `measure` found, and measures again now and then.

    With n processes writing, the store may pass `limit` by up to n sixteenths of it: each sees
    the others' blocks only when it measures, which it does after adding a sixteenth itself.
    """

    def __init__(self, limit: int, measure: Callable[[], int], where: str) -> None:
        self.limit, self._measure, self._where = limit, measure, where
        self._known: int | None = None
        self._added = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Account for `size` more bytes. Raises StoreFull when they do not fit."""
        with self._lock:
            if self._known is None or self._added + size > self.limit // 16:
                self._refresh()
            if self._total() + size > self.limit:
                self._refresh()  # garbage collection may have made room
            if self._total() + size > self.limit:
                raise StoreFull(
                    f"{self._where} holds {self._total()} of at most {self.limit} bytes and "
                    f"{size} more do not fit: raise max_bytes, or unpin and 'fedipfs store gc'"
                )
            self._added += size

    def _total(self) -> int:
        return (self._known or 0) + self._added

    def _refresh(self) -> None:
        self._known, self._added = self._measure(), 0
