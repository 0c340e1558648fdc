"""Compressed updates and models through the edge, with stock strategies and real parties."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedMedian
from grids import DirectGrid
from parties import Link, Parties
from runs import lines, play

from fedipfs import CidGrid, FedAvg, cid_mod, weights
from fedipfs.errors import ConfigError, WrongBase
from fedipfs.exchange import (
    StoredArrays,
    as_numpy,
    cost_of,
    from_numpy,
    store_arrays,
    stored_cid,
    use_store,
)
from fedipfs.ipld import CID, unixfs
from fedipfs.store import FolderStore, dag
from fedipfs.strategies.catalogue import STRATEGIES
from fedipfs.weights import Weights
from fedipfs.weights.compression import Spec, encode

SIZE = 3000
CODECS = {  # text -> largest relative error of one update
    "fp16 zstd": 1e-3,
    "bf16": 4e-3,
    "int8 zstd": 0.02,
    "int8 zstd feedback": 0.02,
    "int4 feedback": 0.2,
    "topk fraction=0.1 zstd feedback": 0.85,
    "randk fraction=0.25 feedback": 0.95,
    "randk fraction=0.25 zstd": 3.0,
}


@pytest.fixture
def store(store: FolderStore) -> FolderStore:
    use_store(store)
    return store


def model() -> dict[str, np.ndarray]:
    """Not in canonical order, with a counter, a scalar and a tensor that no client changes."""
    rng = np.random.default_rng(0)
    return {
        "z.weight": rng.normal(size=(SIZE // 10, 10)).astype("f4"),
        "a.steps": np.array(3, "i8"),
        "frozen": rng.normal(size=SIZE).astype("f4"),
        "half": rng.normal(size=64).astype(ml_dtypes.bfloat16),
        "scale": np.float64(2.0).reshape(()),
    }


Change = Callable[[int, int], dict[str, np.ndarray]]


def steps(node: int, number: int) -> dict[str, np.ndarray]:
    """What client `node` adds to each tensor in round `number`."""
    rng = np.random.default_rng([node, number])
    return {
        "z.weight": rng.standard_t(4, size=(SIZE // 10, 10)).astype("f4") * np.float32(1e-2),
        "a.steps": np.array(node, "i8"),
        "half": rng.normal(size=64).astype("f4"),
        "scale": np.float64(0.25 * node).reshape(()),
    }


def trained(came: dict[str, np.ndarray], added: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model a client is left with, in the dtypes in which it came."""
    return {
        name: np.asarray(array + added.get(name, 0)).astype(array.dtype)
        for name, array in came.items()
    }


