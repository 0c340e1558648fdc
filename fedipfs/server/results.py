"""What a run tells of its rounds and of itself: lines of metrics.jsonl, and summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedipfs.ipld import CID
from fedipfs.server.best import Scored
from fedipfs.server.records import plain
from fedipfs.server.rounds import Round


def line(done: Round, moved: dict[str, int], seconds: float) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    failed = [{"client": name, "reason": why} for name, why in done.failures.items()]
    told: dict[str, Any] = plain(
        {
            "round": done.number,
            "seconds": round(seconds, 4),
            "train": done.train,
            "evaluate": done.evaluate,
            "median": done.median,
            "server": done.server,
            "clients": {
                "selected": done.selected,
                "ok": done.succeeded,
                "failed": failed,
            },
            "sgd_steps": done.sgd_steps,
            "bytes": moved,
            "aggregation": _with_texts(done.aggregation),
            "compression": done.compression,
            "privacy": done.privacy,
            "model_cid": str(done.result),
            "record_cid": str(done.record),
        }
    )
    return told


def _with_texts(value: Any) -> Any:
    """`value` as JSON can hold it: CIDs as text."""
    if isinstance(value, Mapping):
        return {key: _with_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_texts(item) for item in value]
    return str(value) if isinstance(value, CID) else value


def totals(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the summary says of all rounds together."""
    asked = sum(line["clients"]["selected"] for line in lines) or 1
    flower = sum(line["bytes"]["flower_per_client"] * line["clients"]["selected"] for line in lines)
    moved = ("store_put", "store_get", "sent", "fetched")
    return {
        "rounds_completed": len(lines),
        "sgd_steps": sum(line["sgd_steps"] for line in lines),
        "bytes": {
            "flower_per_client_round": round(flower / asked),
            **{key: sum(line["bytes"].get(key, 0) for line in lines) for key in moved},
        },
    }


def outcome(
    lines: Sequence[Mapping[str, Any]], result: CID | None, best: Scored | None, head: CID
) -> dict[str, Any]:
    """What the summary says of the final model (`result`), the best one, and the last record."""
    of_result = [line for line in lines if line["model_cid"] == str(result)]
    found = (line["server"] or line["evaluate"] for line in reversed(of_result or lines))
    return {
        "final_model_cid": str(result) if lines else None,
        "best_model_cid": best and str(best.model),
        "best_round": best and best.round,
        "head_cid": str(head) if lines else None,
        "metrics": next((dict(each) for each in found if each), {}),
    }
