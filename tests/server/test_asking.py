"""Whole runs whose cohorts, deadlines and ends are not the plain ones."""

from __future__ import annotations

import numpy as np
import pytest
from runs import QUICK, lines, play

from fedipfs.errors import ConfigError, Diverged, RunError
from fedipfs.server.engine.clock import durations
from fedipfs.weights import Weights

CLOCK = (*QUICK, "clients.total=6", "clients.clock=simulated", "clients.spread=1.0")


def answered(folder):
    return [line["clients"] for line in lines(folder)]


def test_durations_are_drawn_once_for_each_node():
    of = durations(1.0, 7)
    assert of(3) == of(3) == durations(1.0, 7)(3) != durations(1.0, 8)(3)
    drawn = np.log([of(node) for node in range(4000)])
    assert abs(drawn.mean()) < 0.06 and abs(drawn.std() - 1) < 0.05
    assert durations(0.0, 7)(3) == 1.0


def test_the_first_k_of_n_count_and_the_slow_ones_are_no_failures(tmp_path):
    words = (*CLOCK, "clients.per_round=4", "clients.extra=2", "run_id=run")
    play(tmp_path, *words)
    for clients in answered(tmp_path / "run"):
        assert clients == {"selected": 6, "ok": 4, "failed": []}
    of = durations(1.0, 1)
    quick = sorted(range(2, 8), key=of)[:4]
    names = {f"client-{node - 2}" for node in quick}
    from fedipfs import FolderStore
    from fedipfs.ipld import CID
    from fedipfs.server import records

    head = CID.parse((tmp_path / "run" / "head").read_text().strip())
    for _, record in records.chain(FolderStore(tmp_path / "store"), head):
        if record["type"] == records.ROUND:
            assert {update["client"] for update in record["updates"]} == names


def test_a_deadline_names_those_that_were_too_slow(tmp_path):
    of = durations(1.0, 1)
    times = sorted(of(node) for node in range(2, 8))
    deadline = (times[3] + times[4]) / 2
    play(tmp_path, *CLOCK, f"clients.deadline_s={deadline}", "run_id=run")
    for clients in answered(tmp_path / "run"):
        assert clients["ok"] == 4 and len(clients["failed"]) == 2
        assert all("no answer within" in each["reason"] for each in clients["failed"])


def test_clients_that_are_always_late_rest(tmp_path):
    times = sorted(durations(1.0, 1)(node) for node in range(2, 8))
    words = (f"clients.deadline_s={(times[4] + times[5]) / 2}", "clients.exclude_after=2")
    play(tmp_path, *CLOCK, *words, "rounds=5", "clients.rest_rounds=2", "run_id=run")
    assert [clients["selected"] for clients in answered(tmp_path / "run")] == [6, 6, 5, 5, 6]


def test_over_selection_ends_a_real_round_early(tmp_path):
    words = (*QUICK, "clients.total=6", "clients.per_round=2", "clients.extra=4", "run_id=run")
    play(tmp_path, *words, "engine.workers=2", serial=False)
    for clients in answered(tmp_path / "run"):
        assert clients["selected"] == 6 and clients["ok"] == 2 and not clients["failed"]


def test_only_clients_that_offer_what_is_required_take_part(tmp_path):
    words = (*QUICK, "data.partition=dirichlet", "data.alpha=0.3", "clients.total=6")
    asks = ("'clients.requires={examples_min: 150}'"[1:-1], "run_id=run", "clients.min_successes=1")
    play(tmp_path, *words, *asks)
    from fedipfs import FolderStore
    from fedipfs.ipld import CID
    from fedipfs.server import records

    head = CID.parse((tmp_path / "run" / "head").read_text().strip())
    for _, record in records.chain(FolderStore(tmp_path / "store"), head):
        for update in record.get("updates", []):
            assert update["examples"] >= 150
    assert 0 < answered(tmp_path / "run")[0]["selected"] < 6


def test_patience_ends_a_run_which_is_then_finished(tmp_path):
    words = (*QUICK, "rounds=9", "stop.patience=2", "train.optimizer.lr=1e-9", "run_id=run")
    summary = play(tmp_path, *words)
    assert summary["rounds_completed"] == 3 and summary["status"] == "finished"
    assert "stop.patience" in summary["stopped"]
    with pytest.raises(RunError, match=r"has finished its 3 rounds: .*stop\.patience"):
        play(tmp_path, *words, resume=True)
    more = play(tmp_path, *words, "stop.patience=4", resume=True)
    assert more["rounds_completed"] == 5


def test_a_target_ends_a_run(tmp_path):
    summary = play(tmp_path, *QUICK, "rounds=30", "stop.target=0.9", "run_id=run")
    assert summary["metrics"]["accuracy"] >= 0.9 and 1 < summary["rounds_completed"] < 30


def test_wall_time_ends_a_run_after_a_round_that_was_evaluated(tmp_path):
    words = ("rounds=400", "evaluate.every=400", "stop.wall_s=3")
    summary = play(tmp_path, *QUICK, *words, "run_id=run")
    last = lines(tmp_path / "run")[-1]
    assert 0 < last["round"] < 400 and last["server"]["accuracy"] > 0
    assert summary["best_round"] == last["round"]


