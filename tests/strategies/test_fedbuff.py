"""Asynchronous rounds: buffers, staleness, a simulated clock, resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
from runs import QUICK, lines, play

from fedipfs import FolderStore
from fedipfs.errors import ConfigError
from fedipfs.exchange import StoredArrays, from_numpy, store_arrays
from fedipfs.ipld import CID
from fedipfs.server import records
from fedipfs.strategies import Brief, ClientUpdate, build
from fedipfs.tasks.small import Digits

ASYNC = (*QUICK, "clients.total=6", "clients.clock=simulated", "clients.spread=1.0", "rounds=6")


def fedbuff(**options):
    return build({"name": "fedbuff", **options}, Brief(per_round=6, min_successes=3))


def update(store, node, value, base, examples, asked):
    arrays = store_arrays(store, from_numpy({"w": np.array([value], "f4")}))
    answered = StoredArrays(arrays.vault, arrays.weights, base=base, asked=asked)
    return ClientUpdate(node, answered, examples, {})


def test_the_rule_by_hand(store):
    """Model 10; one fresh update 12 of 30 examples, one from model 4, three late, 8 of 10."""
    model, old = (store_arrays(store, from_numpy({"w": np.array([v], "f4")})) for v in (10, 4))
    strategy = fedbuff(server_learning_rate=0.5, staleness_exponent=0.5)
    strategy._model = model
    updates = [update(store, 2, 12, model, 30, 5), update(store, 3, 8, old, 10, 2)]
    combined = strategy.combine(5, updates)
    # 10 + 0.5 * (3/4 * 2 + 1/4 * (1 + 3)^-0.5 * 4)
    assert combined["w"].numpy().tolist() == [11.0]
    assert strategy.notes["buffer"] == [
        {"node": 2, "staleness": 0, "weight": 0.375},
        {"node": 3, "staleness": 3, "weight": 0.0625},
    ]


def test_buffers_are_averaged_and_not_extrapolated(store):
    """Of a variance 1 and an update 10 -> 2, one would make -7; the parameters go on as always."""
    task = Digits(hidden=2, norm=True)
    names = task.model().state_dict()

    def state(value, variance):
        arrays = {name: np.full(each.shape, value, "f4") for name, each in names.items()}
        arrays["2.running_var"][:] = variance
        arrays["2.num_batches_tracked"] = np.array(value, "i8")
        return store_arrays(store, from_numpy(arrays))

    brief = Brief(per_round=6, min_successes=1, task=task)
    strategy = build({"name": "fedbuff", "staleness_exponent": 0}, brief)
    strategy._model = state(10, 1)
    updates = []
    for node, (value, variance, examples) in enumerate([(6, 2, 30), (7, 6, 10)], start=2):
        arrays, base = state(value, variance), state(4, 10)
        answer = StoredArrays(arrays.vault, arrays.weights, base=base, asked=1)
        updates.append(ClientUpdate(node, answer, examples, {}))
    got = {name: array.numpy() for name, array in strategy.combine(2, updates).items()}
    assert got["1.weight"] == pytest.approx(10 + 0.75 * 2 + 0.25 * 3)
    assert got["2.weight"] == pytest.approx(12.25)
    assert got["2.running_mean"] == pytest.approx(0.75 * 6 + 0.25 * 7)
    assert got["2.running_var"] == pytest.approx(0.75 * 2 + 0.25 * 6)
    assert got["2.num_batches_tracked"] == 6


@pytest.mark.parametrize("size", [1, 2])
def test_with_batch_normalisation_it_learns(tmp_path, size):
    words = (*ASYNC, "rounds=12", "evaluate.every=12", "+task.options.norm=true", "run_id=run")
    summary = play(tmp_path, *words, "strategy=fedbuff", f"strategy.buffer_size={size}")
    store = FolderStore(tmp_path / "store")
    model = StoredArrays.open(store, CID.parse(summary["final_model_cid"]))
    assert model["2.running_var"].numpy().min() >= 0
    assert summary["metrics"]["accuracy"] > 0.7


def test_with_the_whole_cohort_as_buffer_it_is_fedavg(tmp_path):
    whole = ["strategy=fedbuff", "strategy.buffer_size=6"]
    ours, theirs = (
        play(tmp_path, *ASYNC, *words, f"run_id={name}")
        for name, words in (("buffered", whole), ("average", ["strategy=fedavg"]))
    )
    store = FolderStore(tmp_path / "store")
    one, other = (
        StoredArrays.open(store, CID.parse(summary["final_model_cid"]))
        for summary in (ours, theirs)
    )
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), atol=1e-6)
    notes = [line["aggregation"]["buffer"] for line in lines(tmp_path / "buffered")]
    assert all(each["staleness"] == 0 for buffer in notes for each in buffer)


def test_nobody_waits_for_the_slowest_and_all_is_as_the_seed_says(tmp_path):
    words = (*ASYNC, "strategy=fedbuff", "strategy.buffer_size=2")
    first = play(tmp_path, *words, "run_id=one")
    second = play(tmp_path, *words, "run_id=two", "engine.workers=2", serial=False)
    assert first["head_cid"] == second["head_cid"]
    buffers = [line["aggregation"]["buffer"] for line in lines(tmp_path / "one")]
    assert all(len(buffer) == 2 for buffer in buffers)
    staleness = [each["staleness"] for buffer in buffers for each in buffer]
    assert max(staleness) > 0
    fast = {each["client"] for buffer in buffers[:3] for each in buffer}
    assert len(fast) < 6  # models moved on while others were still at work


def test_a_resumed_run_goes_on_with_those_that_were_at_work(tmp_path):
    words = (*ASYNC, "strategy=fedbuff", "strategy.buffer_size=2")
    whole = play(tmp_path, *words, "run_id=whole")
    play(tmp_path, *words, "run_id=parts", "rounds=3")
    rest = play(tmp_path, *words, "run_id=parts", resume=True)
    assert rest["head_cid"] == whole["head_cid"]


def test_the_record_links_the_model_that_a_late_update_began_with(tmp_path):
    play(tmp_path, *ASYNC, "strategy=fedbuff", "strategy.buffer_size=2", "run_id=run")
    store = FolderStore(tmp_path / "store")
    head = CID.parse((tmp_path / "run" / "head").read_text().strip())
    models, late = {}, 0
    for _, record in records.chain(store, head):
        if record["type"] == records.ROUND:
            models[record["round"]] = record["model_in"]
    for _, record in records.chain(store, head):
        for entry in record.get("updates", []):
            buffer = record["aggregation"]["buffer"]
            (how,) = (each for each in buffer if each["client"] == entry["client"])
            base = entry.get("base", record["model_in"])
            assert base == models[record["round"] - how["staleness"]]
            late += how["staleness"] > 0
    assert late


def test_updates_that_are_too_late_are_left_out_by_name(tmp_path):
    play(
        tmp_path, *ASYNC, "strategy=fedbuff", "strategy.buffer_size=2", "strategy.max_staleness=0",
        "run_id=run", "clients.exclude_after=null",
    )  # fmt: skip
    text = json.dumps([line["clients"]["failed"] for line in lines(tmp_path / "run")])
    assert "models late" in text
    for line in lines(tmp_path / "run"):
        assert {each["staleness"] for each in line["aggregation"]["buffer"]} == {0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"buffer_size": 7}, r"strategy\.buffer_size=7 is more than clients\.per_round=6"),
        ({"buffer_size": 0}, "buffer_size=0"),
        ({"staleness_exponent": -1}, "staleness_exponent=-1"),
        ({"server_learning_rate": float("nan")}, "server_learning_rate=nan"),
        ({"max_staleness": 0.5}, "max_staleness=0.5"),
        ({"max_staleness": -1}, "max_staleness=-1"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(ConfigError, match=says):
        fedbuff(**options)
