"""Through the edge: apps and strategies as they are, CIDs on the wire, nothing else."""

from __future__ import annotations

import random

import ml_dtypes
import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import FedAdam
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from grids import DirectGrid
from quickstart import app, plain_app

from fedipfs import CidGrid, FolderStore
from fedipfs.errors import EdgeError
from fedipfs.exchange import (
    Exchange,
    StoredArrays,
    from_numpy,
    from_torch,
    store_arrays,
    to_torch,
    use_store,
)
from fedipfs.flower_compat import message_to_bytes


@pytest.fixture
def store(store):
    use_store(store)
    return store


def model(big: int = 0) -> ArrayRecord:
    """Not in canonical order, on purpose: positions must survive."""
    rng = np.random.default_rng(0)
    arrays = {
        "z.weight": rng.normal(size=(8, 4)).astype("f4"),
        "a.bias": rng.normal(size=(4,)).astype("f4"),
        "m.scale": rng.normal(size=()),
    }
    if big:
        arrays["big"] = rng.normal(size=big).astype("f4")
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def run(grid, strategy, rounds: int = 3, arrays: ArrayRecord | None = None):
    random.seed(0)
    return strategy.start(grid=grid, initial_arrays=arrays or model(), num_rounds=rounds)


def values(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


@pytest.mark.parametrize("strategy", [FlowerFedAvg, FedAdam])
def test_two_lines_turn_a_plain_flower_app_into_one_that_sends_cids(store, strategy):
    plain = run(DirectGrid(plain_app, 4), strategy())
    grid = DirectGrid(app, 4)
    ours = run(CidGrid(grid), strategy())
    assert list(ours.arrays) == list(plain.arrays)
    for name, expected in values(plain.arrays).items():
        np.testing.assert_allclose(values(ours.arrays)[name], expected, rtol=1e-6, atol=1e-6)
    assert ours.evaluate_metrics_clientapp.keys() == plain.evaluate_metrics_clientapp.keys()
    assert grid.arrays_crossed == 0


@pytest.mark.parametrize("big", [0, 1_000_000])
def test_what_crosses_is_small_and_does_not_grow_with_the_model(store, big):
    grid = DirectGrid(app, 3)
    run(CidGrid(grid), FlowerFedAvg(), rounds=1, arrays=model(big))
    assert len(grid.sizes) == 3 * 2 * 2
    assert max(grid.sizes) < 600
    assert grid.arrays_crossed == 0


def test_each_model_is_encoded_once_and_each_message_has_content_of_its_own(store):
    grid = DirectGrid(app, 5)
    run(CidGrid(grid), FlowerFedAvg(fraction_evaluate=0.0), rounds=1)
    sent = [m for m in grid.crossed if m.metadata.src_node_id == 1]
    assert len({id(m.content) for m in sent}) == 5
    assert len({m.content["fedipfs"]["cid:arrays"] for m in sent}) == 1


def test_positions_names_and_dtypes_survive_the_store(store):
    record = model()
    back = Exchange(store).swap_in(Exchange(store).swap_out(RecordDict({"arrays": record})))
    assert list(back["arrays"]) == ["z.weight", "a.bias", "m.scale"]
    for mine, theirs in zip(back["arrays"].values(), record.values(), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
    assert back["arrays"].count_bytes() == record.count_bytes()


def test_a_changed_record_gets_a_new_cid(store):
    stored = store_arrays(store, model())
    cid = stored.cid
    assert store_arrays(store, stored) is stored
    stored["a.bias"] = Array(np.ones(4, "f4"))
    assert stored.cid is None
    assert store_arrays(store, stored).cid != cid
    copied = store_arrays(store, model()).copy()
    copied.pop("a.bias")
    assert "a.bias" in store_arrays(store, model())


def test_torch_state_dicts_survive_bfloat16_and_counters_included(store):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    net[0].to(torch.bfloat16)
    net[1].num_batches_tracked += 7
    back = to_torch(store_arrays(store, from_torch(net.state_dict())))
    assert list(back) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_aggregates_return_to_the_models_dtypes(store):
    grid = CidGrid(DirectGrid(app, 2), store)
    result = run(grid, FedAdam(), rounds=2)
    assert result.arrays["z.weight"].dtype == "float64"  # what Flower's FedAdam answers
    sent = [m for m in grid._grid.crossed if m.metadata.src_node_id == 1]
    stored = Exchange(store).swap_in(sent[-1].content)["arrays"]
    assert [array.dtype for array in stored.values()] == ["float32", "float32", "float64"]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (ConfigRecord({"blob": b"x" * 1025}), "blob"),
        (ConfigRecord({"text": "é" * 513}), "text"),
        (MetricRecord({"list": [0.5] * 129}), "list"),
    ],
)
def test_a_value_over_one_kib_is_refused_on_both_sides(store, record, name):
    grid = CidGrid(DirectGrid(app, 1), store)
    message = grid.create_message(RecordDict({"r": record}), "train", 2, "")
    with pytest.raises(EdgeError, match=name):
        grid.send_and_receive([message])
    with pytest.raises(EdgeError, match=name):
        Exchange(store).swap_in(RecordDict({"r": record}))


