"""A progress bar for bytes on their way, where somebody watches and it takes a while."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

LEAST = 20_000_000  # bytes below which no bar is worth its lines


@contextlib.contextmanager
def shown(
    label: str, done: Callable[[], int], total: int | None = None, stream: TextIO | None = None
) -> Iterator[None]:
    """Show label, bytes, rate and time left while the body runs, from 20 MB up.

    Args:
        label: what is going on, such as "add model.safetensors".
        done: the bytes so far; called on rich's refresh thread.
        total: bytes in all; None where that is unknown.
        stream: where to draw, stderr by default; nothing is drawn unless it is a terminal.
    """
    stream = sys.stderr if stream is None else stream
    small = total is not None and total < LEAST
    if small or not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class Polled(Progress):
        """Asks for the number when it draws: the work itself pays nothing for being watched."""

        def get_renderables(self) -> Iterable[RenderableType]:
            for task in self.tasks:
                now = done()
                self.update(task.id, completed=now, visible=max(now, total or 0) >= LEAST)
            yield from super().get_renderables()

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Polled(*columns, console=Console(file=stream), transient=True) as bar:
        bar.add_task(label, total=total, visible=False)
        yield
