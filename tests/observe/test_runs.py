"""Run folders are read for what they hold, whole or not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedipfs.errors import RunError
from fedipfs.observe import runs


def line(number: int, **extra: Any) -> dict[str, Any]:
    return {
        "round": number,
        "seconds": 1.5,
        "train": {"train_loss": 0.5},
        "server": {"loss": 0.4 / number, "accuracy": 1 - 0.2 / number},
        "clients": {"selected": 3, "ok": 3, "failed": []},
        **extra,
    }


def make(folder: Path, rounds: int = 2, **summary: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "experiment: digits\nstrategy: {name: fedavg}\nstore: {kind: folder, path: runs/store}\n"
    )
    text = "".join(json.dumps(line(number + 1)) + "\n" for number in range(rounds))
    (folder / "metrics.jsonl").write_text(text)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_whole_run_reads_back(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "a",
        status="finished",
        rounds_completed=2,
        dataset="digits",
        metrics={"accuracy": 0.9, "loss": 0.2},
        seconds={"total": 3.4, "rounds": [1.5, 1.5]},
    )
    (folder / "head").write_text("bafyhead\n")
    run = runs.load(folder)
    assert run.head == "bafyhead"
    assert run.as_dict() == {
        "run_id": "a",
        "experiment": "digits",
        "dataset": "digits",
        "strategy": "fedavg",
        "rounds": 2,
        "metrics": {"accuracy": 0.9, "loss": 0.2},
        "seconds": 3.4,
        "status": "finished",
    }


def test_a_run_without_a_summary_shows_its_last_round(tmp_path: Path) -> None:
    run = runs.load(make(tmp_path / "a", rounds=2))
    row = run.as_dict()
    assert row["status"] == "unfinished"
    assert row["rounds"] == 2
    assert row["seconds"] == 3.0
    assert row["metrics"] == {"loss": 0.2, "accuracy": 0.9}


@pytest.mark.parametrize("broken", [b"", b"{", b"[1]", b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_broken_files_are_read_around(tmp_path: Path, broken: bytes) -> None:
    folder = make(tmp_path / "a", status="finished")
    for name in ("summary.json", "config.yaml", "head"):
        (folder / name).write_bytes(broken)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(broken)
    run = runs.load(folder)
    assert run.status == "unfinished"
    assert [entry["round"] for entry in run.lines] == [1, 2]
    assert run.as_dict()["rounds"] == 2


def test_the_listing_is_by_age_and_leaves_other_folders_out(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        os.utime(make(tmp_path / name) / "config.yaml", (1000 - age, 1000 - age))
    (tmp_path / "store").mkdir()
    (tmp_path / "note.txt").write_text("x")
    assert [run.id for run in runs.listing(tmp_path)] == ["old", "middle", "new"]
    assert runs.listing(tmp_path / "absent") == []


def test_a_run_is_found_by_id_prefix_or_path(tmp_path: Path) -> None:
    make(tmp_path / "2026-a-digits")
    make(tmp_path / "2026-b-digits")
    assert runs.find(tmp_path, "2026-a-digits").id == "2026-a-digits"
    assert runs.find(tmp_path, "2026-b").id == "2026-b-digits"
    assert runs.find(Path("elsewhere"), str(tmp_path / "2026-a-digits")).id == "2026-a-digits"
    with pytest.raises(RunError, match="'2026' is short for 2 runs"):
        runs.find(tmp_path, "2026")
    for absent in ("x", "", "store"):
        with pytest.raises(RunError, match="no run"):
            runs.find(tmp_path, absent)
