"""What a sweep ends with: a table of its cells, and the same in full as sweep.csv."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

_COLUMNS = ("run_id", "dataset", "rounds_completed", "final_model_cid", "status", "error")
cells: list[dict[str, Any]] = []  # summaries of the jobs of this process that are not yet rows


class Row(NamedTuple):
    """A cell that has ended: what was chosen for it, what came out, and the rest."""

    choices: dict[str, Any]
    metrics: dict[str, Any]
    facts: dict[str, Any]


class SweepTable(Callback):
    """A Hydra callback that collects the cells of a multirun.

    sweep.csv is written after each cell, so a sweep that is stopped leaves those that ended.
    """

    latest: SweepTable | None = None  # the sweep of this process

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        cells.clear()
        self._rows: list[Row] = []
        self._path = Path(config.hydra.sweep.dir) / "sweep.csv"
        SweepTable.latest = self

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if SweepTable.latest is not self:  # a single run
            return
        summary: dict[str, Any] = cells.pop() if cells else {"status": "failed"}
        words = job_return.overrides or ()
        self._rows.append(
            Row(
                dict(word.lstrip("+~").partition("=")[::2] for word in words),
                summary.get("metrics") or {},
                {
                    "seconds": (summary.get("seconds") or {}).get("total"),
                    **{column: summary.get(column) for column in _COLUMNS},
                },
            )
        )
        self._write()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.show()

    def show(self) -> None:
        """Print the cells that have ended: what differs between them, and how they fared."""
        if not self._rows:
            return
        _print(self._rows)
        print(f"\nThe table with all columns: {self._path}", file=sys.stdout, flush=True)

    def _write(self) -> None:
        choices = _union(row.choices for row in self._rows)
        metrics = _union(row.metrics for row in self._rows)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(".sweep.csv.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*choices, *metrics, "seconds", *_COLUMNS])
            writer.writeheader()
            writer.writerows({**row.choices, **row.metrics, **row.facts} for row in self._rows)
        os.replace(temporary, self._path)


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    choices = [
        name
        for name in _union(row.choices for row in rows)
        if len({row.choices.get(name) for row in rows}) > 1
    ]
    shown = [*choices, *_union(row.metrics for row in rows), "seconds", "status"]
    table = Table(title="Sweep")
    for name in shown:
        table.add_column(name, overflow="fold")
    for row in rows:
        values = {**row.choices, **row.metrics, **row.facts}
        table.add_row(*(_text(values.get(name)) for name in shown))
    Console(file=sys.stdout).print(table)


def _union(sections: Iterable[dict[str, Any]]) -> list[str]:
    """All keys, each once, in the order they come."""
    return list(dict.fromkeys(key for section in sections for key in section))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
