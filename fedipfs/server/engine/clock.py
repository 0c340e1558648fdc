"""A simulated clock: who answers when follows from a seed, not from the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Message

from fedipfs.server.engine.local import LocalGrid

TIMED = ("train", "evaluate")  # message types, with any suffix, that take a client's time


def durations(spread: float, seed: int) -> Callable[[int], float]:
    """Time by node: log-normal, exp(spread * N(0, 1)), drawn once for each node; median 1."""

    def of(node: int) -> float:
        rng = np.random.default_rng([seed, node])
        return float(np.exp(spread * rng.standard_normal()))

    return of


class SimulatedGrid(LocalGrid):
    """A LocalGrid whose replies come in the order of simulated times, as do its time-outs.

    A message to a node takes `duration(node)`; time goes on only while replies are waited for. So
    what depends on who is faster is the same on every machine, with any number of workers.
    """

    def __init__(self, *args: Any, duration: Callable[[int], float], **options: Any) -> None:
        super().__init__(*args, **options)
        self._duration = duration
        self._now = 0.0
        self._ends: dict[str, tuple[float, int]] = {}  # message id -> when it is answered, node

    def now(self) -> float:
        """Simulated seconds."""
        return self._now

    def set_now(self, now: float) -> None:
        """Go on from where an earlier process was."""
        self._now = now

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        for number, message in zip(ids, sent, strict=True):
            if message.metadata.message_type.split(".")[0] in TIMED:
                node = message.metadata.dst_node_id
                self._ends[number] = (self._now + self._duration(node), node)
        return ids

    def receive(self, message_ids: Iterable[str], timeout: float | None) -> list[Message]:
        """The reply that comes first, of the node with the lowest id among equals."""
        ids = list(message_ids)
        timed = [number for number in ids if number in self._ends]
        if not timed:
            return super().receive(ids, timeout)
        first = min(timed, key=lambda number: self._ends[number])
        end, _ = self._ends[first]
        if timeout is not None and end > self._now + timeout:
            self._now += timeout
            return []
        del self._ends[first]
        self._now = max(self._now, end)
        return super().receive([first], None)

    def cancel(self, message_ids: Iterable[str]) -> None:
        ids = list(message_ids)
        for number in ids:
            self._ends.pop(number, None)
        super().cancel(ids)