def make_app(mod=cid_mod, change: Change = steps) -> ClientApp:
    app = ClientApp(mods=[mod])

    @app.train()
    def train(message: Message, context) -> Message:
        number = int(message.content["config"]["server-round"])
        added = change(message.metadata.dst_node_id, number)
        came = {name: as_numpy(array) for name, array in message.content["arrays"].items()}
        new = trained(came, added)
        metrics = MetricRecord({"num-examples": 1})
        return Message(
            RecordDict({"arrays": from_numpy(new), "metrics": metrics}), reply_to=message
        )

    @app.evaluate()
    def evaluate(message: Message, context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "arrays": len(message.content["arrays"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def ask(grid: CidGrid, number: int = 1, arrays: ArrayRecord | None = None, kind: str = "train"):
    content = RecordDict(
        {
            "arrays": from_numpy(model()) if arrays is None else arrays,
            "config": ConfigRecord({"server-round": number}),
        }
    )
    messages = [grid.create_message(content, kind, node, "") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages))


def values(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: as_numpy(array).astype("f8") for name, array in record.items()}


def reasons(replies: list[Message]) -> list[str]:
    return [reply.error.reason if reply.has_error() else "" for reply in replies]


# ---- every codec, every kind of tensor


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("read", [True, False])
def test_an_update_arrives_as_near_as_its_codec_allows(store, text, read):
    spec = Spec.parse(text)
    grid = CidGrid(DirectGrid(make_app(), 3), store, read_updates=read, compression=spec)
    for reply in ask(grid):
        assert not reply.has_error(), reply.error.reason
        got, node = reply.content["arrays"], reply.metadata.src_node_id
        assert list(got) == list(model())
        base, seen = values(from_numpy(model())), values(got)
        true = values(from_numpy(trained(model(), steps(node, 1))))
        np.testing.assert_array_equal(seen["a.steps"], true["a.steps"])
        np.testing.assert_array_equal(seen["frozen"], base["frozen"])
        floats = ["z.weight", "half", "scale"]
        lost = np.concatenate([(seen[n] - true[n]).ravel() for n in floats])
        size = np.concatenate([(true[n] - base[n]).ravel() for n in floats])
        error = np.linalg.norm(lost) / np.linalg.norm(size)
        cost = cost_of(got)
        assert error <= CODECS[text]
        assert cost.error == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert cost.stored < cost.dense
        assert got.base is not None
        assert got.asked == 1


@pytest.mark.parametrize("text", ["int8 zstd", "topk fraction=1.0 zstd feedback"])
@pytest.mark.parametrize("strategy", [FlowerFedAvg, FedMedian, FedAvg])
def test_strategies_run_unchanged(store, text, strategy):
    def run(**options):
        link = DirectGrid(make_app(), 3)
        ours = strategy is FedAvg
        grid = CidGrid(link, store, read_updates=not ours, **options)
        arrays = from_numpy(model())
        for number in (1, 2, 3):
            replies = ask(grid, number, arrays)
            chosen = strategy(fraction_evaluate=0.0)
            if ours:
                base = replies[0].content["arrays"].base
                list(chosen.configure_train(number, base, ConfigRecord(), grid))
            arrays, _ = chosen.aggregate_train(number, replies)
        return values(arrays), link

    plain, _ = run()
    seen, link = run(compression=Spec.parse(text))
    assert link.arrays_crossed == 0
    assert max(link.sizes) < 1000
    for name, expected in plain.items():
        np.testing.assert_allclose(seen[name], expected, atol=0.06, err_msg=name)


NEEDS = {
    "fedbn": ["+task.options.norm=true"],
    "fedper": ["strategy.personal=['3.*']"],
    "fedbuff": ["clients.clock=simulated"],
}
BAR = {"fedadam": 0.35, "fedyogi": 0.5}  # of three rounds; the others' is 0.65, chance is 0.1
CHOICES = {"int8": ["compression=int8"], "topk": ["compression=topk", "compression.fraction=0.1"]}


@pytest.mark.parametrize("codec", CHOICES)
@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"fedsgd"}))
def test_every_strategy_learns_from_compressed_updates(tmp_path, name, codec):
    words = ("+experiment=digits", "clients.total=8", "train.epochs=2", "rounds=3", "run_id=run")
    choice = [f"strategy={name}", *NEEDS.get(name, []), *CHOICES[codec]]
    summary = play(tmp_path, *words, *choice)
    assert summary["metrics"]["accuracy"] > BAR.get(name, 0.65)
    for line in lines(tmp_path / "run"):
        assert not line["clients"]["failed"]
        assert line["compression"]["error"] > 1e-3
        assert line["compression"]["ratio"] < 0.35


@pytest.mark.parametrize("codec", CHOICES)
def test_gradients_are_not_compressed(tmp_path, codec):
    with pytest.raises(ConfigError, match="strategy=fedsgd is answered with gradients"):
        play(tmp_path, "+experiment=digits", "strategy=fedsgd", *CHOICES[codec])


def test_what_is_asked_and_answered_on_the_wire(store):
    grid = CidGrid(DirectGrid(make_app(), 1), store, compression=Spec.parse("int8 zstd"))
    ask(grid)
    ask(grid, kind="evaluate")
    sent, answered, evaluate, _ = grid._grid.crossed
    assert sent.content["fedipfs"]["compress:arrays"] == "int8 zstd"
    assert list(evaluate.content["fedipfs"]) == ["cid:arrays", "order:arrays"]
    file = Weights(store, cid_in(answered))
    assert file.metadata["base"] == sent.content["fedipfs"]["cid:arrays"]
    assert file.metadata["compression"] == "int8 zstd"


def cid_in(message: Message) -> CID:
    return CID.parse(message.content["fedipfs"]["cid:arrays"])