def test_exactly_one_kib_passes(store):
    content = RecordDict({"r": ConfigRecord({"blob": b"x" * 1024})})
    assert Exchange(store).swap_out(content)["r"]["blob"] == b"x" * 1024


def test_arrays_that_arrive_through_flower_are_refused_by_name(store):
    grid = DirectGrid(app, 3)
    grid.tamper = lambda reply: (
        reply.content.update({"arrays": model()}) if reply.metadata.src_node_id == 3 else None
    )
    replies = _train(CidGrid(grid, store))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "through Flower" in replies[1].error.reason


def _train(grid: CidGrid, **options):
    record = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": 1})})
    messages = [grid.create_message(record, "train", node, "") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, **options))


def _reference(store: FolderStore, arrays: dict[str, np.ndarray]) -> ConfigRecord:
    return Exchange(store).swap_out(RecordDict({"arrays": from_numpy(arrays)}))["fedipfs"]


NAN = np.array([1, np.nan, 2, 3], "f4")
GOOD = {name: array.numpy() for name, array in model().items()}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({**GOOD, "a.bias": NAN}, "'a.bias' holds NaN"),
        ({**GOOD, "a.bias": np.full(4, np.inf, "f4")}, "'a.bias' holds NaN or infinite"),
        ({k: v for k, v in GOOD.items() if k != "a.bias"}, "'a.bias' is missing"),
        ({**GOOD, "extra": NAN}, "'extra' is not in the model"),
        ({**GOOD, "a.bias": np.ones(5, "f4")}, "the model's is F32[4]"),
        ({**GOOD, "a.bias": np.ones(4, "f8")}, "F64[4], the model's is F32[4]"),
        ({**GOOD, "a.bias": np.ones(4, ml_dtypes.bfloat16)}, "BF16[4]"),
    ],
)
def test_an_update_that_does_not_fit_the_model_is_an_error_reply(store, arrays, reason):
    grid = DirectGrid(app, 2)

    def tamper(reply):
        if reply.metadata.src_node_id == 2:
            reply.content["fedipfs"] = _reference(store, arrays)

    grid.tamper = tamper
    bad, good = _train(CidGrid(grid, store))
    assert not good.has_error()
    assert reason in bad.error.reason


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (
            {"cid:arrays": "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"},
            "bafkreihdw",
        ),
        ({"cid:arrays": "not a cid"}, "not a cid"),
        ({"cid:arrays": 7}, "a reference is a string"),
        ({"order:arrays": "x"}, "unknown reference"),
        ({"weird": "x"}, "unknown reference"),
    ],
)
def test_a_reference_that_leads_nowhere_is_an_error_reply(store, reference, reason):
    grid = DirectGrid(app, 2)

    def tamper(reply):
        if reply.metadata.src_node_id == 2:
            reply.content["fedipfs"] = ConfigRecord(reference)

    grid.tamper = tamper
    bad, good = _train(CidGrid(grid, store))
    assert not good.has_error()
    assert reason in bad.error.reason


def test_a_node_that_does_not_answer_in_time_is_an_error_reply(store):
    grid = DirectGrid(app, 3)
    grid.silent = {3}
    replies = _train(CidGrid(grid, store), timeout=5.0)
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 4]
    assert "within 5 s" in replies[1].error.reason


def test_push_and_pull_swap_as_well(store):
    inner = DirectGrid(app, 2)
    grid = CidGrid(inner, store)
    record = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": 1})})
    ids = list(grid.push_messages([grid.create_message(record, "train", 2, "")]))
    (reply,) = grid.pull_messages(ids)
    assert isinstance(reply.content["arrays"], StoredArrays)
    assert inner.arrays_crossed == 0


def test_a_lazy_record_still_travels_through_flower_itself(store):
    """Flower's own serialisation of a record that came out of the store."""
    stored = store_arrays(store, model())
    grid = DirectGrid(app, 1)
    message = grid.create_message(RecordDict({"arrays": stored}), "train", 2, "")
    assert len(message_to_bytes(message)) > 200
    assert stored.object_id


def test_a_lost_node_is_one_failure_under_its_own_id(store):
    """A SuperLink answers for a node it lost, under the SuperLink's own node id."""

    class Lost(DirectGrid):
        def send_and_receive(self, messages, *, timeout=None):
            first, _ = super().send_and_receive(messages, timeout=timeout)
            lost = Message(Error(5, "lost"), reply_to=messages[1])
            lost.metadata.__dict__["_src_node_id"] = 1
            return [first, lost]

    good, bad = _train(CidGrid(Lost(app, 2), store), timeout=9.0)
    assert (good.metadata.src_node_id, good.has_error()) == (2, False)
    assert (bad.metadata.src_node_id, bad.error.reason) == (3, "lost")


def test_a_different_model_for_each_node_even_from_a_generator(store):
    """Records that are gone before the next is made: their ids may be used again."""
    grid = CidGrid(DirectGrid(app, 8), store)

    def messages():
        for node in grid.get_node_ids():
            arrays = ArrayRecord([np.full(3, node, "f4")])
            record = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
            yield grid.create_message(record, "train", node, "")

    assert not any(reply.has_error() for reply in grid.send_and_receive(messages()))
    sent = [m for m in grid._grid.crossed if m.metadata.src_node_id == 1]
    assert len({m.content["fedipfs"]["cid:arrays"] for m in sent}) == 8
