"""The closing summary and its formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedipfs.observe import summary

DONE = {
    "run_id": "r1",
    "experiment": "mnist",
    "dataset": "digits",
    "rounds_completed": 5,
    "final_model_cid": "bafymodel",
    "head_cid": "bafyhead",
    "metrics": {"loss": 0.0412, "accuracy": 0.98713},
    "seconds": {"total": 41.23},
    "bytes": {"flower_per_client_round": 1834, "store_put": 92_500_000, "store_get": 105_000_000},
    "status": "finished",
}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1834, "1.8 kB"), (999_600, "1.0 MB"), (44e6, "44.0 MB"),
     (512e6, "512 MB"), (7.2e15, "7200 TB"), (None, "-")],
)  # fmt: skip
def test_size(count: float | None, text: str) -> None:
    assert summary.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0034, "0.003 s"), (41.23, "41.2 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s"),
     (7440, "2 h 04 min"), (float("inf"), "-"), (None, "-")],
)  # fmt: skip
def test_duration(seconds: float | None, text: str) -> None:
    assert summary.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.98713, "0.9871"), (0, "0.0000"), (3.1e-6, "3.100e-06"), (2.5e7, "2.500e+07"),
     (float("nan"), "nan"), (None, "-")],
)  # fmt: skip
def test_metric(value: float | None, text: str) -> None:
    assert summary.metric(value) == text


def test_the_closing_text_names_what_a_user_needs() -> None:
    text = summary.closing(DONE, Path("runs/r1"), "runs/store")
    assert text.splitlines() == [
        "Finished: mnist (dataset digits), 5 rounds in 41.2 s",
        "  metrics  accuracy 0.9871  loss 0.0412",
        "  model    bafymodel",
        "  record   bafyhead",
        "  Flower   1.8 kB per client and round",
        "  store    92.5 MB in, 105 MB out",
        "  folder   runs/r1/",
        "",
        "Look further:",
        "  fedipfs store cat bafymodel > model.safetensors",
        "  fedipfs runs show r1",
    ]


def test_an_ensemble_is_no_file_and_the_best_is_named_where_it_is_not_the_last() -> None:
    record = "bafyreie7assv2jn2nyt74d4uzqpu2zbbzjmashqdupoiw5wodlj22d5fba"
    text = summary.closing({**DONE, "final_model_cid": record}, Path("runs/r1"))
    assert f"store cat {record}\n" in text and "> model.safetensors" not in text
    text = summary.closing({**DONE, "best_model_cid": "bafybest", "best_round": 3}, Path("runs/r1"))
    assert "bafybest of round 3" in text
    assert "of round" not in summary.closing({**DONE, "best_model_cid": "bafymodel"}, Path("r"))


def test_the_commands_name_folders_that_are_not_the_default() -> None:
    text = summary.closing(DONE, Path("/data/my runs/r1"), "/data/blocks")
    assert "fedipfs store cat --store /data/blocks bafymodel" in text
    assert "fedipfs runs show --runs-dir '/data/my runs' r1" in text


def test_the_commands_are_called_as_the_user_can() -> None:
    text = summary.closing(DONE, Path("runs/r1"), program=".venv/bin/fedipfs")
    assert "  .venv/bin/fedipfs runs show r1" in text.splitlines()


def test_a_run_that_failed_at_once_has_a_closing_text_too() -> None:
    text = summary.closing({"status": "failed", "experiment": "mnist"}, Path("runs/r1"))
    assert text.startswith("Failed: mnist, 0 rounds\n")
    assert "store cat" not in text


def test_json_holds_what_json_cannot(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    values = {"nan": float("nan"), "inf": [np.float32("inf")], "n": np.int64(3), "path": Path("x")}
    summary.write_json(path, {**values, "ok": True, "loss": np.float32(0.5), 1: None})
    assert json.loads(path.read_text()) == {
        "nan": None, "inf": [None], "n": 3, "path": "x", "ok": True, "loss": 0.5, "1": None,
    }  # fmt: skip


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary.write_json(path, {"a": 1})
    path.chmod(0o444)
    summary.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    with pytest.raises(OSError, match="absent"):
        summary.write_json(tmp_path / "absent" / "summary.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_columns_line_up() -> None:
    assert summary.align([("a", "b"), ("long", "")]) == ["a     b", "long"]
    assert summary.align([]) == []


def test_what_a_run_with_partners_sealed_its_coordinator_opens(monkeypatch):
    done = {"engine": "deploy", "seal": "all", "final_model_cid": "bafy", "experiment": "mnist"}
    monkeypatch.delenv("FEDIPFS_HOME", raising=False)
    assert "--identity ~/.fedipfs/identity.key bafy" in summary.closing(done, Path("runs/one"))
    monkeypatch.setenv("FEDIPFS_HOME", "/home/fl/a b")
    assert "--identity '/home/fl/a b/identity.key' bafy" in summary.closing(done, Path("runs/one"))