def test_an_update_by_itself_is_no_model(store):
    grid = CidGrid(DirectGrid(make_app(), 1), store, compression=Spec.parse("int8"))
    (reply,) = ask(grid)
    cid = stored_cid(reply.content["arrays"])
    with pytest.raises(WrongBase, match="relative to"):
        StoredArrays.open(store, cid)


def test_an_update_that_becomes_a_model_is_stored_as_one(store):
    """As a strategy does that makes one client's update the next model."""
    grid = CidGrid(DirectGrid(make_app(), 1), store, compression=Spec.parse("int8"))
    (reply,) = ask(grid)
    arrays = reply.content["arrays"]
    ask(grid, 2, arrays)
    sent = [m for m in grid._grid.crossed if m.metadata.src_node_id == 1][-1]
    back = StoredArrays.open(store, cid_in(sent))
    for name, expected in values(arrays).items():
        np.testing.assert_array_equal(values(back)[name], expected)


# ---- error feedback


@pytest.mark.parametrize("text", ["int4", "topk fraction=0.05", "randk fraction=0.2"])
def test_with_feedback_what_is_lost_arrives_later(store, text):
    """Over many rounds the sum of what arrives approaches the sum of what was sent."""
    rounds = 40

    def missing(spec: Spec) -> float:
        grid = CidGrid(DirectGrid(make_app(), 1), store, compression=spec)
        arrived, wanted = np.zeros(SIZE), np.zeros(SIZE)
        for number in range(1, rounds + 1):
            (reply,) = ask(grid, number)
            arrived += (values(reply.content["arrays"])["z.weight"] - model()["z.weight"]).ravel()
            wanted += steps(2, number)["z.weight"].ravel()
        return float(np.linalg.norm(arrived - wanted) / np.linalg.norm(wanted))

    with_feedback = missing(Spec.parse(f"{text} feedback"))
    without = missing(Spec.parse(text))
    assert with_feedback < 0.75 * without


def test_what_is_owed_is_exactly_what_the_server_did_not_see(store):
    spec = Spec.parse("topk fraction=0.05 feedback")
    link = DirectGrid(make_app(), 1)
    (reply,) = ask(CidGrid(link, store, compression=spec))
    owed = values(link.contexts[2].state["fedipfs.residual.arrays"])
    seen = values(reply.content["arrays"])
    true = values(from_numpy(trained(model(), steps(2, 1))))
    for name in ("z.weight", "half", "scale"):
        np.testing.assert_allclose(seen[name] + owed[name], true[name], atol=1e-6)
    assert "a.steps" not in owed


def test_no_residual_is_kept_without_feedback(store):
    link = DirectGrid(make_app(), 1)
    ask(CidGrid(link, store, compression=Spec.parse("int8 zstd")))
    assert not link.contexts[2].state


def test_what_is_owed_to_another_model_is_forgotten(store):
    link = DirectGrid(make_app(), 1)
    grid = CidGrid(link, store, compression=Spec.parse("int4 feedback"))
    other = ArrayRecord({"z.weight": Array(np.full((2, 2), 1e6, "f4"))})
    link.contexts[2].state["fedipfs.residual.arrays"] = other
    (reply,) = ask(grid)
    assert np.abs(values(reply.content["arrays"])["z.weight"]).max() < 100


# ---- models down


@pytest.mark.parametrize("text", ["fp16", "bf16 zstd", "int8 zstd", "int4 feedback"])
def test_models_go_down_compressed_and_both_sides_agree_on_the_base(store, text):
    seen = []

    def watching(message, context, call_next):
        def inner(message, context):
            seen.append(values(message.content["arrays"]))
            return call_next(message, context)

        return cid_mod(message, context, inner)

    grid = CidGrid(
        DirectGrid(make_app(watching), 2), store, compression=Spec.parse(text), compress_models=True
    )
    replies = ask(grid)
    ask(grid, kind="evaluate")
    assert reasons(replies) == ["", ""]
    base = values(replies[0].content["arrays"].base)
    assert len(seen) == 4
    for arrays in seen:
        assert list(arrays) == list(model())
        for name, expected in base.items():
            np.testing.assert_array_equal(arrays[name], expected)
    np.testing.assert_array_equal(base["a.steps"], 3)
    np.testing.assert_allclose(base["z.weight"], model()["z.weight"], atol=0.3)
    sent = [m for m in grid._grid.crossed if m.metadata.src_node_id == 1]
    assert len({m.content["fedipfs"]["cid:arrays"] for m in sent}) == 1
    down = Weights(store, cid_in(sent[0]))
    assert down.metadata["base"] == "none"
    assert down.nbytes < replies[0].content["arrays"].base.weights.nbytes


