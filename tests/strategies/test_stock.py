"""Flower's strategies by name: unchanged results, state that survives."""

from __future__ import annotations

import random

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp import strategy as flower
from grids import DirectGrid
from quickstart import app, plain_app

from fedipfs import CidGrid, FedAvg
from fedipfs.errors import ConfigError
from fedipfs.exchange import from_numpy, specs_of, store_arrays
from fedipfs.strategies import STRATEGIES, Brief, build, load_state, save_state

NODES = 8
BRIEF = Brief(per_round=NODES, min_successes=1)
OPTIONS = {
    "fedavgm": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "fedprox": {"proximal_mu": 0.1},
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "bulyan": {"num_malicious_nodes": 1},
    "qfedavg": {"client_learning_rate": 0.1},
}
ISSUE = [
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "fedavgm",
    "fedprox",
    "krum",
    "multikrum",
    "bulyan",
    "fedmedian",
    "fedtrimmedavg",
    "qfedavg",
]


def initial():
    rng = np.random.default_rng(3)
    return {"z": rng.normal(size=(6, 5)).astype("f4"), "a": rng.normal(size=(7,)).astype("f4")}


# Flower's classes under whose names there are ours (test_robust.py compares them).
REPLACED = {
    "fedprox": flower.FedProx,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
}


def stock(name: str):
    """Flower's own class of that name."""
    return REPLACED[name](**OPTIONS.get(name, {})) if name in REPLACED else make(name)


def make(name: str):
    return build({"name": name, **OPTIONS.get(name, {})}, BRIEF)


def play(grid, strategy, arrays, first: int, last: int):
    """Rounds as `Strategy.start` plays them."""
    for number in range(first, last + 1):
        random.seed(number)
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(number, list(grid.send_and_receive(messages)))
    return arrays


def test_all_names_of_the_documentation_are_there():
    assert set(STRATEGIES) >= {"fedavg", *ISSUE}


@pytest.mark.parametrize("name", ISSUE)
def test_results_equal_those_of_the_plain_strategy(store, name):
    from fedipfs.exchange import use_store

    use_store(store)
    plain = play(DirectGrid(plain_app, NODES), stock(name), from_numpy(initial()), 1, 3)
    ours = play(CidGrid(DirectGrid(app, NODES), store), stock(name), from_numpy(initial()), 1, 3)
    assert list(ours) == list(plain)
    for key in plain:
        np.testing.assert_allclose(
            ours[key].numpy(), plain[key].numpy(), rtol=1e-6, atol=1e-6, err_msg=key
        )


@pytest.mark.parametrize("name", ["fedavg", *ISSUE])
def test_a_strategy_restored_from_its_state_goes_on_as_if_never_stopped(store, name):
    from fedipfs.exchange import use_store

    use_store(store)

    def grid():
        read = not getattr(make(name), "screens_replies", False)
        return CidGrid(DirectGrid(app, NODES), store, read_updates=read)

    def kept(arrays):
        return store_arrays(store, arrays, specs_of(from_numpy(initial())))

    strategy = make(name)
    half = kept(play(grid(), strategy, kept(from_numpy(initial())), 1, 2))
    state, _ = save_state(strategy, store)
    whole = play(grid(), strategy, half, 3, 4)
    restored = make(name)
    load_state(restored, store, state)
    again = play(grid(), restored, kept(half), 3, 4)
    assert kept(again).cid == kept(whole).cid
    assert save_state(restored, store) == save_state(strategy, store)


def test_moments_matter(store):
    """The test above would pass for a state that says nothing; this shows it does not."""
    from fedipfs.exchange import use_store

    use_store(store)
    for name in ("fedadam", "fedyogi", "fedadagrad", "fedavgm"):
        strategy, fresh = make(name), make(name)
        half = play(CidGrid(DirectGrid(app, NODES)), strategy, from_numpy(initial()), 1, 2)
        whole = play(CidGrid(DirectGrid(app, NODES)), strategy, half, 3, 3)
        forgot = play(CidGrid(DirectGrid(app, NODES)), fresh, half, 3, 3)
        assert not np.allclose(whole["z"].numpy(), forgot["z"].numpy()), name


def test_nested_strategies_are_saved_too(store):
    def wrapped():
        inner = make("fedadam")
        return flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, NODES)

    one, other = wrapped(), wrapped()
    one.strategy.m_t = {"w": np.ones(3)}
    one.current_arrays = from_numpy({"w": np.zeros(3, "f4")})
    load_state(other, store, save_state(one, store)[0])
    np.testing.assert_array_equal(other.strategy.m_t["w"], np.ones(3))


def test_state_of_an_unknown_type_is_refused_with_the_remedy(store):
    strategy = FedAvg()
    strategy.memory = {1, 2}
    with pytest.raises(ConfigError, match=r"FedAvg\.memory is a set"):
        save_state(strategy, store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fedavgg"}, "did you mean 'fedavg'"),
        ({"name": "fedadam", "etaa": 1}, "'etaa'; did you mean 'eta'"),
        ({"name": "krum", "num_malicious_nodes": 3}, "needs at least 9 clients"),
        ({"name": "bulyan", "num_malicious_nodes": 2}, "needs at least 11 clients"),
        ({"name": "fedtrimmedavg", "beta": 0.7}, "beta"),
        ({"name": "qfedavg"}, "client_learning_rate"),
        ({}, "unknown strategy ''"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(options, BRIEF)
