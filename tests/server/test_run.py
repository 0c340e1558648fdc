"""Whole runs: what they leave, that they repeat, and that they go on where they stopped."""

from __future__ import annotations

import re

import numpy as np
import pytest
import safetensors.numpy
from runs import QUICK, configure, lines, play

from fedipfs.errors import BlockNotFound, ConfigError, RunError, RunFailed, UserError
from fedipfs.ipld import CID
from fedipfs.server import records, settings
from fedipfs.store import FolderStore, dag
from fedipfs.weights import Weights

KEYS = [
    "run_id",
    "experiment",
    "dataset",
    "strategy",
    "engine",
    "rounds_completed",
    "final_model_cid",
    "head_cid",
    "metrics",
    "seconds",
    "sgd_steps",
    "bytes",
    "peak_rss_mb",
    "privacy",
    "status",
]


def test_a_run_leaves_a_model_its_cid_and_a_record_back_to_the_start(tmp_path):
    summary = play(tmp_path, *QUICK, "run_id=one")
    folder = tmp_path / "one"
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "model.safetensors",
        "best.safetensors",
        "head",
        "log.txt",
    }
    assert [key for key in KEYS if key not in summary] == []
    assert summary["status"] == "finished"
    assert summary["rounds_completed"] == 2
    assert summary["metrics"]["accuracy"] > 0.5
    assert summary["sgd_steps"] == sum(line["sgd_steps"] for line in lines(folder)) > 0
    assert 0 < summary["bytes"]["flower_per_client_round"] < 2000
    assert summary["head_cid"] == (folder / "head").read_text().strip()

    store = FolderStore(tmp_path / "store")
    cid = CID.parse(summary["final_model_cid"])
    assert (folder / "model.safetensors").read_bytes() == b"".join(dag.cat(store, cid))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert tensors.keys() == Weights(store, cid).specs.keys()

    chain = list(records.chain(store, CID.parse(summary["head_cid"])))
    assert [record.get("round") for _, record in chain] == [2, 1, None]
    newest, oldest = chain[0][1], chain[-1][1]
    assert newest["model_out"] == cid
    assert newest["model_in"] == chain[1][1]["model_out"]
    assert chain[1][1]["model_in"] == oldest["model"]
    assert [update["client"] for update in newest["updates"]] == [f"client-{i}" for i in range(4)]
    for update in newest["updates"]:
        assert Weights(store, update["cid"]).specs == Weights(store, cid).specs
    config = dag.get_record(store, newest["config"])
    assert config["seed"] == 1
    assert config["dataset"] == "digits"
    assert "runs_dir" not in config


def test_what_a_round_record_says_can_be_recomputed(tmp_path):
    """An outsider with the head repeats the aggregation: same mean, same CID."""
    summary = play(tmp_path, *QUICK, "run_id=one")
    store = FolderStore(tmp_path / "store")
    record = dag.get_record(store, CID.parse(summary["head_cid"]))
    total = sum(update["examples"] for update in record["updates"])
    for name, after in Weights(store, record["model_out"]).tensors().items():
        mean = sum(
            Weights(store, update["cid"]).tensor(name).astype("f8") * update["examples"]
            for update in record["updates"]
        )
        np.testing.assert_array_equal((mean / total).astype(after.dtype), after)


def test_pins_keep_what_the_head_reaches_and_no_more(tmp_path):
    summary = play(tmp_path, *QUICK, "run_id=one", "keep.everything=true")
    store = FolderStore(tmp_path / "store")
    assert list(store.pins().values()) == [("one",)]
    store.gc(grace_s=0)
    assert store.verify().damaged == []
    head = CID.parse(summary["head_cid"])
    assert len(set(dag.walk(store, head))) == len(list(store))
    store.unpin(head, "one")
    store.gc(grace_s=0)
    with pytest.raises(BlockNotFound):
        store.get(head)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_the_same_configuration_gives_the_same_cids_whatever_the_workers(tmp_path, strategy):
    words = (*QUICK, f"strategy={strategy}")
    serial = play(tmp_path / "a", *words, "run_id=x")
    for workers in (1, 2, 4):
        here = tmp_path / f"w{workers}"
        summary = play(here, *words, f"engine.workers={workers}", serial=False)
        assert summary["final_model_cid"] == serial["final_model_cid"]
        assert summary["head_cid"] == serial["head_cid"]


def test_serial_and_local_agree_on_federated_evaluation_too(tmp_path):
    words = (*QUICK, "evaluate.federated=true", "clients.per_round=2")
    serial = play(tmp_path / "a", *words)
    local = play(tmp_path / "b", *words, "engine.workers=2", serial=False)
    assert serial["metrics"] == local["metrics"]
    assert serial["head_cid"] == local["head_cid"]


def test_equal_runs_do_not_give_up_each_others_records(tmp_path):
    one = play(tmp_path, *QUICK, "run_id=one")
    two = play(tmp_path, *QUICK, "run_id=two", "rounds=3")
    store = FolderStore(tmp_path / "store")
    store.unpin(CID.parse(two["head_cid"]), "two")
    store.gc(grace_s=0)
    assert len(list(records.chain(store, CID.parse(one["head_cid"])))) == 3
    play(tmp_path, *QUICK, "run_id=one", "rounds=3", resume=True)


