"""What a sweep ends with: a table of its cells, and the same as sweep.csv."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

_COLUMNS = ("run_id", "dataset", "rounds_completed", "final_model_cid", "status")
cells: list[dict[str, Any]] = []  # summaries of the jobs of this process, in order


class SweepTable(Callback):
    """A Hydra callback that collects the cells of a multirun."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        cells.clear()
        self._rows: list[dict[str, Any]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if not hasattr(self, "_rows"):  # a single run
            return
        summary: dict[str, Any] = cells.pop() if cells else {"status": "failed"}
        words = job_return.overrides or ()
        choices: dict[str, Any] = dict(word.lstrip("+~").partition("=")[::2] for word in words)
        metrics = summary.get("metrics") or {}
        self._rows.append(
            {
                **choices,
                **metrics,
                "seconds": (summary.get("seconds") or {}).get("total"),
                **{column: summary.get(column) for column in _COLUMNS},
            }
        )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not self._rows:
            return
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        path = Path(config.hydra.sweep.dir) / "sweep.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows)
        _show(columns, self._rows)
        print(f"\nThe same table as a file: {path}", file=sys.stdout, flush=True)


def _show(columns: list[str], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [name for name in columns if name not in ("final_model_cid", "rounds_completed")]
    table = Table(title="Sweep")
    for name in shown:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in shown))
    Console(file=sys.stdout).print(table)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
