"""Whole runs under secure aggregation: the sums of plain ones, whoever drops out, and no more."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import signal
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import yaml
from flwr.app import ArrayRecord
from parties import blocks
from runs import QUICK, command, configure, lines, play, start

from fedipfs.errors import (
    ConfigError,
    Diverged,
    FedIPFSError,
    NotRecipient,
    RunFailed,
    RunInterrupted,
    SecAggFailed,
    SignatureWrong,
)
from fedipfs.exchange import Vault, unframe
from fedipfs.exchange.stages import get_message, lasting
from fedipfs.flower_compat import message_from_bytes
from fedipfs.ipld import CID, DAG_CBOR, dagcbor
from fedipfs.observe.progress import Progress
from fedipfs.secagg import Record, Session, decode
from fedipfs.server import parties, records, settings, simulation
from fedipfs.server.engine.pool import warm_up
from fedipfs.server.run import run
from fedipfs.store import FolderStore, dag
from fedipfs.trust import Identity, is_sealed
from fedipfs.trust.party import Party

SIX = (*QUICK, "clients.total=6", "clients.exclude_after=null")  # threshold 5
SEVEN = (*QUICK, "clients.total=7", "clients.exclude_after=null")  # 5 of 7: two may drop out
NAMES = [f"client-{number}" for number in range(7)]
STAGES = ["advertise", "share", "masked", "confirm", "unmask"]


@pytest.fixture
def stubborn(monkeypatch):
    """Gives clients faults, by partition: see support/stubborn_app.py."""

    def give(faults: dict[int, str]) -> None:
        def node_config(attack, partition, clients):
            return {"faults": faults.get(partition, "")}

        monkeypatch.setattr(simulation, "CLIENT_APP", "stubborn_app:app")
        monkeypatch.setattr(simulation, "node_config", node_config)

    return give


def tensors(runs_dir, cid: str | CID, vault: Vault | None = None) -> dict[str, np.ndarray]:
    cid = CID.parse(cid) if isinstance(cid, str) else cid
    where = vault or Vault(FolderStore(runs_dir / "store"))
    return where.weights(cid).tensors()


def models(runs_dir, run_id: str = "one") -> list[dict[str, np.ndarray]]:
    """The model after each round."""
    return [tensors(runs_dir, line["model_cid"]) for line in lines(runs_dir / run_id)]


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of any value."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def chain(runs_dir, run_id: str = "one") -> tuple[Vault, list[dict]]:
    """A run's vault, as its coordinator reads it, and its rounds, the first one first."""
    seal = yaml.safe_load((runs_dir / run_id / "config.yaml").read_text())["seal"]
    vault = Vault(FolderStore(runs_dir / "store"), parties.reader(runs_dir / run_id), seal)
    head = CID.parse((runs_dir / run_id / "head").read_text().strip())
    found = [each for _, each in records.chain(vault, head) if each["type"] == records.ROUND]
    return vault, found[::-1]


def record_of(vault: Vault, record: dict) -> Record:
    return Record.from_bytes(get_message(vault, str(record["aggregation"]["secagg"]["record"])))


def audited(vault: Vault, record: dict) -> np.ndarray:
    """The sum of a round, recomputed from the masked vectors."""
    return record_of(vault, record).audit(
        vault.party.verify, lambda name: vault.weights(CID.parse(name)).tensor("masked")
    )


# ---- the same result