def test_clients_keep_their_state_over_a_resume(tmp_path, monkeypatch):
    """A client that answers with the number of its calls; the record links what it keeps."""
    from flwr.app import ConfigRecord

    from fedipfs.clients import app as client

    real = client.Site.examples

    def examples(self, context):
        state = context.state.setdefault("seen", ConfigRecord({"calls": 0}))
        state["calls"] += 1
        seen.setdefault(context.node_config["partition-id"], []).append(state["calls"])
        return real(self, context)

    monkeypatch.setattr(client.Site, "examples", examples)
    seen: dict[int, list[int]] = {}
    play(tmp_path, *QUICK, "run_id=parts")
    parts = play(tmp_path, *QUICK, "run_id=parts", "rounds=4", resume=True)
    assert seen == {client: [1, 2, 3, 4] for client in range(4)}
    whole = play(tmp_path, *QUICK, "run_id=whole", "rounds=4")
    assert parts["head_cid"] == whole["head_cid"]


def test_another_seed_gives_another_model(tmp_path):
    one = play(tmp_path, *QUICK, "run_id=a")
    two = play(tmp_path, *QUICK, "run_id=b", "seed=2")
    assert one["final_model_cid"] != two["final_model_cid"]


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedyogi", "fedadagrad", "fedavgm"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, strategy):
    words = (*QUICK, f"strategy={strategy}", "clients.per_round=3")
    whole = play(tmp_path, *words, "rounds=4", "run_id=whole")
    play(tmp_path, *words, "rounds=2", "run_id=parts")
    resumed = play(tmp_path, *words, "rounds=4", "run_id=parts", resume=True)
    assert resumed["final_model_cid"] == whole["final_model_cid"]
    assert resumed["head_cid"] == whole["head_cid"]
    assert resumed["rounds_completed"] == 4
    assert [line["round"] for line in lines(tmp_path / "parts")] == [1, 2, 3, 4]


def test_a_finished_run_is_not_resumed_without_more_rounds(tmp_path):
    play(tmp_path, *QUICK, "run_id=one")
    before = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir() if p.suffix == ".json"}
    with pytest.raises(RunError, match="has finished its 2 rounds"):
        play(tmp_path, *QUICK, "run_id=one", resume=True)
    for name, content in before.items():
        assert (tmp_path / "one" / name).read_bytes() == content


def test_results_that_were_not_written_are_written_on_resume(tmp_path):
    done = play(tmp_path, *QUICK, "run_id=one")
    for name in ("summary.json", "model.safetensors", "report.html"):
        (tmp_path / "one" / name).unlink()
    again = play(tmp_path, *QUICK, "run_id=one", resume=True)
    assert again["final_model_cid"] == done["final_model_cid"]
    assert again["metrics"] == done["metrics"]
    assert (tmp_path / "one" / "model.safetensors").exists()


def test_federated_evaluation_uses_what_clients_hold_out(tmp_path):
    summary = play(tmp_path, *QUICK, "evaluate.federated=true", "evaluate.server=false")
    assert set(summary["metrics"]) == {"loss", "accuracy"}
    assert summary["metrics"]["accuracy"] > 0.3


def test_every_and_the_last_round_are_evaluated(tmp_path):
    play(tmp_path, *QUICK, "run_id=one", "rounds=5", "evaluate.every=2", "clients.total=2")
    measured = [line["round"] for line in lines(tmp_path / "one") if line["server"]]
    assert measured == [2, 4, 5]


def test_init_from_an_ensemble_begins_with_the_mean_of_its_members(tmp_path):
    words = (*QUICK, "strategy.start=common", "strategy.weighting=examples", "run_id=e")
    made = play(tmp_path, *words, "strategy=ensemble")
    average = play(tmp_path, *QUICK, "run_id=a")
    later = [
        play(tmp_path, *QUICK, f"run_id=from-{each['run_id']}", f"init_from={cid}")
        for each in (made, average)
        for cid in [each["final_model_cid"]]
    ]
    assert later[0]["final_model_cid"] == later[1]["final_model_cid"]
    mixed = ("strategy=ensemble", "strategy.architectures=[{hidden: 8}, {hidden: 16}]")
    made = play(tmp_path, *QUICK, *mixed, "run_id=mixed")
    with pytest.raises(ConfigError, match="members have no mean"):
        play(tmp_path, *QUICK, f"init_from={made['final_model_cid']}")


def test_init_from_a_cid_and_from_a_file_begin_with_that_model(tmp_path):
    first = play(tmp_path, *QUICK, "run_id=a")
    store = FolderStore(tmp_path / "store")
    for run_id, source in (
        ("b", first["final_model_cid"]),
        ("c", str(tmp_path / "a" / "model.safetensors")),
    ):
        later = play(tmp_path, *QUICK, f"run_id={run_id}", f"init_from={source}")
        *_, (_, genesis) = records.chain(store, CID.parse(later["head_cid"]))
        assert str(genesis["model"]) == first["final_model_cid"]
    for bad, reason in (
        ("nonsense", "neither a safetensors file nor the CID"),
        (_other_model(tmp_path), "does not fit the task"),
    ):
        with pytest.raises(ConfigError, match=reason):
            play(tmp_path, *QUICK, f"init_from={bad}")


