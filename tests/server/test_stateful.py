"""Clients that remember things: what counts is what was taken note of, whoever was faster."""

from __future__ import annotations

import json

import pytest
from runs import QUICK, lines, play

from fedipfs import FolderStore
from fedipfs.errors import Diverged
from fedipfs.exchange import signed_bytes
from fedipfs.ipld import CID, dagcbor
from fedipfs.server import records

RUN = (*QUICK, "clients.total=8", "clients.clock=simulated", "clients.spread=1.0", "rounds=4")
CASES = {
    "over-selection": ["compression=topk", "clients.per_round=3", "clients.extra=3"],
    "deadline": ["strategy=scaffold", "clients.deadline_s=1.2", "clients.exclude_after=null"],
    "asynchronous": ["strategy=fedbuff", "strategy.buffer_size=3", "compression=topk"],
    "cross evaluation": ["strategy=best_model", "compression=topk", "compression.fraction=0.2"],
}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_workers_and_any_break_give_the_same_records(tmp_path, case):
    words = (*RUN, *CASES[case], "clients.min_successes=1", "run_id=run")
    serial = play(tmp_path / "serial", *words)
    four = play(tmp_path / "four", *words, "engine.workers=4", serial=False)
    assert four["head_cid"] == serial["head_cid"]
    play(tmp_path / "parts", *words, "rounds=2", "engine.workers=3", serial=False)
    rest = play(tmp_path / "parts", *words, resume=True)
    assert rest["head_cid"] == serial["head_cid"]


def rounds(folder):
    from fedipfs.exchange import Vault
    from fedipfs.trust import Identity
    from fedipfs.trust.party import Party

    keys = folder / "run" / "keys"
    party = Party(Identity.load(keys / "coordinator.key"), "coordinator", keys / "trust.toml")
    head = CID.parse((folder / "run" / "head").read_text().strip())
    vault = Vault(FolderStore(folder / "store"), party, "updates")
    return [each for _, each in records.chain(vault, head) if each["type"] == records.ROUND]


def test_what_is_recorded_as_signed_is_the_update_also_after_cross_evaluation(tmp_path):
    play(tmp_path, *QUICK, "strategy=best_model", "seal=updates", "run_id=run")
    for record in rounds(tmp_path):
        assert record["updates"]
        for update in record["updates"]:
            said = dagcbor.decode(update["signed"])["fedipfs"]
            assert said["cid:arrays"] == str(update["cid"]) and said["to"].startswith("train ")


CLIENTS = ("evaluate.server=false", "evaluate.federated=true", "clients.total=6")


def test_one_client_that_lies_in_evaluations_neither_ends_the_run_nor_picks_the_best(
    tmp_path, monkeypatch
):
    """client-0 reports an exploded loss and perfect accuracy on any number of examples."""
    from fedipfs import tasks
    from fedipfs.clients import app

    honest = tasks.evaluate
    calls = []

    def lie(*arguments, **options):
        measured = honest(*arguments, **options)
        if len(arguments[3]) < 1000:  # at a client, not at the server
            calls.append(1)
            if len(calls) % 6 == 1:
                return {**measured, "loss": 1e12, "accuracy": 1.0}
        return measured

    monkeypatch.setattr(app.tasks, "evaluate", lie)
    words = (*QUICK, *CLIENTS, "rounds=3", "stop.target=0.999", "run_id=run")
    summary = play(tmp_path, *words)
    assert summary["status"] == "finished" and summary["stopped"] is None and len(calls) == 18
    for line in lines(tmp_path / "run"):
        assert line["evaluate"]["loss"] > 1e9 > line["median"]["loss"]


def test_an_evaluation_that_is_not_finite_is_that_clients_failure(tmp_path, monkeypatch):
    from fedipfs import tasks
    from fedipfs.clients import app

    honest = tasks.evaluate
    calls = []

    def lie(*arguments, **options):
        calls.append(1)
        measured = honest(*arguments, **options)
        return {**measured, "loss": float("nan")} if len(calls) == 2 else measured

    monkeypatch.setattr(app.tasks, "evaluate", lie)
    play(tmp_path, *QUICK, *CLIENTS, "run_id=run")
    first = lines(tmp_path / "run")[0]
    assert [each["reason"] for each in first["clients"]["failed"]] == [
        "evaluate: its loss is nan, not finite"
    ]
    assert first["evaluate"]["loss"] > 0


def test_the_best_is_judged_on_one_scale(tmp_path):
    """The server measures every other round; what clients say of those between has no weight."""
    words = (*QUICK, "evaluate.federated=true", "evaluate.every=2", "rounds=3", "run_id=run")
    summary = play(tmp_path, *words)
    measured = {line["round"]: line["server"] for line in lines(tmp_path / "run")}
    assert [number for number, found in measured.items() if found] == [2, 3]
    assert summary["best_round"] in (2, 3)


def test_a_diverged_run_that_was_killed_before_its_results_gets_them_on_resume(tmp_path):
    schedule = "train.schedule={name: StepLR, step_size: 2, gamma: 1e6}"
    words = (*QUICK, "rounds=6", schedule, "run_id=run")
    with pytest.raises(Diverged):
        play(tmp_path, *words)
    folder = tmp_path / "run"
    before = json.loads((folder / "summary.json").read_text())
    for name in ("summary.json", "model.safetensors", "best.safetensors"):
        (folder / name).unlink()
    with pytest.raises(Diverged, match="went back to the model of round"):
        play(tmp_path, *words, resume=True)
    after = json.loads((folder / "summary.json").read_text())
    assert after["final_model_cid"] == before["final_model_cid"] and after["status"] == "failed"
    assert (folder / "model.safetensors").read_bytes() == (folder / "best.safetensors").read_bytes()


def test_a_deadline_is_for_training_not_for_what_clients_announce(tmp_path):
    words = ("clients.clock=simulated", "clients.spread=0.001", "clients.deadline_s=1.1")
    asks = ("clients.requires={examples_min: 1}", "clients.min_successes=1", "run_id=run")
    summary = play(tmp_path, *QUICK, *words, *asks, "engine.workers=2", serial=False)
    assert summary["rounds_completed"] == 2


def test_who_rests_is_left_alone_by_an_asynchronous_strategy_too(tmp_path):
    words = ("clients.total=6", "strategy=fedbuff", "strategy.buffer_size=2", "rounds=8")
    rest = ("clients.deadline_s=1.5", "clients.exclude_after=1", "clients.rest_rounds=50")
    clock = ("clients.clock=simulated", "clients.spread=1.0", "clients.min_successes=1")
    play(tmp_path, *QUICK, *words, *rest, *clock, "run_id=run")
    failures = [
        each["client"] for line in lines(tmp_path / "run") for each in line["clients"]["failed"]
    ]
    assert failures and len(failures) == len(set(failures))


def test_signed_bytes_name_what_they_cover():
    """The helper that the tests above decode is the one that messages are signed with."""
    from flwr.app import ConfigRecord, RecordDict

    content = RecordDict({"fedipfs": ConfigRecord({"to": "train 2", "signature": b"x"})})
    assert dagcbor.decode(signed_bytes(content)) == {"fedipfs": {"to": "train 2"}}
