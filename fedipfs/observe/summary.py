"""The closing summary, the few formats it shares with other views, and atomic JSON files."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedipfs.observe.runs import numbers

RUNS = Path("runs")
DEFAULT_STORE = RUNS / "store"
_HEADINGS = {"finished": "Finished", "failed": "Failed", "interrupted": "Interrupted"}


def size(count: float | None) -> str:
    """Bytes for people, in powers of 1000: `812 B`, `7.9 kB`, `1.2 GB`; `-` for None."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == "B" or abs(value) >= 100 else 1
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds for people: `0.034 s`, `41.2 s`, `3 min 05 s`, `2 h 04 min`; `-` for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:
        return f"{seconds:.3f} s" if seconds < 0.1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def metric(value: float | None) -> str:
    """A metric in four decimals, or four significant digits where those would say nothing."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:.3e}"


def metrics_text(metrics: Any) -> str:
    """`accuracy 0.9871  loss 0.0412`: the loss last, everything else in the order given."""
    return "  ".join(f"{name} {metric(value)}" for name, value in loss_last(numbers(metrics)))


def loss_last(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """The entries in the order given, but the loss after what people look for first."""
    return sorted(metrics.items(), key=lambda item: item[0] == "loss")


def align(rows: Iterable[Sequence[str]]) -> list[str]:
    """Left-aligned text columns, two spaces apart."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def closing(
    summary: Mapping[str, Any], folder: Path, store: str | None = None, program: str = "fedipfs"
) -> str:
    """The text that ends a run.

    Args:
        summary: the run's summary as in summary.json; missing entries are left out.
        folder: the run folder, `<runs_dir>/<run_id>`.
        store: the block store, as `fedipfs store --store` takes it.
        program: how the user calls `fedipfs`.
    """
    seconds, moved = numbers(summary.get("seconds")), numbers(summary.get("bytes"))
    status = str(summary.get("status", "finished"))
    heading = f"{_HEADINGS.get(status, status.capitalize())}: {summary.get('experiment', 'run')}"
    if (dataset := summary.get("dataset")) and dataset != summary.get("experiment"):
        heading += f" (dataset {dataset})"
    heading += f", {summary.get('rounds_completed', 0)} rounds"
    if "total" in seconds:
        heading += f" in {duration(seconds['total'])}"
    rows = [
        ("stopped", str(summary.get("stopped") or "")),
        ("metrics", metrics_text(summary.get("metrics"))),
        ("model", str(summary.get("final_model_cid") or "")),
        ("best", best_text(summary)),
        ("privacy", privacy_text(summary)),
        ("record", str(summary.get("head_cid") or "")),
    ]
    if "flower_per_client_round" in moved:
        rows.append(("Flower", f"{size(moved['flower_per_client_round'])} per client and round"))
    if "store_put" in moved:
        rows.append(("store", f"{size(moved['store_put'])} in, {size(moved.get('store_get'))} out"))
    if moved.get("sent") or moved.get("fetched"):
        rows.append(
            ("network", f"{size(moved.get('sent'))} sent, {size(moved.get('fetched'))} fetched")
        )
    rows.append(("folder", f"{folder}/"))
    lines = [heading, *(f"  {line}" for line in align(row for row in rows if row[1]))]
    return "\n".join([*lines, "", "Look further:", *_commands(summary, folder, store, program)])


def best_text(summary: Mapping[str, Any]) -> str:
    """The best model and its round; "" where that is the final one."""
    cid = summary.get("best_model_cid")
    if not cid or cid == summary.get("final_model_cid"):
        return ""
    return f"{cid} of round {summary.get('best_round')}"


def privacy_text(summary: Mapping[str, Any]) -> str:
    """What the run has cost in privacy; "" where nothing is counted."""
    spent = summary.get("privacy")
    if not isinstance(spent, Mapping):
        return ""
    values = numbers(spent)
    by = {name: values[f"epsilon_{name}"] for name in ("prv", "rdp") if f"epsilon_{name}" in values}
    found = ", ".join(f"{name} {value:.4g}" for name, value in by.items())
    return (
        f"each {spent.get('unit')}: epsilon {values.get('epsilon', math.nan):.4g} at delta "
        f"{values.get('delta', math.nan):g} ({found})"
    )


def _commands(
    summary: Mapping[str, Any], folder: Path, store: str | None, program: str
) -> list[str]:
    commands = []
    if cid := summary.get("final_model_cid"):
        where = f" --store {shlex.quote(store)}" if store and Path(store) != DEFAULT_STORE else ""
        if summary.get("seal") == "all":
            keys = str(folder / "keys" / "coordinator.key")
            if summary.get("engine") == "deploy":  # those of the federation's coordinator
                keys = str(Path(os.environ.get("FEDIPFS_HOME") or "~/.fedipfs") / "identity.key")
            where += f" --identity {keys if keys.startswith('~') else shlex.quote(keys)}"
        # What every DAG-CBOR record's CID begins with: an ensemble is a record, not a file.
        into = "" if cid.startswith("bafyrei") else " > model.safetensors"
        commands.append(f"  {program} store cat{where} {cid}{into}")
    where = "" if folder.parent == RUNS else f" --runs-dir {shlex.quote(str(folder.parent))}"
    commands.append(f"  {program} runs show{where} {shlex.quote(folder.name)}")
    return commands


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON in one step: a reader finds the old file or the new, never a part.

    Numbers that JSON cannot hold (NaN, infinities) become null; NumPy scalars become numbers.
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | None):
        return value
    item = value.item() if hasattr(value, "item") else value
    if isinstance(item, float):
        return item if math.isfinite(item) else None
    return item if isinstance(item, int | bool) else str(item)