def test_a_run_begun_from_a_file_is_resumed_without_it(tmp_path):
    play(tmp_path, *QUICK, "run_id=a")
    model = (tmp_path / "a" / "model.safetensors").rename(tmp_path / "start.safetensors")
    play(tmp_path, *QUICK, "run_id=b", f"init_from={model}")
    model.unlink()
    words = (*QUICK, "run_id=b", "rounds=3", f"init_from={model}")
    assert play(tmp_path, *words, resume=True)["rounds_completed"] == 3


def _other_model(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(2, "f4")}, path)
    return path


def test_too_few_successes_end_the_run_and_keep_the_rounds_before(tmp_path, monkeypatch):
    from fedipfs.clients import app as client

    real = client.train_model

    def broken(*args, server_round, **kwargs):
        if server_round == 2:
            raise RuntimeError("scanner on fire")
        return real(*args, server_round=server_round, **kwargs)

    monkeypatch.setattr(client, "train_model", broken)
    with pytest.raises(RunFailed, match=r"round 2: 0 usable updates.*client-0.*scanner on fire"):
        play(tmp_path, *QUICK, "run_id=one")
    from runs import summary

    left = summary(tmp_path / "one")
    assert left["status"] == "failed"
    assert left["rounds_completed"] == 1
    assert "scanner on fire" in left["error"]
    monkeypatch.undo()
    resumed = play(tmp_path, *QUICK, "run_id=one", resume=True)
    assert resumed["final_model_cid"] == play(tmp_path, *QUICK, "run_id=two")["final_model_cid"]


def test_a_failing_client_is_named_in_line_and_record(tmp_path, monkeypatch):
    from fedipfs.clients import app as client

    real = client.Site.examples

    def examples(self, context):
        if context.node_config["partition-id"] == 1:
            raise OSError("disk gone")
        return real(self, context)

    monkeypatch.setattr(client.Site, "examples", examples)
    summary = play(tmp_path, *QUICK, "run_id=one")
    assert summary["status"] == "finished"
    failed = lines(tmp_path / "one")[0]["clients"]["failed"]
    assert failed == [{"client": "client-1", "reason": "OSError: disk gone"}]
    store = FolderStore(tmp_path / "store")
    record = dag.get_record(store, CID.parse(summary["head_cid"]))
    assert record["failures"] == {"client-1": "OSError: disk gone"}
    assert len(record["updates"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rounds=0"], "rounds=0"),
        (["rounds=-3"], "rounds=-3"),
        (["rounds=many"], "rounds=many"),
        (["seed=-1"], "seed=-1"),
        (["clients.per_round=5"], "clients.per_round=5 is more than clients.total=4"),
        (["clients.min_successes=9"], "clients.min_successes=9 is more than"),
        (["data.partition=sorted"], "data.partition=sorted is not one of iid, dirichlet"),
        (["data.validation=1.5"], "data.validation=1.5"),
        (["train.batch_size=0"], "train.batch_size=0"),
        (["train.epochs=null"], "train.epochs=None"),
        (["train.device=tpu"], "train.device=tpu"),
        (["engine.workers=0"], "engine.workers=0"),
        (["engine.timeout_s=0"], "engine.timeout_s=0"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_made(tmp_path, words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings.check(configure(tmp_path, *QUICK, *words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run_id", ["store", "../up", "a b", ".hidden", ""])
def test_a_run_id_that_is_no_folder_name_is_refused(tmp_path, run_id):
    with pytest.raises(UserError, match=r"cannot name a folder|is not a text"):
        play(tmp_path, *QUICK, f"run_id='{run_id}'")


def test_a_run_folder_that_exists_is_not_touched(tmp_path):
    play(tmp_path, *QUICK, "run_id=one")
    before = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    with pytest.raises(RunError, match=r"exists; choose another run_id, or .*resume=one"):
        play(tmp_path, *QUICK, "run_id=one")
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == before


def test_a_run_can_be_worked_on_by_one_process_only(tmp_path):
    from fedipfs.server.folder import RunFolder

    play(tmp_path, *QUICK, "run_id=one")
    held = RunFolder.open(str(tmp_path), "one")
    with pytest.raises(RunError, match="another process works on the run one"):
        play(tmp_path, *QUICK, "run_id=one", "rounds=3", resume=True)
    held.close()


def test_a_run_resumed_with_another_configuration_is_refused(tmp_path):
    play(tmp_path, *QUICK, "run_id=one")
    with pytest.raises(RunError, match="another configuration"):
        play(tmp_path, *QUICK, "run_id=one", "rounds=3", "train.optimizer.lr=0.5", resume=True)


def test_not_a_number_is_null_in_records():
    assert records.plain({"a": [float("nan"), 1.5], "b": float("inf")}) == {
        "a": [None, 1.5],
        "b": None,
    }