def test_sparse_models_are_refused(store):
    with pytest.raises(ConfigError, match="topk cannot carry a whole model"):
        CidGrid(
            DirectGrid(make_app(), 1),
            store,
            compression=Spec.parse("topk fraction=0.5"),
            compress_models=True,
        )
    with pytest.raises(ConfigError, match="without a compression"):
        CidGrid(DirectGrid(make_app(), 1), store, compress_models=True)


# ---- what clients refuse


HOSTILE = (
    "gzip|topk fraction=2.0|topk fraction=0|topk|topk fraction=nan|int8 fraction=0.1|int8  zstd|"
    "zstd int8|randk fraction=1e-1||int8 zstd zstd|topk fraction=0.1 fraction=0.2|INT8"
)


@pytest.mark.parametrize("text", [*HOSTILE.split("|"), "int8 " + "x" * 900])
def test_a_client_refuses_what_no_server_should_ask(store, text):
    link = Link(make_app(), 1)
    link.forge = lambda message: message.content["fedipfs"].update({"compress:arrays": text})
    (reply,) = ask(CidGrid(link, store, compression=Spec("int8")))
    assert "CompressionError" in reply.error.reason


def test_what_is_asked_must_be_a_text_about_arrays_that_came(store):
    link = Link(make_app(), 1)
    link.forge = lambda message: message.content["fedipfs"].update({"compress:arrays": 7})
    (reply,) = ask(CidGrid(link, store))
    assert "EdgeError" in reply.error.reason
    link.forge = lambda message: message.content["fedipfs"].update({"compress:other": "int8"})
    (reply,) = ask(CidGrid(link, store))
    assert "unknown reference" in reply.error.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("text", CODECS)
def test_an_update_that_is_not_finite_is_refused_at_the_client(store, text, bad):
    def change(node, number):
        made = steps(node, number)
        if node == 3:
            made["z.weight"][7, 7] = bad
        return made

    grid = CidGrid(DirectGrid(make_app(change=change), 2), store, compression=Spec.parse(text))
    good, refused = ask(grid)
    assert not good.has_error()
    assert "CompressionError: tensor 'z.weight' has changed to NaN" in refused.error.reason


