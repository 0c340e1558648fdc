"""Past runs as text: what `fedipfs runs ls` and `fedipfs runs show` print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedipfs.observe.runs import Run, numbers, round_metrics
from fedipfs.observe.summary import (
    align,
    best_text,
    duration,
    loss_last,
    metric,
    metrics_text,
    privacy_text,
    size,
)


def listing(runs: Iterable[Run]) -> str:
    """A table, a line a run."""
    rows = [("RUN", "EXPERIMENT", "DATASET", "STRATEGY", "ROUNDS", "METRICS", "TIME", "STATUS")]
    for run in runs:
        row = run.as_dict()
        rows.append(
            (
                run.id,
                row["experiment"] or "?",
                row["dataset"] or "?",
                row["strategy"] or "?",
                str(row["rounds"]),
                metrics_text(row["metrics"]) or "-",
                duration(row["seconds"]),
                row["status"],
            )
        )
    return "\n".join(align(rows))


def details(
    run: Run,
    records: Sequence[tuple[str, Mapping[str, Any]]],
    broken: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Everything known about one run.

    Args:
        run: the run folder.
        records: (CID, record) from the head back to the run's first record.
        broken: why the chain of records ends early; "" where it is whole.
        notes: lines on the records: who signed them, what stayed sealed.
    """
    row = run.as_dict()
    moved = numbers(run.summary.get("bytes"))
    facts = [
        ("run", run.id),
        ("status", row["status"]),
        ("error", str(run.summary.get("error") or "")),
        ("stopped", str(run.summary.get("stopped") or "")),
        ("experiment", row["experiment"]),
        ("dataset", row["dataset"]),
        ("strategy", row["strategy"]),
        ("rounds", str(row["rounds"])),
        ("metrics", metrics_text(row["metrics"])),
        ("privacy", privacy_text(run.summary)),
        ("time", duration(row["seconds"])),
        ("Flower", _suffixed(moved, "flower_per_client_round", " per client and round")),
        ("stored", _suffixed(moved, "store_put", "")),
        ("model", str(run.summary.get("final_model_cid") or "")),
        ("best", best_text(run.summary)),
        ("record", run.head or ""),
        ("folder", f"{run.path}/"),
    ]
    parts = ["\n".join(align(fact for fact in facts if fact[1]))]
    if run.lines:
        parts.append(_rounds(run.lines))
    if records or broken:
        parts.append("\n".join(["Records, from the last:", *_records(records)]))
    if broken:
        parts[-1] += f"\n  the chain cannot be followed further: {broken}"
    for note in notes:
        parts[-1] += f"\n  {note}"
    return "\n\n".join(parts)


def _suffixed(values: Mapping[str, float], key: str, suffix: str) -> str:
    return f"{size(values[key])}{suffix}" if key in values else ""


def _rounds(lines: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name, _ in loss_last({k: 0.0 for line in lines for k in round_metrics(line)})]
    rows = [("ROUND", *(name.upper() for name in names), "CLIENTS", "TIME", "MODEL")]
    for line in lines:
        shown, clients = round_metrics(line), numbers(line.get("clients"))
        rows.append(
            (
                str(line.get("round", "?")),
                *(metric(shown.get(name)) for name in names),
                f"{clients.get('ok', '?')}/{clients.get('selected', '?')}",
                duration(numbers(line).get("seconds")),
                str(line.get("model_cid") or "-"),
            )
        )
    failed = [
        f"round {line.get('round', '?')}: {entry.get('client')} failed: {entry.get('reason')}"
        for line in lines
        for entry in (line.get("clients") or {}).get("failed") or []
    ]
    return "\n".join([*align(rows), *failed])


def _records(records: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    rows = [
        (f"  round {record['round']}" if "round" in record else "  start", cid)
        for cid, record in records
    ]
    return align(rows)