def test_a_run_that_diverges_goes_back_to_its_best_model(tmp_path):
    calm = ("rounds=2", "train.optimizer.lr=0.05")
    schedule = "train.schedule={name: StepLR, step_size: 2, gamma: 1e6}"
    with pytest.raises(Diverged, match=r"went back to the model of round [12],"):
        play(tmp_path, *QUICK, *calm, schedule, "rounds=6", "run_id=run")
    import json

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["best_round"] <= 2
    assert summary["final_model_cid"] == summary["best_model_cid"]
    best = lines(tmp_path / "run")[summary["best_round"] - 1]
    assert summary["metrics"] == best["server"] and best["server"]["accuracy"] > 0.3
    final, kept = (
        (tmp_path / "run" / name).read_bytes() for name in ("model.safetensors", "best.safetensors")
    )
    assert final == kept


def test_final_and_best_models_are_both_exported(tmp_path):
    from fedipfs import FolderStore
    from fedipfs.ipld import CID

    words = (*QUICK, "train.schedule={name: StepLR, step_size: 1, gamma: 8.0}", "rounds=4")
    summary = play(tmp_path, *words, "run_id=run", "stop.divergence=null")
    assert summary["best_model_cid"] != summary["final_model_cid"]
    store = FolderStore(tmp_path / "store")
    for name, key in (("model", "final_model_cid"), ("best", "best_model_cid")):
        stored = b"".join(Weights(store, CID.parse(summary[key])).file())
        assert (tmp_path / "run" / f"{name}.safetensors").read_bytes() == stored


@pytest.mark.parametrize("strategy", ["best_model", "ensemble", "fedbuff", "scaffold", "fedadam"])
def test_clipped_updates_go_through_whole_runs(tmp_path, strategy):
    words = (*QUICK, f"strategy={strategy}", "clients.clock=simulated", "run_id=run")
    play(tmp_path, *words, "+strategy.clip_update_norm=0.2")
    for line in lines(tmp_path / "run"):
        clipped = line["aggregation"]["clip_update_norm"]
        assert clipped["clipped"] and {each["client"] for each in clipped["updates"]}
        assert not line["clients"]["failed"]
        for each in line["aggregation"].get("ranking", []):
            assert each["score"] is not None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["strategy=fedsgd", "compression=int8"], "compression=int8 takes updates for changes"),
        (["strategy=fedsgd", "attack=alie"], "attack=alie is made of models"),
        (["strategy=best_model", "strategy.selector=server"], r"data\.held_out"),
        (["strategy=best_model", "data.validation=0"], r"data\.validation"),
        (["strategy=fedper"], r"strategy\.personal"),
        (["strategy=fedper", "strategy.personal=['nothing.*']"], "match"),
        (["strategy=fedper", "strategy.personal=['3.*']", "evaluate.server=true"], "whole only at"),
        (["strategy=fedbn"], "BatchNorm"),
        (["strategy=scaffold", "+train.optimizer.momentum=0.9"], "momentum"),
        (["strategy=krum", "strategy.num_malicious_nodes=3"], "clients a round"),
        (["strategy=ensemble", "strategy.distill={steps: 5}"], r"held_out"),
        (["evaluate.federated=true", "data.validation=0"], r"set data\.validation=0\.1"),
        (["data.held_out=0.001"], "leaves nothing on one side"),
        (["compression=topk", "compression.fraction=1.5"], "fraction"),
        (["compression=topk", "+compression.down=true"], "down"),
        (["clients.per_round=1.5"], "neither a whole number nor a share"),
        (["clients.per_round=3", "clients.extra=9"], r"clients\.extra=9 asks for more clients"),
        (["clients.requires={gpu_min: many}"], "should be a number"),
        (["stop.patience=0"], r"stop\.patience=0"),
        (["stop.divergence=0.5"], r"stop\.divergence=0\.5"),
        (["task.direction=up"], r"task\.direction=up is not one of max, min"),
        (["attack=gaussian", "attack.fraction=2"], r"attack\.fraction=2"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_written(tmp_path, words, says):
    with pytest.raises(ConfigError, match=says):
        play(tmp_path, *QUICK, *words, "run_id=run")
    assert not (tmp_path / "run").exists()


def test_attackers_are_judged_by_what_they_send(tmp_path):
    """Evaluators are given the poisoned update, so it loses."""
    words = (*QUICK, "clients.total=8", "attack=gaussian", "attack.fraction=0.4", "run_id=run")
    summary = play(tmp_path, *words, "strategy=best_model", "train.epochs=2")
    from fedipfs.server.attack import malicious

    bad = {f"client-{part}" for part in malicious({"name": "x", "fraction": 0.4, "seed": 1}, 8)}
    for line in lines(tmp_path / "run"):
        ranking = [each["client"] for each in line["aggregation"]["ranking"]]
        assert set(ranking[-3:]) == bad
    assert summary["metrics"]["accuracy"] > 0.5
