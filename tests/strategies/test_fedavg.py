"""Streaming FedAvg: right, whatever the order; bad updates left out by name."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from fleet import Fleet
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedProx as FlowerFedProx
from grids import DirectGrid
from hypothesis import given, settings
from hypothesis import strategies as st
from quickstart import app

from fedipfs import CidGrid, FedAvg, FolderStore, use_store
from fedipfs.errors import ConfigError, EdgeError, RunFailed
from fedipfs.exchange import from_numpy, store_arrays
from fedipfs.flower_compat import set_identity
from fedipfs.strategies import Average, FedProx

set_identity(run_id=1, node_id=1)


class Round:
    """One aggregation without clients: updates are put into the store and answered by CID."""

    def __init__(self, store: FolderStore, model: dict[str, np.ndarray], nodes: int, **options):
        use_store(store)
        self.store, self.nodes = store, nodes
        self.answers = {}
        grid = DirectGrid(lambda message, context: self._answer(message), nodes)
        self.grid = CidGrid(grid, store, read_updates=False)
        self.raw = grid
        self.strategy = FedAvg(min_train_nodes=nodes, min_available_nodes=nodes, **options)
        self.arrays = store_arrays(store, from_numpy(model))

    def _answer(self, message):
        from flwr.app import Message

        from fedipfs.exchange import Exchange

        content = self.answers[message.metadata.dst_node_id]
        return Message(Exchange(self.store).swap_out(content), reply_to=message)

    def answer(self, node: int, arrays: dict[str, np.ndarray], examples=10, **metrics):
        record = MetricRecord({"num-examples": examples, **metrics})
        self.answers[node + 2] = RecordDict({"arrays": from_numpy(arrays), "metrics": record})

    def play(self):
        config = ConfigRecord()
        messages = self.strategy.configure_train(1, self.arrays, config, self.grid)
        replies = list(self.grid.send_and_receive(messages))
        return self.strategy.aggregate_train(1, replies)


def test_the_mean_is_weighted_by_examples(store):
    r = Round(store, {"w": np.zeros(2, "f4")}, 2)
    r.answer(0, {"w": np.array([1, 2], "f4")}, examples=30, train_loss=1.0)
    r.answer(1, {"w": np.array([5, 6], "f4")}, examples=10, train_loss=2.0)
    arrays, metrics = r.play()
    assert arrays["w"].numpy().tolist() == [2.0, 3.0]
    assert dict(metrics) == {"train_loss": 1.25}


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 2**32 - 1))
def test_the_bits_do_not_depend_on_the_order_of_replies(tmp_path_factory, order, seed):
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    rng = np.random.default_rng(seed)
    updates = [
        {"w": (rng.normal(size=99) * 10.0 ** rng.integers(-6, 6)).astype("f4")} for _ in order
    ]
    cids = []
    for arrival in (range(5), order):
        r = Round(store, {"w": np.zeros(99, "f4")}, 5)
        for node in range(5):
            r.answer(node, updates[node], examples=node * 7 + 1)
        messages = r.strategy.configure_train(1, r.arrays, ConfigRecord(), r.grid)
        replies = list(r.grid.send_and_receive(messages))
        cids.append(r.strategy.aggregate_train(1, [replies[i] for i in arrival])[0].cid)
    assert cids[0] == cids[1]


def test_it_equals_flowers_fedavg(store):
    use_store(store)
    results = []
    for strategy, read in ((FlowerFedAvg(), True), (FedAvg(), False)):
        random.seed(1)
        grid = CidGrid(DirectGrid(app, 4), store, read_updates=read)
        initial = from_numpy({"b": np.ones((3, 3), "f4"), "a": np.zeros((), "f8")})
        results.append(strategy.start(grid=grid, initial_arrays=initial, num_rounds=3))
    flower, ours = results
    assert list(ours.arrays) == list(flower.arrays) == ["b", "a"]
    for name in ours.arrays:
        np.testing.assert_allclose(
            ours.arrays[name].numpy(), flower.arrays[name].numpy(), rtol=1e-6
        )
    assert ours.train_metrics_clientapp == flower.train_metrics_clientapp


def test_the_average_counts_unequal_clients_the_same(store):
    r = Round(store, {"w": np.zeros(2, "f4")}, 3)
    r.strategy = Average(min_train_nodes=3, min_available_nodes=3)
    for node, (values, examples) in enumerate((([1, 2], 1), ([4, 8], 1000), ([7, 5], 20))):
        r.answer(node, {"w": np.array(values, "f4")}, examples=examples)
    arrays, _ = r.play()
    assert arrays["w"].numpy().tolist() == [4.0, 5.0]


def test_fedprox_without_its_term_is_fedavg_to_the_bit(store):
    cids = []
    for name, options in (("fedavg", {}), ("fedprox", {"proximal_mu": 0.0})):
        fleet = Fleet(store, clients=3, data={"partition": "dirichlet"})
        fleet.play(fleet.build(name, **options), 1, 3)
        cids.append(fleet.model.cid)
    assert cids[0] == cids[1]


def test_it_equals_flowers_fedprox_and_the_term_matters(store):
    """Flower's class sets `proximal-mu`, too, and its clients are ours."""
    got = []
    for strategy in (FlowerFedProx(proximal_mu=0.5), FedProx(proximal_mu=0.5), FedAvg()):
        fleet = Fleet(store, clients=3, epochs=2)
        got.append(fleet.play(strategy, 1, 3))
    flower, ours, plain = got
    for name in flower:
        np.testing.assert_allclose(ours[name], flower[name], rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours["1.weight"], plain["1.weight"], atol=1e-3)