STRATEGIES = {
    "fedavg": (),
    "average": (),
    "fedprox": ("strategy.proximal_mu=0.1",),
    "fedsgd": (),
    "fedadam": (),
    "fedyogi": (),
    "fedadagrad": (),
    "fedavgm": (),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_makes_of_the_sum_what_it_makes_of_the_updates(tmp_path, strategy):
    """Clients have unlike amounts of unlike data; a gradient's values may be beyond 1."""
    words = (*QUICK, f"strategy={strategy}", *STRATEGIES[strategy], "run_id=one")
    words += ("data.partition=dirichlet", "data.alpha=0.3")
    plain = play(tmp_path / "plain", *words)
    clip = ("secagg.clip=4",) if strategy == "fedsgd" else ()
    masked = play(tmp_path / "masked", *words, "secagg=on", *clip)
    one, other = models(tmp_path / "plain"), models(tmp_path / "masked")
    adaptive = strategy in ("fedadam", "fedyogi", "fedadagrad")  # divide by small second moments
    assert distance(one[0], other[0]) < (1e-3 if adaptive else 1e-5)
    assert abs(masked["metrics"]["accuracy"] - plain["metrics"]["accuracy"]) <= 0.002
    assert masked["sgd_steps"] == plain["sgd_steps"]
    assert masked["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], abs=1e-3)
    before, after = (lines(tmp_path / name / "one") for name in ("plain", "masked"))
    assert [line["clients"] for line in after] == [line["clients"] for line in before]
    assert [line["train"].keys() for line in after] == [line["train"].keys() for line in before]
    if strategy not in ("average", "fedsgd"):  # there all count the same; a gradient has no loss
        loss = before[0]["train"]["train_loss"]
        assert after[0]["train"]["train_loss"] == pytest.approx(loss, abs=1e-8)


def test_a_clients_weight_ends_where_the_setting_says(tmp_path):
    """With secagg.examples=100 whoever has more counts as 100, so here all count the same."""
    words = (*QUICK, "data.partition=dirichlet", "data.alpha=0.3", "rounds=1", "run_id=one")
    masked = play(tmp_path / "masked", *words, "secagg=on", "secagg.examples=50")
    average = play(tmp_path / "average", *words, "strategy=average")
    fedavg = play(tmp_path / "fedavg", *words)
    (one,), (other,) = models(tmp_path / "masked"), models(tmp_path / "average")
    assert distance(one, other) < 1e-5
    assert distance(one, models(tmp_path / "fedavg")[0]) > 1e-3
    assert masked["status"] == average["status"] == fedavg["status"] == "finished"


def test_batch_normalisation_travels_too(tmp_path):
    words = (*QUICK, "+task.options.norm=true", "train.batch_size=16", "rounds=1", "run_id=one")
    play(tmp_path / "plain", *words)
    play(tmp_path / "masked", *words, "secagg=on", "secagg.clip=8")
    (plain,), (masked,) = models(tmp_path / "plain"), models(tmp_path / "masked")
    floats = {name for name, values in plain.items() if values.dtype.kind == "f"}
    assert any("running_var" in name for name in floats)
    pick = [{name: model[name] for name in floats} for model in (plain, masked)]
    assert distance(*pick) < 8e-5  # the clip is 8 times as large, and so are the steps


def test_as_many_workers_as_you_like_give_the_same_sum(tmp_path):
    words = (*QUICK, "rounds=1", "secagg=on", "run_id=one")
    play(tmp_path / "serial", *words)
    play(tmp_path / "two", *words, "engine.workers=2", serial=False)
    assert distance(*(models(tmp_path / name)[0] for name in ("serial", "two"))) < 1e-5


# ---- who drops out


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The model after a plain round of SEVEN without some clients."""
    known: dict[tuple[int, ...], dict[str, np.ndarray]] = {}

    def get(gone: tuple[int, ...]) -> dict[str, np.ndarray]:
        if gone not in known:
            folder = tmp_path_factory.mktemp("without")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(simulation, "CLIENT_APP", "stubborn_app:app")
                patch.setattr(
                    simulation,
                    "node_config",
                    lambda attack, partition, clients: {
                        "faults": "*/train/raise" if partition in gone else ""
                    },
                )
                play(folder, *SEVEN, "rounds=1", "run_id=one")
            known[gone] = models(folder)[0]
        return known[gone]

    return get


@pytest.mark.parametrize("stage", STAGES)
def test_as_many_as_may_drop_out_at_any_stage(tmp_path, stubborn, without, stage):
    stubborn({1: f"*/{stage}/raise", 4: f"*/{stage}/raise"})
    play(tmp_path, *SEVEN, "rounds=1", "secagg=on", "run_id=one")
    gone = (1, 4) if stage in STAGES[:3] else ()  # a vector that came is in the sum
    (line,) = lines(tmp_path / "one")
    failed = [{"client": f"client-{each}", "reason": "OSError: disk gone"} for each in gone]
    assert line["clients"] == {"selected": 7, "ok": 7 - len(gone), "failed": failed}
    assert distance(models(tmp_path)[0], without(gone)) < 1e-5
    vault, (record,) = chain(tmp_path)
    assert [each.by for each in record_of(vault, record).survivors] == [
        name for number, name in enumerate(NAMES) if number not in gone
    ]
    assert [each["client"] for each in record["updates"]] == [
        name for number, name in enumerate(NAMES) if number not in gone
    ]
    absent = {} if gone else dict.fromkeys(("client-1", "client-4"), "OSError: disk gone")
    assert record["aggregation"]["secagg"].get("absent", {}) == absent


def test_they_may_drop_out_one_by_one(tmp_path, stubborn, without):
    stubborn({0: "*/share/raise", 6: "*/masked/raise"})
    play(tmp_path, *SEVEN, "rounds=1", "secagg=on", "run_id=one")
    assert distance(models(tmp_path)[0], without((0, 6))) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_one_more_ends_the_round_and_nothing_is_unmasked(tmp_path, stubborn, stage):
    gone = (1, 4, 5)
    stubborn({each: f"2/{stage}/raise" for each in gone})
    with pytest.raises(RunFailed, match=r"round 2: secure aggregation: .*needed") as caught:
        play(tmp_path, *SEVEN, "secagg=on", "run_id=one")
    assert caught.value.exit_code == 3
    assert "nothing was unmasked" in str(caught.value)
    assert "client-1: OSError: disk gone" in str(caught.value) and "\n" not in str(caught.value)
    assert [line["round"] for line in lines(tmp_path / "one")] == [1]
    sums = [
        cid
        for cid, block in blocks(FolderStore(tmp_path / "store")).items()
        if b'{"sum":{"dtype":"U32"' in block
    ]
    assert len(sums) == 1  # of the round before
    if stage != "unmask":  # no client gave a share
        answered = [path.parent.name for path in (tmp_path / "one" / "secagg").rglob("unmask")]
        assert "2.0" not in answered


@pytest.mark.slow
def test_silence_is_the_same_as_a_failure(tmp_path, stubborn, without):
    """A client that hangs is given up; the process it had to itself is replaced."""
    warm_up(["fedipfs.clients.preload", "stubborn_app"])  # 12 s are not for importing
    stubborn({3: "*/masked/silent", 5: "*/share/exit"})
    words = ("rounds=1", "secagg=on", "engine.workers=3", "engine.timeout_s=12", "run_id=one")
    play(tmp_path, *SEVEN, *words, serial=False)
    (line,) = lines(tmp_path / "one")
    reasons = {each["client"]: each["reason"] for each in line["clients"]["failed"]}
    assert reasons == {
        "client-3": "no answer within engine.timeout_s=12",
        "client-5": "its process ended with exit code 7",
    }
    assert distance(models(tmp_path)[0], without((3, 5))) < 1e-5


def test_a_deadline_is_for_training_under_masks_too(tmp_path):
    from fedipfs.server.engine.clock import durations

    times = sorted((durations(1.0, 1)(node), node) for node in range(2, 9))
    words = (*SEVEN, "clients.clock=simulated", "clients.spread=1.0", "clients.exclude_after=null")
    deadline = (times[4][0] + times[5][0]) / 2
    play(tmp_path, *words, "secagg=on", f"clients.deadline_s={deadline}", "run_id=one")
    for line in lines(tmp_path / "one"):
        late = {each["client"]: each["reason"] for each in line["clients"]["failed"]}
        assert late.keys() == {f"client-{node - 2}" for _, node in times[5:]}
        assert all("no answer within" in reason for reason in late.values())
    too_short = (times[3][0] + times[4][0]) / 2
    with pytest.raises(RunFailed, match=r"4 clients sent vectors.*5 are needed"):
        play(tmp_path, *words, "secagg=on", f"clients.deadline_s={too_short}", "run_id=two")


def dropping(rounds: int, clients: int, gone: int, stage: str) -> dict[int, str]:
    """Faults with which other `gone` clients drop out in every round."""
    rng = np.random.default_rng(3)
    faults: dict[int, list[str]] = {each: [] for each in range(clients)}
    for number in range(1, rounds + 1):
        for each in rng.choice(clients, gone, replace=False):
            faults[int(each)].append(f"{number}/{stage}/raise")
    return {each: " ".join(words) for each, words in faults.items()}


TEN = ("+experiment=digits", "clients.exclude_after=null", "run_id=one")


def test_with_30_percent_dropping_out_the_model_is_as_good_as_without_masks(tmp_path, stubborn):
    """Ten clients, of whom three others drop out in each of five rounds: not one more could."""
    results = {}
    for name, stage, words in (("plain", "train", ()), ("masked", "masked", ("secagg=on",))):
        stubborn(dropping(5, 10, 3, stage))
        results[name] = play(tmp_path / name, *TEN, *words)
        assert [line["clients"]["ok"] for line in lines(tmp_path / name / "one")] == [7] * 5
    plain, masked = (results[name]["metrics"]["accuracy"] for name in ("plain", "masked"))
    assert abs(plain - masked) <= 0.002 and masked > 0.9
    assert distance(models(tmp_path / "plain")[0], models(tmp_path / "masked")[0]) < 1e-5


@pytest.mark.mnist
@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("FEDIPFS_DATA"), reason="set FEDIPFS_DATA to a folder with MNIST to run this"
)
def test_the_same_with_mnist(tmp_path, stubborn):
    words = ("+experiment=mnist", "rounds=3", "clients.exclude_after=null", "data.fallback=error")
    results = {}
    for name, stage, more in (("plain", "train", ()), ("masked", "masked", ("secagg=on",))):
        stubborn(dropping(3, 10, 3, stage))
        results[name] = play(
            tmp_path / name, *words, *more, "engine.workers=2", "run_id=one", serial=False
        )
    plain, masked = (results[name]["metrics"]["accuracy"] for name in ("plain", "masked"))
    assert abs(plain - masked) <= 0.002 and masked > 0.95


def test_fewer_survivors_than_min_successes_are_not_unmasked(tmp_path, stubborn):
    stubborn({1: "*/masked/raise", 4: "*/masked/raise"})
    with pytest.raises(RunFailed, match=r"5 clients sent vectors, clients.min_successes is 6"):
        play(tmp_path, *SEVEN, "secagg=on", "clients.min_successes=6", "run_id=one")
    assert not list((tmp_path / "one" / "secagg").rglob("confirm"))


def test_who_rests_is_asked_all_the_same_where_fewer_than_three_would_be_left(tmp_path, stubborn):
    stubborn({2: "*/masked/raise"})
    words = ("clients.exclude_after=1", "clients.total=3", "clients.min_successes=1", "rounds=3")
    play(tmp_path, *QUICK, *words, "secagg=on", "secagg.threshold=2", "run_id=one")
    found = [line["clients"] for line in lines(tmp_path / "one")]
    assert [(each["selected"], each["ok"]) for each in found] == [(3, 2)] * 3


def test_a_cohort_that_has_shrunk_is_asked_on_terms_of_its_own(tmp_path, stubborn):
    stubborn({3: "1/masked/raise"})
    words = ("clients.exclude_after=1", "clients.total=4", "rounds=2", "secagg=on", "run_id=one")
    play(tmp_path, *QUICK, *words)
    vault, found = chain(tmp_path)
    sessions = [Session.from_bytes(record_of(vault, record).session) for record in found]
    assert [each.parameters.clients for each in sessions] == [4, 3]


# ---- lies


LIES = {
    "masked": {
        "forge": "SignatureWrong",
        "earlier": "BadMessage: expected a message of the kind Masked",
        "nothing": "BadUpdate: its answer names no message",
        "number": "BadMessage: a message of secure aggregation is named by its CID",
        "garbage": "CidError",
        "missing": "BlockNotFound",
        "short": "BadUpdate: .* is not a masked vector of",
        "floats": "BadUpdate: .* is not a masked vector of",
        "huge": "WeightsError: .* declares 4000080 bytes",
        "copied": "WrongVector: client-2 names a vector that is another's",
        "others": "BadUpdate: client-2 hands in what 'client-1' has said",
        "replay": "SignatureWrong: the message of 'client-2' was made for another run, round or",
    },
    "advertise": {"forge": "SignatureWrong", "nothing": "BadUpdate"},
    "share": {
        "earlier": "BadMessage: expected a message of the kind Share",
        "replay": "SignatureWrong: the message of 'client-2' was made for another run, round or",
    },
}


@pytest.mark.parametrize(
    ("stage", "fault", "reason"),
    [(stage, fault, reason) for stage, each in LIES.items() for fault, reason in each.items()],
)
def test_who_lies_is_left_out_by_name_and_the_others_sum_is_exact(
    tmp_path, stubborn, stage, fault, reason
):
    stubborn({2: f"*/{stage}/{fault}"})
    play(tmp_path, *SIX, "rounds=1", "secagg=on", "run_id=one")
    (line,) = lines(tmp_path / "one")
    (failed,) = line["clients"]["failed"]
    assert failed["client"] == "client-2"
    assert re.match(reason, failed["reason"]), failed["reason"]
    vault, (record,) = chain(tmp_path)
    assert [each.by for each in record_of(vault, record).survivors] == [
        name for name in NAMES[:6] if name != "client-2"
    ]
    expected = vault.weights(record["aggregation"]["secagg"]["sum"]).tensor("sum")
    np.testing.assert_array_equal(audited(vault, record), expected)


def test_a_vector_that_is_not_sealed_where_it_must_be_is_refused(tmp_path, stubborn):
    stubborn({2: "*/masked/unsealed"})
    play(tmp_path, *SIX, "rounds=1", "secagg=on", "seal=updates", "run_id=one")
    (failed,) = lines(tmp_path / "one")[0]["clients"]["failed"]
    assert failed["client"] == "client-2" and failed["reason"].startswith("NotSealed: ")


def test_a_vector_that_the_store_has_changed_is_refused(tmp_path, monkeypatch):
    """The store hands out other bytes under the CID that client-2 has signed."""
    from fedipfs.server import secure

    honest = secure._Round._vector

    def vector(self, said):
        if said.by == "client-2":
            store = self._vault.store
            leaf = max(dag.walk(store, CID.parse(said.vector)), key=lambda cid: len(store.get(cid)))
            (path,) = store.path.glob(f"blocks/*/{leaf.to_v1()}")
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        return honest(self, said)

    monkeypatch.setattr(secure._Round, "_vector", vector)
    play(tmp_path, *SIX, "rounds=1", "secagg=on", "run_id=one")
    (failed,) = lines(tmp_path / "one")[0]["clients"]["failed"]
    assert failed["client"] == "client-2" and failed["reason"].startswith("BlockCorrupt: ")


def test_a_client_whose_training_diverged_is_left_out(tmp_path, monkeypatch):
    from fedipfs.clients import app as client

    honest = client.train_model
    calls = []

    def train_model(task, model, *args, **kwargs):
        metrics = honest(task, model, *args, **kwargs)
        calls.append(1)
        bad = {2: "weights", 4: "loss"}.get(len(calls))
        if bad == "weights":
            next(iter(model.parameters())).data[0, 0] = float("nan")
        return {**metrics, "train_loss": float("inf")} if bad == "loss" else metrics

    monkeypatch.setattr(client, "train_model", train_model)
    play(tmp_path, *SEVEN, "rounds=1", "secagg=on", "run_id=one")
    failed = {e["client"]: e["reason"] for e in lines(tmp_path / "one")[0]["clients"]["failed"]}
    assert failed == {
        "client-1": "BadUpdate: the update has values that are not finite: training diverged",
        "client-3": "BadUpdate: its train_loss is inf, not finite, and a sum needs a number",
    }


def test_where_most_diverge_the_run_goes_back_to_its_best_model(tmp_path):
    schedule = "train.schedule={name: StepLR, step_size: 2, gamma: 1e38}"
    with pytest.raises(Diverged, match=r"not finite.*went back to the model of round"):
        play(tmp_path, *QUICK, "secagg=on", "rounds=4", schedule, "run_id=one")


# ---- what is kept, and for whom


def test_an_auditor_recomputes_the_sum_and_the_model_from_the_masked_vectors(tmp_path):
    play(tmp_path, *SIX, "secagg=on", "keep.everything=true", "run_id=one")
    FolderStore(tmp_path / "store").gc(0)  # what records lead to is enough
    vault, found = chain(tmp_path)
    assert len(found) == 2
    for record in found:
        total = audited(vault, record)
        note = record["aggregation"]["secagg"]
        np.testing.assert_array_equal(total, vault.weights(note["sum"]).tensor("sum"))
        kept = record_of(vault, record)
        session = Session.from_bytes(kept.session)
        assert (session.run, session.round) == (str(record["run"]), record["round"])
        assert dict(session.parameters.details)["model"] == str(record["model_in"])
        assert kept.total == str(note["sum"])
        assert [str(update["cid"]) for update in record["updates"]] == [
            each.vector for each in kept.survivors
        ]
        mean = decode(session.parameters, total, len(kept.survivors), per="weight").values
        before, after = (tensors(tmp_path, record[key]) for key in ("model_in", "model_out"))
        for name in vault.weights(record["model_in"]).names:
            piece, mean = np.split(mean, [before[name].size])
            moved = before[name] + piece.reshape(before[name].shape).astype("f8")
            np.testing.assert_array_equal(after[name], moved.astype("f4"))
        assert not len(mean)


def test_a_sum_that_the_record_does_not_give_is_noticed(tmp_path):
    play(tmp_path, *SIX, "rounds=1", "secagg=on", "run_id=one")
    vault, (record,) = chain(tmp_path)
    kept = record_of(vault, record)

    def vector(name: str) -> np.ndarray:
        return vault.weights(CID.parse(name)).tensor("masked")

    forged = dataclasses.replace(kept, seeds=(bytes(32), *kept.seeds[1:]))
    with pytest.raises(SecAggFailed, match="seed of client-0"):
        forged.audit(vault.party.verify, vector)
    one, two, *rest = kept.survivors
    swapped = (
        dataclasses.replace(one, vector=two.vector), dataclasses.replace(two, vector=one.vector)
    )  # fmt: skip
    forged = dataclasses.replace(kept, survivors=(*swapped, *rest))
    with pytest.raises(SignatureWrong):
        forged.audit(vault.party.verify, vector)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A finished run of each way of sealing, in a folder named after it."""
    folder = tmp_path_factory.mktemp("sealed")
    for seal in ("none", "updates", "all"):
        words = (*SIX, "secagg=on", f"seal={seal}", "keep.everything=true", "run_id=one")
        play(folder / seal, *words)
    return folder


@pytest.mark.parametrize("seal", ["none", "updates", "all"])
def test_the_coordinator_audits_a_sealed_run(sealed, seal):
    vault, found = chain(sealed / seal)
    assert vault.seal == seal
    for record in found:
        sum_ = vault.weights(record["aggregation"]["secagg"]["sum"]).tensor("sum")
        np.testing.assert_array_equal(audited(vault, record), sum_)
        for update in record["updates"]:
            head = next(iter(dag.cat(vault.store, update["cid"])))
            assert is_sealed(head) == (seal != "none")


def test_sealing_changes_the_model_by_rounding_only(sealed):
    first = {}
    for seal in ("none", "updates", "all"):
        vault, (record, _) = chain(sealed / seal)
        first[seal] = vault.weights(record["model_out"]).tensors()
    assert 0 < distance(first["none"], first["all"]) < 2e-5
    assert 0 < distance(first["none"], first["updates"]) < 2e-5


@pytest.mark.parametrize("seal", ["updates", "all"])
def test_nothing_says_who_took_part_where_updates_are_sealed(sealed, seal):
    words = [b"client-1", b"train_loss", b"survivors", b"clipped"]
    for cid, block in blocks(FolderStore(sealed / seal / "store")).items():
        assert [word for word in words if word in block] == [], cid
    everything = b"".join(blocks(FolderStore(sealed / "none" / "store")).values())
    assert [word for word in words if word not in everything] == []


@pytest.mark.parametrize("seal", ["updates", "all"])
def test_a_partner_opens_what_is_for_it_and_nothing_else(sealed, seal):
    vault, (record, _) = chain(sealed / seal)
    keys = sealed / seal / "one" / "keys"
    partner = Party(Identity.load(keys / "client-0.key"), "participant", keys / "trust.toml")
    theirs = Vault(vault.store, partner, seal)
    note = record["aggregation"]["secagg"]
    secrets = [update["cid"] for update in record["updates"]]  # its own, too: sealed is sealed
    secrets += [note["sum"], note["record"]]
    for cid in secrets:
        with pytest.raises(NotRecipient):
            theirs.get_bytes(cid)
    stored = {cid for cid in vault.store if cid.codec != DAG_CBOR}
    said = [cid for cid in stored if _opens(vault, cid) and _is_message(vault, cid)]
    kinds = Counter(_kind(vault, cid) for cid in said)
    mine = Counter(_kind(vault, cid) for cid in said if _opens(theirs, cid))
    assert kinds == {
        "session": 2, "Advertise": 12, "Roster": 2, "Share": 12, "Delivery": 12, "Masked": 12,
        "Survivors": 2, "Confirm": 12, "Request": 2, "Unmask": 12, "Record": 2,
    }  # fmt: skip
    assert mine == {"session": 2, "Roster": 2, "Delivery": 2, "Survivors": 2, "Request": 2}


def _opens(vault: Vault, cid: CID) -> bool:
    try:
        vault.get_bytes(cid)
    except FedIPFSError:
        return False
    return True


def _is_message(vault: Vault, cid: CID) -> bool:
    try:
        return set(dagcbor.decode(vault.get_bytes(cid))) == {"message"}
    except (FedIPFSError, TypeError):
        return False


def _kind(vault: Vault, cid: CID) -> str:
    said = dagcbor.decode(dagcbor.decode(vault.get_bytes(cid))["message"])
    return said.get("kind", "session")


def test_only_identifiers_cross_flower(tmp_path, monkeypatch):
    from fedipfs.server.engine.pool import SerialPool

    crossed = []
    submit, collect = SerialPool.submit, SerialPool.collect

    def submitted(self, job, request):
        crossed.append(unframe(request)[1])
        submit(self, job, request)

    def collected(self, timeout_s):
        outcomes = collect(self, timeout_s)
        crossed.extend(unframe(outcome.reply)[1] for outcome in outcomes)
        return outcomes

    monkeypatch.setattr(SerialPool, "submit", submitted)
    monkeypatch.setattr(SerialPool, "collect", collected)
    summary = play(tmp_path, *SIX, "secagg=on", "run_id=one")
    assert len(crossed) == 2 * 6 * 5 * 2  # rounds, clients, stages, there and back
    assert max(map(len, crossed)) < 1500
    assert summary["bytes"]["flower_per_client_round"] == round(sum(map(len, crossed)) / 12)
    assert summary["bytes"]["flower_per_client_round"] < 6000
    for wire in crossed:
        content = message_from_bytes(wire).content
        assert not any(isinstance(record, ArrayRecord) for record in content.values())
        assert "metrics" not in content  # nor numbers


@pytest.mark.slow
def test_the_coordinator_holds_three_vectors_at_most(tmp_path, monkeypatch):
    """Of 1.5 million values each; clients are other processes."""
    from fedipfs.server import secure

    peaks = []
    honest = secure.Secure.train

    def train(self, number, model, messages):
        tracemalloc.start()
        try:
            return honest(self, number, model, messages)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(secure.Secure, "train", train)
    words = ("task.options.hidden=20000", "rounds=1", "train.steps=1", "secagg=on")
    play(tmp_path, *QUICK, *words, "engine.workers=2", serial=False)
    vector = 4 * (64 + 1 + 10) * 20_000
    assert 2 * vector < peaks[0] < 3.5 * vector


# ---- interruptions


@pytest.mark.parametrize("stage", STAGES)
def test_a_round_that_was_interrupted_is_begun_anew_with_other_keys(tmp_path, monkeypatch, stage):
    """Right after the answers of a stage have come, when no round had been completed before."""
    from fedipfs.server import secure

    honest = secure._Round._collect

    def collect(self, kind, told):
        replies = honest(self, kind, told)
        if kind.stage == stage and self._number == 2:
            raise KeyboardInterrupt
        return replies

    words = (*QUICK, "secagg=on", "rounds=3", "run_id=one")
    monkeypatch.setattr(secure._Round, "_collect", collect)
    with pytest.raises(RunInterrupted):
        play(tmp_path / "parts", *words)
    monkeypatch.undo()
    resumed = play(tmp_path / "parts", *words, resume=True)
    plain = play(tmp_path / "whole", *QUICK, "rounds=3", "run_id=one")
    assert resumed["rounds_completed"] == 3
    assert distance(models(tmp_path / "parts")[0], models(tmp_path / "whole")[0]) < 1e-5
    assert abs(resumed["metrics"]["accuracy"] - plain["metrics"]["accuracy"]) <= 0.002
    vault, found = chain(tmp_path / "parts")
    sessions = [Session.from_bytes(record_of(vault, record).session) for record in found]
    run = str(found[0]["run"])
    assert [each.run for each in sessions] == [run, f"{run}+1", f"{run}+1"]
    for record in found:
        audited(vault, record)
    secrets = {path.name for path in (tmp_path / "parts/one/secagg").rglob("*") if path.is_file()}
    assert secrets == {"lock", "unmask"}  # of the round that was interrupted, too


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_moment_goes_on(tmp_path):
    words = (*QUICK, "secagg=on", "rounds=4", "engine.workers=2", "run_id=one")
    rng = np.random.default_rng()
    process = start(*words, cwd=tmp_path)
    until = time.monotonic() + 120
    metrics = tmp_path / "runs" / "one" / "metrics.jsonl"
    while not metrics.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(float(rng.uniform(0, 1.0)))
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process.communicate()
    done = command("resume=one", "rounds=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "runs" / "one")
    assert [line["round"] for line in found] == [1, 2, 3, 4, 5]
    assert all(line["clients"]["ok"] == 4 for line in found)
    whole = play(tmp_path / "whole", *QUICK, "rounds=5", "run_id=one")
    assert abs(found[-1]["server"]["accuracy"] - whole["metrics"]["accuracy"]) <= 0.002
    vault, rounds = chain(tmp_path / "runs")
    for record in rounds[-1:]:
        audited(vault, record)


def test_average_is_resumed_on_the_terms_that_it_began_with(tmp_path):
    words = (*QUICK, "strategy=average", "secagg=on", "run_id=one")
    play(tmp_path, *words, "rounds=1")
    config = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    assert config["secagg"]["examples"] == 0
    checked = settings.check({**config, "rounds": 2})
    assert run(checked, Progress(io.StringIO(), quiet=True), resume=True)["rounds_completed"] == 2


@pytest.mark.slow
def test_a_run_with_too_few_survivors_ends_with_exit_code_3(tmp_path):
    words = ("clients.clock=simulated", "clients.spread=0", "clients.deadline_s=0.5")
    done = command(*QUICK, *words, "secagg=on", "run_id=one", cwd=tmp_path)
    assert done.returncode == 3
    (line,) = [each for each in done.stderr.splitlines() if "secure aggregation: 0 clients" in each]
    assert "3 are needed; nothing was unmasked (client-0: no answer within 0.5 s" in line
    assert "Traceback" not in done.stderr


# ---- what is told and what is refused


def told(runs_dir, *words: str) -> str:
    """What the user sees of a run."""
    stream = io.StringIO()
    run(settings.check(configure(runs_dir, *words, "engine=serial")), Progress(stream))
    return stream.getvalue()


def test_the_user_is_told_what_is_withstood_and_what_partners_can_pin(tmp_path):
    text = told(tmp_path, *SIX, "rounds=1", "secagg=on", "run_id=one")
    assert "secure aggregation: 6 clients, complete graph, threshold 5, quorum 5: up to 1" in text
    (pin,) = re.findall("secagg-parameters=([0-9a-f]{64})", text)
    vault, (record,) = chain(tmp_path)
    parameters = Session.from_bytes(record_of(vault, record).session).parameters
    assert lasting(parameters).digest().hex() == pin != parameters.digest().hex()


@pytest.mark.parametrize("privacy", ["none", "dp_sgd", "distributed"])
def test_what_was_told_to_be_pinned_is_what_clients_see(tmp_path, monkeypatch, privacy):
    """With the hash in their node configuration clients take part; with another they do not."""
    words = (*SIX, "secagg=on", f"privacy={privacy}", "rounds=1")
    text = told(tmp_path, *words, "run_id=free")
    (pin,) = re.findall("secagg-parameters=([0-9a-f]{64})", text)
    monkeypatch.setattr(simulation, "node_config", lambda *_: {"secagg-parameters": pin})
    assert play(tmp_path, *words, "run_id=pinned")["status"] == "finished"
    with pytest.raises(RunFailed, match=r"BelowFloor: the parameters' hash is [0-9a-f]{64}: this"):
        play(tmp_path, *words, "secagg.threshold=6", "run_id=other")


def test_values_that_are_cut_off_are_counted_and_another_clip_is_suggested(tmp_path):
    text = told(tmp_path, *QUICK, "secagg=on", "secagg.clip=0.01", "run_id=one")
    (warning,) = [line for line in text.splitlines() if "WARNING" in line]
    assert "were beyond secagg.clip=0.01 and were cut off; set secagg.clip=" in warning
    better = warning.rpartition("=")[2]
    assert "WARNING" not in told(tmp_path, *QUICK, "secagg=on", f"secagg.clip={better}")
    for line in lines(tmp_path / "one"):
        note = line["aggregation"]["secagg"]
        assert note["clipped"] > 0.001 and note["suggested_clip"] >= 0.02


REFUSALS = [
    (("strategy=krum", "clients.total=5"), "strategy=krum needs each of them"),
    (("strategy=best_model",), "strategy=best_model needs each of them"),
    (("strategy=ensemble",), "strategy=ensemble needs each of them"),
    (("strategy=fedmedian",), "strategy=fedmedian needs each of them"),
    (("strategy=scaffold",), "strategy=scaffold needs each of them"),
    (("strategy=fednova",), "strategy=fednova needs each of them"),
    (("strategy=qfedavg", "strategy.client_learning_rate=0.1"), "strategy=qfedavg needs each"),
    (("strategy=fedbuff",), "strategy=fedbuff needs each of them"),
    (("+strategy.clip_update_norm=1",), "strategy=fedavg needs each of them"),
    (("compression=int8",), "does not work with compression=int8"),
    (("attack=gaussian", "attack.fraction=0.5"), "does not work with attack=gaussian"),
    (("clients.per_round=3", "clients.extra=1"), "does not work with clients.extra=1"),
    (("evaluate.federated=true",), "does not work with evaluate.federated=True"),
    (("privacy=central",), "does not work with privacy=central"),
    (("secagg.bits=31",), "bits=31: sums over 4 clients would pass 32 bits; use at most 30"),
    (("secagg.bits=0",), "secagg.bits=0 is not a whole number of at least 1"),
    (("secagg.clip=0",), "secagg.clip=0 is not a number from"),
    (("secagg.threshold=2",), "threshold=2 of 4 clients: use 3 to 4"),
    (("secagg.colluders=0.9",), "threshold 3 of 4 withstands 1 colluders, not 3"),
    (("secagg.dropouts=0.9",), "threshold 3 of 4 withstands 1 drop-outs, not 3"),
    (("secagg.examples=0",), "secagg.examples=0: with strategy=average all clients weigh"),
    (("strategy=average", "secagg.examples=9"), "secagg.examples=9: with strategy=average all"),
    (("clients.total=2",), "secure aggregation among 2 clients: use 3 to"),
    (("clients.per_round=2",), "secure aggregation among 2 clients: use 3 to"),
]


@pytest.mark.parametrize(("words", "says"), REFUSALS)
def test_what_masks_do_not_go_with_is_refused_before_anything_is_made(tmp_path, words, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        play(tmp_path, *QUICK, *words, "secagg=on", "run_id=one")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "one").exists()


def test_private_records_under_masks_are_paid_for_once_and_no_loss_is_told(tmp_path):
    words = (*QUICK, "secagg=on", "privacy=dp_sgd", "keep.everything=true", "run_id=one")
    summary = play(tmp_path, *words)
    assert summary["privacy"]["unit"] == "record"
    assert 0 < summary["privacy"]["epsilon"] <= summary["privacy"]["planned_epsilon"] + 1e-6
    for line in lines(tmp_path / "one"):
        assert "train_loss" not in line["train"]
        assert line["privacy"]["clients"].keys() == {f"client-{each}" for each in range(4)}
    vault, found = chain(tmp_path)
    session = Session.from_bytes(record_of(vault, found[-1]).session)
    assert "train_loss" not in session.parameters.numbers
    assert summary["sgd_steps"] == sum(line["sgd_steps"] for line in lines(tmp_path / "one")) > 0
    ledgers = list((tmp_path / "one" / "ledgers").glob("*.jsonl"))
    assert len(ledgers) == 4
