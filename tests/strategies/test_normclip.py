"""Norm clipping around any strategy: shorter updates, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Error, Message
from hypothesis import given
from hypothesis import strategies as st
from one_round import OneRound, values

from fedipfs.errors import BlockCorrupt, ConfigError, EdgeError
from fedipfs.ipld import dagcbor
from fedipfs.store import FolderStore
from fedipfs.strategies import STRATEGIES, Brief, build, load_state, save_state
from fedipfs.strategies.normclip import NormClip

BEGIN = {"w": np.array([1, 1], "f4"), "v": np.array([1], "f4")}
NODES = 8
OPTIONS = {"krum": {"num_malicious_nodes": 1}, "qfedavg": {"client_learning_rate": 0.1}}


def make(name: str, clip: float | None, **options):
    given = {"name": name, **OPTIONS.get(name, {}), **options, "clip_update_norm": clip}
    return build(given, Brief(NODES, 1, seed=1))


def moved(*deltas: tuple[float, float, float]) -> list[dict[str, np.ndarray]]:
    return [
        {"w": np.array([1 + a, 1 + b], "f4"), "v": np.array([1 + c], "f4")} for a, b, c in deltas
    ]


def test_only_what_is_too_long_is_shortened_over_all_tensors(store):
    one = OneRound(store, BEGIN, moved((2, 1, 2), (0, 0, 1), (0, 0, 0)))  # norms 3, 1 and 0
    strategy = make("average", 1.5)
    found = values(one.play(strategy))
    np.testing.assert_allclose(found["w"], [1 + 1 / 3, 1 + 0.5 / 3], rtol=1e-6)
    np.testing.assert_allclose(found["v"], [1 + 2 / 3], rtol=1e-6)
    clipped = {"norm": 1.5, "clipped": 1, "updates": [{"node": 2, "norm": 3.0}]}
    assert strategy.notes["clip_update_norm"] == clipped
    assert dagcbor.decode(dagcbor.encode(strategy.notes)) == strategy.notes


@pytest.mark.parametrize(
    "name", ["fedadam", "fedyogi", "fedavgm", "qfedavg", "fedavg", "krum", "rfa"]
)
def test_a_strategy_gets_the_clipped_updates_and_nothing_else_changes(store, name):
    """As if the clients had sent them; with a norm that none has, as if there were no clipping."""
    rng = np.random.default_rng(1)
    deltas = rng.normal(size=(NODES, 3)) * np.arange(1, NODES + 1)[:, None]
    one = OneRound(store, BEGIN, moved(*deltas))
    lengths = np.linalg.norm(deltas, axis=1, keepdims=True)
    by_hand = OneRound(store, BEGIN, moved(*(deltas * np.minimum(1, 2.0 / lengths))))
    ours, theirs = one.play(make(name, 2.0)), by_hand.play(make(name, None))
    assert dict(one.metrics) == dict(by_hand.metrics)
    for key, expected in values(theirs).items():
        np.testing.assert_allclose(ours[key].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert one.play(make(name, 1e9)).cid == one.play(make(name, None)).cid


@given(
    st.floats(1e-3, 1e3), st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3)
)
def test_no_update_moves_the_model_further_than_the_norm(tmp_path_factory, clip, delta):
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    model = {"w": np.zeros(2, "f4"), "v": np.zeros(1, "f4")}
    update = {"w": np.array(delta[:2], "f4"), "v": np.array(delta[2:], "f4")}
    found = values(OneRound(store, model, [update]).play(make("fedavg", clip)))
    assert np.linalg.norm(np.concatenate([found["w"], found["v"]]).astype("f8")) <= clip * 1.0001


def test_float64_too_large_to_square_is_clipped_all_the_same(store):
    model = {"w": np.array([-1e308, 1e308])}
    one = OneRound(store, model, [{"w": np.array([1e308, -1e308])}])
    strategy = make("average", 3.0)
    found = values(one.play(strategy))["w"]
    assert np.isfinite(found).all()
    assert strategy.notes["clip_update_norm"]["clipped"] == 1


def test_counters_are_neither_counted_nor_changed(store):
    model = {"w": np.zeros(1, "f4"), "n": np.array(5, "i8")}
    one = OneRound(store, model, [{"w": np.array([4], "f4"), "n": np.array(9000, "i8")}])
    found = values(one.play(make("fedavg", 1.0)))
    assert (found["w"], found["n"]) == ([1.0], 9000)


def test_the_replies_themselves_stay_as_they_were(store):
    """The round records the CIDs that clients sent and signed."""
    one = OneRound(store, BEGIN, moved((2, 1, 2), (0, 0, 1)))
    strategy = make("fedavg", 1.0)
    replies = one.replies(strategy)
    before = [reply.content["arrays"].cid for reply in replies]
    strategy.aggregate_train(1, replies)
    assert [reply.content["arrays"].cid for reply in replies] == before
    assert None not in before


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_an_update_that_cannot_be_measured_does_not_pass_unclipped(store, name):
    one = OneRound(store, BEGIN, moved((2, 1, 2), (0, 0, 1), (5, 5, 5)))
    strategy = make(name, 1.0)
    replies = one.replies(strategy)
    weights = replies[2].content["arrays"].weights
    read, failures = weights.piece, [BlockCorrupt("a block is damaged")]

    def fails_once(name: str, start: int) -> np.ndarray:
        if failures:
            raise failures.pop()
        return read(name, start)

    weights.piece = fails_once
    arrays, _ = strategy.aggregate_train(1, replies)
    without = OneRound(store, BEGIN, one.updates[:2]).play(make(name, 1.0))
    for key, expected in values(without).items():
        np.testing.assert_allclose(arrays[key].numpy(), expected, rtol=1e-6)


def test_a_nan_update_is_left_out_by_name(store):
    one = OneRound(store, BEGIN, moved((0.1, 0, 0), (float("nan"), 0, 0)))
    strategy = make("fedavg", 1.0)
    assert values(one.play(strategy))["w"] == pytest.approx([1.1, 1])
    assert "'w' holds NaN" in strategy.excluded[3]


def test_errors_of_clients_pass_through(store):
    one = OneRound(store, BEGIN, moved((0, 0, 1), (0, 0, 1)))
    strategy = make("fedavg", 1.0)
    replies = one.replies(strategy)
    replies[1] = Message(Error(2, "out of memory"), reply_to=replies[1])
    strategy.aggregate_train(1, replies)
    assert list(strategy.excluded.values()) == ["out of memory"]


def test_what_it_has_not_itself_is_the_strategys():
    krum = make("krum", 1.0)
    assert isinstance(krum, NormClip)
    assert (krum.screens_replies, krum.required, krum.num_malicious_nodes) == (True, 5, 1)
    assert (krum.weighted_by_key, krum.excluded) == ("num-examples", {})
    assert not hasattr(make("fedadam", 1.0), "screens_replies")
    assert make("fedadam", 1.0).notes["clip_update_norm"]["clipped"] == 0


def test_state_goes_on(store):
    one = OneRound(store, BEGIN, moved((2, 1, 2), (0, 0, 1)))
    strategy, restored = make("fedadam", 1.0), make("fedadam", 1.0)
    model = one.play(strategy)
    load_state(restored, store, save_state(strategy, store)[0])
    again = OneRound(store, model, one.updates)
    assert again.play(restored, 2).cid == again.play(strategy, 2).cid
    assert again.play(make("fedadam", 1.0), 2).cid != again.play(restored, 2).cid


@pytest.mark.parametrize("clip", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_norm_that_cannot_be_is_refused(clip):
    with pytest.raises(ConfigError, match=r"strategy\.clip_update_norm=\S+ must be a number above"):
        make("fedavg", clip)


def test_without_a_cid_grid_it_says_what_it_needs():
    from grids import DirectGrid
    from quickstart import plain_app

    from fedipfs.exchange import from_numpy

    strategy = NormClip(STRATEGIES["fedadam"](), 1.0)
    grid = DirectGrid(plain_app, 2)
    with pytest.raises(EdgeError, match="CidGrid"):
        strategy.start(grid=grid, initial_arrays=from_numpy({"a": np.zeros(2, "f4")}), num_rounds=1)