@pytest.mark.parametrize("mu", [-1, float("inf"), float("nan"), "much", True])
def test_a_proximal_term_that_cannot_be_is_refused(mu):
    with pytest.raises(ConfigError, match=r"strategy\.proximal_mu=.* of at least 0"):
        FedProx(proximal_mu=mu)


def test_dtypes_are_kept_integers_rounded_booleans_by_majority(store):
    kinds = {"f2": [1, 2], "i8": [1, 2], "?": [0, 1], "u1": [3, 4], "bf16": [1, 2]}
    dtypes = {name: np.dtype(ml_dtypes.bfloat16 if name == "bf16" else name) for name in kinds}
    make = lambda i: {n: np.array([v[i]] * 3).astype(dtypes[n]) for n, v in kinds.items()}  # noqa: E731
    r = Round(store, make(0), 3)
    for node, i in enumerate((0, 1, 1)):
        r.answer(node, make(i))
    arrays, _ = r.play()
    got = {name: array.numpy()[0].item() for name, array in arrays.items()}
    assert {name: arrays[name].numpy().dtype for name in kinds} == dtypes
    assert got["i8"] == 2
    assert got["u1"] == 4
    assert got["?"] is True
    assert got["f2"] == pytest.approx(5 / 3, rel=1e-3)
    assert got["bf16"] == pytest.approx(5 / 3, rel=1e-2)


BIG = {"w": np.ones(600_000, "f4"), "v": np.ones(5, "f4")}  # three leaves, so threads take part


def _spoilt(where: int) -> dict[str, np.ndarray]:
    w = BIG["w"] * 3
    w[where] = np.nan
    return {**BIG, "w": w}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (_spoilt(0), "'w' holds NaN"),
        (_spoilt(599_999), "'w' holds NaN"),
        ({"w": BIG["w"]}, "'v' is missing"),
        ({**BIG, "x": BIG["v"]}, "'x' is not in the model"),
        ({**BIG, "v": np.ones((5, 1), "f4")}, "F32[5, 1], the model's is F32[5]"),
    ],
)
@pytest.mark.parametrize("position", [0, 2])
def test_a_bad_update_is_left_out_and_named(store, bad, reason, position, caplog):
    r = Round(store, BIG, 3)
    good = [i for i in range(3) if i != position]
    for node, value in zip(good, (2, 4), strict=True):
        r.answer(node, {name: array * value for name, array in BIG.items()}, examples=5)
    r.answer(position, bad, examples=1000)
    with caplog.at_level("WARNING"):
        arrays, _ = r.play()
    assert set(arrays["w"].numpy()) == {3.0}
    assert list(r.strategy.excluded) == [position + 2]
    assert reason in r.strategy.excluded[position + 2]
    assert reason in caplog.text