def test_an_answer_of_another_structure_is_refused_at_the_client(store):
    app = ClientApp(mods=[cid_mod])

    @app.train()
    def train(message: Message, context) -> Message:
        new = {name: as_numpy(a).astype("f8") for name, a in message.content["arrays"].items()}
        content = RecordDict({"arrays": from_numpy(new), "m": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    (reply,) = ask(CidGrid(DirectGrid(app, 1), store, compression=Spec.parse("int8")))
    assert "CompressionError" in reply.error.reason
    assert "F64" in reply.error.reason


def test_a_record_of_another_name_is_not_compressed(store):
    app = ClientApp(mods=[cid_mod])

    @app.train()
    def train(message: Message, context) -> Message:
        arrays = message.content["arrays"].copy()
        content = RecordDict({"new": arrays, "m": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    (reply,) = ask(CidGrid(DirectGrid(app, 1), store, compression=Spec.parse("int8")))
    assert cost_of(reply.content["new"]) == (cost_of(reply.content["new"]).dense,) * 2 + (0.0,)


# ---- what the server refuses


def answering(store, make: Callable[[CidGrid, Message], object], asked: str | None = "int8 zstd"):
    """The replies of two clients; the second's reference is to what `make` stores."""
    link = DirectGrid(make_app(), 2)
    spec = None if asked is None else Spec.parse(asked)
    grid = CidGrid(link, store, compression=spec, read_updates=True)

    def tamper(reply):
        if reply.metadata.src_node_id == 3:
            sent = [m for m in link.crossed if m.metadata.dst_node_id == 3][-1]
            reply.content["fedipfs"]["cid:arrays"] = str(make(sent))

    link.tamper = tamper
    good, bad = ask(grid)
    assert not good.has_error(), good.error.reason
    assert bad.has_error()
    return bad.error.reason


def payload(store, sent: Message | None, text: str, base=None) -> object:
    """A good payload, relative to what was sent or to `base`."""

    cid = base or cid_in(sent)
    came = Weights(store, cid)
    new = {name: a + a.dtype.type(1) for name, a in came.tensors().items()}
    made = encode(Spec.parse(text), came.specs, new.__getitem__, came, cid)
    return unixfs.build(iter(made.file), store.put)


def test_a_wrong_base_is_that_clients_failure(store):

    other = weights.put(store, {**model(), "scale": np.float64(9).reshape(())})
    reason = answering(store, lambda sent: payload(store, sent, "int8 zstd", other))
    assert reason.startswith("WrongBase: it is relative to")


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("int8 zstd", "int4 zstd"),
        ("topk fraction=0.01", "topk fraction=0.5"),
        ("topk fraction=0.01 feedback", "topk fraction=0.01"),
    ],
)
def test_another_compression_than_asked_is_refused(store, asked, given):
    reason = answering(store, lambda sent: payload(store, sent, given), asked)
    assert reason.startswith(("BadPayload: it is compressed as", "bafy"))


def test_a_compressed_answer_where_none_was_asked_for_is_refused(store):
    reason = answering(store, lambda sent: payload(store, sent, "int8"), asked=None)
    assert reason.startswith("BadPayload:")
    assert "not asked for" in reason


def test_a_plain_answer_where_a_compressed_one_was_asked_for_is_refused(store):

    reason = answering(store, lambda sent: weights.put(store, model()))
    assert reason.startswith("BadPayload:")
    assert "is not compressed, asked for was int8 zstd" in reason


def test_more_bytes_than_the_codec_needs_are_refused_from_the_root_block(store):

    huge = {"z.weight": np.zeros(1_000_000, "f4")}
    before = []

    def make(sent):
        cid = weights.put(store, huge)
        before.append(store.counters.copy())
        return cid

    reason = answering(store, make, "topk fraction=0.01")
    assert "at most" in reason
    assert store.counters.get_bytes - before[0].get_bytes < 100_000


# ---- sealed and signed


@pytest.mark.parametrize("seal", ["all", "updates", "none"])
@pytest.mark.parametrize("down", [False, True])
def test_with_keys_everything_is_signed_sealed_and_compressed(tmp_path, store, seal, down):
    parties = Parties(tmp_path, store, seal)
    spec = Spec.parse("int4 zstd feedback")
    grid = parties.grid(make_app(parties.mod), compression=spec, compress_models=down)
    arrays = from_numpy(model())
    for number in (1, 2):
        replies = ask(grid, number, arrays)
        assert reasons(replies) == ["", "", ""]
        assert sorted(grid.signed) == [2, 3, 4]
    got = values(replies[0].content["arrays"])
    np.testing.assert_allclose(got["z.weight"], model()["z.weight"], atol=0.6 if down else 0.2)
    cid = stored_cid(replies[0].content["arrays"])
    head = bytes(next(iter(dag.cat(store, cid))))
    assert head.startswith(b"fedipfs/sealed") == (seal != "none")


def test_who_carries_the_messages_cannot_change_what_is_asked(tmp_path, store):
    parties = Parties(tmp_path, store)
    grid = parties.grid(make_app(parties.mod), compression=Spec.parse("int8 zstd"))
    grid._grid.forge = lambda m: m.content["fedipfs"].update({"compress:arrays": "int4 zstd"})
    assert all("SignatureWrong" in reason for reason in reasons(ask(grid)))


def test_a_model_sent_again_has_the_same_cid_though_sealing_is_random(tmp_path, store):

    parties = Parties(tmp_path, store)
    grid = parties.grid(make_app(parties.mod), compression=Spec.parse("int8"), compress_models=True)
    stored = store_arrays(parties.coordinator, from_numpy(model()))
    ask(grid, 1, stored)
    ask(grid, 1, stored, kind="evaluate")
    sent = [m for m in grid._grid.crossed if m.metadata.src_node_id == 1]
    assert len({m.content["fedipfs"]["cid:arrays"] for m in sent}) == 1
