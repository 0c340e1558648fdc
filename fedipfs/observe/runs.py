"""Read-only access to run folders, tolerant of runs that broke off half-way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedipfs.errors import RunError

MARKS = ("config.yaml", "metrics.jsonl", "summary.json", "head")


@dataclass(frozen=True)
class Run:
    """One run folder as far as it can be read; what is missing or broken is empty."""

    path: Path
    summary: dict[str, Any]
    lines: list[dict[str, Any]]
    config_text: str
    head: str | None

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def status(self) -> str:
        """The summary's status, or `unfinished` where there is no readable summary."""
        return str(self.summary.get("status") or "unfinished")

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml as plain values; empty where it is missing or not a mapping."""
        import yaml

        try:
            value = yaml.safe_load(self.config_text)
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def metrics(self) -> dict[str, float]:
        """The final metrics, or the last round's where the run has no summary."""
        final = self.summary.get("metrics")
        if isinstance(final, dict) and final:
            return numbers(final)
        for line in reversed(self.lines):
            if shown := round_metrics(line):
                return shown
        return {}

    def named(self, key: str) -> str:
        """`experiment`, `dataset` or `strategy` by the summary or the config, else ""."""
        if value := self.summary.get(key):
            return str(value)
        value = self.config.get("data" if key == "dataset" else key)
        if isinstance(value, dict):
            value = value.get("name")
        return str(value or "")

    def as_dict(self) -> dict[str, Any]:
        """One flat JSON-ready row: what `fedipfs runs ls` shows."""
        seconds = self.summary.get("seconds")
        total = seconds.get("total") if isinstance(seconds, dict) else None
        if total is None:
            total = sum(numbers(line).get("seconds", 0.0) for line in self.lines)
        return {
            "run_id": self.id,
            "experiment": self.named("experiment"),
            "dataset": self.named("dataset"),
            "strategy": self.named("strategy"),
            "rounds": self.summary.get("rounds_completed", len(self.lines)),
            "metrics": self.metrics,
            "seconds": total,
            "status": self.status,
        }


def numbers(values: Any) -> dict[str, float]:
    """The entries of a mapping that are numbers; empty for anything else."""
    if not isinstance(values, Mapping):
        return {}
    return {
        str(key): value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def round_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics to show for a round: the server's, else the clients', else training's."""
    for source in ("server", "evaluate", "train"):
        if found := numbers(line.get(source)):
            return found
    return {}


def load(folder: Path) -> Run:
    """Read a run folder; no file in it has to exist or be whole."""
    summary = _json(_text(folder / "summary.json"))
    lines = [line for text in _text(folder / "metrics.jsonl").splitlines() if (line := _json(text))]
    head = _text(folder / "head").strip()
    return Run(folder, summary, lines, _text(folder / "config.yaml"), head or None)


def find(runs_dir: Path, name: str) -> Run:
    """The run called `name`: a run id, a prefix that only one run has, or a run folder's path.

    Raises:
        RunError: no such run, or several runs begin with `name`.
    """
    for folder in (runs_dir / name, Path(name)):
        if name and _is_run(folder):
            return load(folder)
    matches = [folder for folder in _folders(runs_dir) if name and folder.name.startswith(name)]
    if len(matches) == 1:
        return load(matches[0])
    if matches:
        several = ", ".join(folder.name for folder in matches[:5])
        raise RunError(f"'{name}' is short for {len(matches)} runs ({several}): give more of it")
    raise RunError(f"no run '{name}' in {runs_dir}: see 'fedipfs runs ls', or give --runs-dir")


def listing(runs_dir: Path) -> list[Run]:
    """Every run folder in `runs_dir`, oldest first; empty where the folder does not exist."""
    return [load(folder) for folder in _folders(runs_dir)]


def _folders(runs_dir: Path) -> Iterator[Path]:
    try:
        found = [folder for folder in runs_dir.iterdir() if _is_run(folder)]
    except OSError:
        return
    yield from sorted(found, key=lambda folder: (_age(folder), folder.name))


def _age(folder: Path) -> float:
    """When the run began, as nearly as its files tell: config.yaml is written first, once."""
    for name in MARKS:
        try:
            return (folder / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