def test_a_damaged_or_missing_block_leaves_the_update_out(store):
    for damage in ("flip", "delete"):
        r = Round(store, BIG, 2)
        r.answer(0, {n: a * 2 for n, a in BIG.items()})
        r.answer(1, {n: a * (5 if damage == "flip" else 6) for n, a in BIG.items()})
        messages = r.strategy.configure_train(1, r.arrays, ConfigRecord(), r.grid)
        replies = list(r.grid.send_and_receive(messages))
        leaf = replies[1].content["arrays"].weights._leaves.cids[2]
        (path,) = store.path.glob(f"blocks/**/*{str(leaf)[1:]}*")
        if damage == "flip":
            raw = bytearray(path.read_bytes())
            raw[17] ^= 1
            path.write_bytes(raw)
        else:
            path.unlink()
        arrays, _ = r.strategy.aggregate_train(1, replies)
        assert set(arrays["w"].numpy()) == {2.0}
        assert str(leaf) in r.strategy.excluded[3]


@pytest.mark.parametrize(
    "examples", [0, -5, float("nan"), float("inf"), 2.0**60, "missing", [1, 2]]
)
def test_a_weight_that_is_no_positive_number_is_refused(store, examples):
    r = Round(store, {"w": np.zeros(2, "f4")}, 3)
    for node in (0, 1):
        r.answer(node, {"w": np.ones(2, "f4")})
    if examples == "missing":
        r.answers[4] = RecordDict(
            {"arrays": from_numpy({"w": np.ones(2, "f4")}), "metrics": MetricRecord({"x": 1})}
        )
    else:
        r.answer(2, {"w": np.full(2, 9, "f4")}, examples=examples)
    arrays, _ = r.play()
    assert arrays["w"].numpy().tolist() == [1, 1]
    assert "number of examples" in r.strategy.excluded[4]


def test_metrics_unlike_the_others_leave_an_update_out(store):
    r = Round(store, {"w": np.zeros(2, "f4")}, 3)
    for node, extra in enumerate(({"a": 1.0}, {"a": 1.0}, {"b": 1.0})):
        r.answer(node, {"w": np.ones(2, "f4") * node}, **extra)
    _, metrics = r.play()
    assert dict(metrics) == {"a": 1.0}
    assert "its records are" in r.strategy.excluded[4]


def test_too_few_good_updates_fail_the_round_with_reasons(store):
    r = Round(store, {"w": np.zeros(2, "f4")}, 3, min_successes=2)
    r.answer(0, {"w": np.ones(2, "f4")})
    for node in (1, 2):
        r.answer(node, {"w": np.full(2, np.nan, "f4")})
    with pytest.raises(RunFailed, match=r"1 usable updates, min_successes is 2 .*NaN"):
        r.play()


def test_all_bad_fails_even_with_the_default(store):
    r = Round(store, {"w": np.zeros(2, "f4")}, 2)
    for node in (0, 1):
        r.answer(node, {"w": np.full(2, np.nan, "f4")})
    with pytest.raises(RunFailed):
        r.play()


def test_without_a_cid_grid_it_says_what_it_needs(store):
    from quickstart import plain_app

    initial = from_numpy({"a": np.zeros(2, "f4")})
    with pytest.raises(EdgeError, match="CidGrid"):
        FedAvg().start(grid=DirectGrid(plain_app, 2), initial_arrays=initial, num_rounds=1)


def test_memory_does_not_grow_with_the_cohort(store):
    model = {f"w{i}": np.ones(500_000, "f4") for i in range(4)}  # 8 MB
    peaks = []
    for nodes in (2, 12):
        r = Round(store, model, nodes)
        for node in range(nodes):
            r.answer(node, {name: array * (node + 1) for name, array in model.items()})
        messages = r.strategy.configure_train(1, r.arrays, ConfigRecord(), r.grid)
        replies = list(r.grid.send_and_receive(messages))
        r.answers.clear()
        tracemalloc.start()
        r.strategy.aggregate_train(1, replies)
        peaks.append(tracemalloc.get_traced_memory()[1] / 8e6)
        tracemalloc.stop()
    assert max(peaks) < 3, f"peaks of {peaks} models"
    assert abs(peaks[1] - peaks[0]) < 0.3


def test_every_subset_of_good_updates_gives_their_mean(store):
    values = [1.0, 2.0, 4.0]
    for good in itertools.product([True, False], repeat=3):
        if not any(good):
            continue
        r = Round(store, {"w": np.zeros(1, "f4")}, 3)
        for node, ok in enumerate(good):
            r.answer(node, {"w": np.array([values[node] if ok else np.nan], "f4")})
        arrays, _ = r.play()
        expected = np.mean([v for v, ok in zip(values, good, strict=True) if ok])
        assert arrays["w"].numpy()[0] == pytest.approx(expected)
