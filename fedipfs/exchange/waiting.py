"""Waiting for replies on a Flower Grid, which itself only offers to look for them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

_POLL_S = 0.1


def receive(grid: Grid, message_ids: Sequence[str], timeout: float | None) -> list[Message]:
    """At least one reply to `message_ids`; [] if none came within `timeout` seconds.

    A grid that has a `receive` of its own knows how to wait; another is asked again and again.
    """
    if own := getattr(grid, "receive", None):
        return list(own(message_ids, timeout))
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        replies = list(grid.pull_messages(message_ids))
        left = _POLL_S if end is None else end - time.monotonic()
        if replies or not message_ids or left <= 0:
            return replies
        time.sleep(min(_POLL_S, left))
