"""Progress of a run: a live display on a terminal, one plain line a round elsewhere.

The server only changes numbers here; drawing happens on rich's refresh thread, so a client's
report costs nothing that would show in a short round.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from fedipfs.observe.runs import numbers, round_metrics
from fedipfs.observe.summary import closing, duration, metrics_text

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_REASON = 60  # characters of a client's failure shown in a round's line; the log has all of it


class Progress:
    """What the server tells the user while it works.

    Args:
        stream: where to write; stderr by default. The display is live where it is a terminal.
        quiet: only the note.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._live: Live | None = None
        self._on_terminal = not quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._title = ""
        self._phase = ""
        self._rounds = self._first = self._done = 0
        self._cohort = self._answered = self._failed = 0
        self._metrics = ""
        self._began = self._round_began = time.monotonic()

    def start(
        self, run_id: str, experiment: str, rounds_total: int, first_round: int, note: str | None
    ) -> None:
        """The run begins, or goes on at `first_round` (from 1); `note` must not be missed."""
        self._title = f"{experiment}  run {run_id}"
        self._rounds, self._first, self._done = rounds_total, first_round, first_round - 1
        self._began = time.monotonic()
        resumed = f", going on at round {first_round}" if first_round > 1 else ""
        self._say(f"{experiment}: {rounds_total} rounds{resumed}, run {run_id}")
        if note:
            self._write(f"*** NOTE: {' '.join(note.split())} ***", style="bold black on yellow")
        self._show()

    def tell(self, text: str, *, important: bool = False) -> None:
        """A line on what is to be known before the first round; an important one stands out."""
        self._write(text, style="bold yellow") if important else self._say(text)

    def phase(self, text: str) -> None:
        """What is going on now, such as `loading data`; shown by the live display only."""
        self._phase = text
        self._show()

    def round_started(self, n: int, cohort: int) -> None:
        """Round `n` (from 1) begins with `cohort` clients."""
        self._done = n - 1
        self._cohort, self._answered, self._failed = cohort, 0, 0
        self._round_began = time.monotonic()
        self._phase = "training"

    def client_done(self, name: str, ok: bool) -> None:
        """A client has answered, or failed, or is given up."""
        self._answered += 1
        self._failed += not ok

    def round_done(self, line: dict[str, Any]) -> None:
        """A round is complete; `line` is its line of metrics.jsonl."""
        self._done = int(line["round"])
        self._round_began = time.monotonic()
        self._metrics = metrics_text(round_metrics(line))
        self._say(self._round_text(line))

    def finish(
        self, summary: dict[str, Any], folder: Path | None = None, store: str | None = None
    ) -> None:
        """The run is over: the display goes, the closing summary comes, on stdout.

        `folder` (`runs/<run_id>` if not given) and `store` are for the commands it suggests.
        """
        self.close()
        folder = folder or Path("runs") / str(summary.get("run_id", ""))
        if not self._quiet:
            print("\n" + closing(summary, folder, store, _program()), flush=True)

    def close(self) -> None:
        """Take the live display away and show the cursor again; harmless when called twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- drawing

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._write(text)

    def _write(self, text: str, style: str | None = None) -> None:
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(text, style=style or ""))
        elif self._on_terminal and style:
            from rich.console import Console
            from rich.text import Text

            Console(file=self._stream).print(Text(text, style=style))
        else:
            print(text, file=self._stream, flush=True)

    def _show(self) -> None:
        if self._on_terminal and self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(file=self._stream),
                get_renderable=self._draw,
                refresh_per_second=5,
                transient=True,
            )
            self._live.start()

    def _draw(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1, min_width=4)
        table.add_column(no_wrap=True, overflow="ellipsis")
        if self._rounds:
            rounds = ProgressBar(total=self._rounds, completed=self._done)
            table.add_row("rounds", rounds, f"{self._done}/{self._rounds}{self._left()}")
        if self._cohort:
            clients = ProgressBar(total=self._cohort, completed=self._answered)
            failed = f", {self._failed} failed" if self._failed else ""
            table.add_row("clients", clients, f"{self._answered}/{self._cohort}{failed}")
        whole = Table.grid(expand=True)
        whole.add_column(no_wrap=True, overflow="ellipsis")
        whole.add_row(Text(self._title, style="bold"))
        whole.add_row(table)
        state = "  ".join(part for part in (self._metrics, self._phase) if part)
        whole.add_row(Text(state, style="dim"))
        return whole

    def _left(self) -> str:
        """The time left at the mean pace so far; "" before the first round of this process."""
        rounds = self._done - self._first + 1
        if rounds <= 0 or self._done >= self._rounds:
            return ""
        now = time.monotonic()
        pace = (self._round_began - self._began) / rounds
        left = max(pace * (self._rounds - self._done) - (now - self._round_began), 0.0)
        return f", {left:.0f} s left" if left < 60 else f", {duration(left)} left"

    def _round_text(self, line: dict[str, Any]) -> str:
        width = len(str(self._rounds))
        parts = [f"round {line['round']:>{width}}/{self._rounds}"]
        if metrics := metrics_text(round_metrics(line)):
            parts.append(metrics)
        clients = line.get("clients") or {}
        counts = numbers(clients)
        parts.append(f"{counts.get('ok', 0)}/{counts.get('selected', 0)} clients")
        parts.append(duration(numbers(line).get("seconds")))
        if failed := clients.get("failed") or []:
            reason = " ".join(str(failed[0].get("reason", "")).split())
            reason = reason if len(reason) <= _REASON else reason[: _REASON - 1] + "…"
            more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
            parts.append(f"failed: {failed[0].get('client', '?')} ({reason}){more}")
        return "  ".join(parts)


def _program() -> str:
    """How the user can call `fedipfs` from here: by name, or as the script beside this Python."""
    beside = Path(sys.executable).with_name("fedipfs")
    if shutil.which("fedipfs") or not beside.is_file():
        return "fedipfs"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))
