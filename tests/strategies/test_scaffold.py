"""SCAFFOLD: one client is SGD; unequal quadratics meet at the true optimum; faults do no harm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fleet import QUADRATIC, Fleet
from flwr.app import Message
from runs import QUICK, play

from fedipfs import CidGrid
from fedipfs.errors import ConfigError
from fedipfs.exchange import cost_of, to_torch
from fedipfs.server import rounds
from fedipfs.strategies import load_state, save_state
from fedipfs.weights.compression import Decoded, Spec

RATE, STEPS = 0.1, 5
TWO = {"partition": "pathological", "classes_per_client": 1}


def quadratic(store, **changed) -> Fleet:
    train = {"steps": STEPS, "optimizer": {"name": "SGD", "lr": RATE}, **changed}
    return Fleet(store, QUADRATIC, clients=2, data=TWO, **train)


def by_hand(rounds: int, total: int = 2, eta_g: float = 1.0, curves=(1.0, 4.0), centres=(0.0, 1.0)):
    """Algorithm 1, written out for the two quadratics: x, c, c_1 and c_2 after each round."""
    x, c, own = 0.0, 0.0, [0.0, 0.0]
    for _ in range(rounds):
        ends, deltas = [], []
        for i, (curve, centre) in enumerate(zip(curves, centres, strict=True)):
            y = x
            for _ in range(STEPS):
                y -= RATE * (curve * (y - centre) + c - own[i])
            new = own[i] - c + (x - y) / (STEPS * RATE)
            ends.append(y)
            deltas.append(new - own[i])
            own[i] = new
        x += eta_g * (sum(ends) / 2 - x)
        c += sum(deltas) / total
        yield x, c, sorted(own)


@pytest.mark.parametrize("eta_g", [1.0, 0.7, 1.2])
def test_it_is_the_algorithm_written_out(store, eta_g):
    fleet = quadratic(store)
    strategy = fleet.build("scaffold", server_learning_rate=eta_g)
    for number, (x, c, own) in enumerate(by_hand(4, eta_g=eta_g), 1):
        assert fleet.play(strategy, number, number)["weight"].item() == pytest.approx(x, abs=1e-6)
        assert strategy.control["weight"].numpy().item() == pytest.approx(c, abs=1e-6)
        news = [context.state["control-new"] for context in fleet.raw.contexts.values()]
        assert sorted(new["weight"].numpy().item() for new in news) == pytest.approx(own, abs=1e-6)


def test_unequal_quadratics_meet_at_the_true_optimum_where_fedavgs_do_not(store):
    ends = {}
    for name in ("scaffold", "fedavg"):
        fleet = quadratic(store)
        ends[name] = fleet.play(fleet.build(name), 1, 40)["weight"].item()
    assert ends["scaffold"] == pytest.approx((1 * 0 + 4 * 1) / (1 + 4), abs=1e-4)
    shrink = [(1 - RATE * curve) ** STEPS for curve in (1.0, 4.0)]  # of the distance to each centre
    drifted = (1 - shrink[1]) / (2 - sum(shrink))
    assert drifted == pytest.approx(0.6925, abs=1e-4)
    assert ends["fedavg"] == pytest.approx(drifted, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"norm": True}])
def test_with_one_client_it_is_fedavg_to_the_bit(store, options):
    cids = []
    for name in ("scaffold", "fedavg"):
        fleet = Fleet(store, clients=1, epochs=2, options=options)
        fleet.play(fleet.build(name), 1, 3)
        cids.append(fleet.model.cid)
    assert cids[0] == cids[1]


def test_buffers_are_averaged_whatever_the_servers_rate(store):
    fleet = Fleet(store, clients=2, options={"norm": True})
    got = fleet.play(fleet.build("scaffold", server_learning_rate=0.5))
    means = [fleet.update(node)["2.running_mean"] for node in (2, 3)]
    torch.testing.assert_close(got["2.running_mean"], sum(means) / 2)
    assert set(fleet.update(2, "control")) == {
        "1.weight", "1.bias", "2.weight", "2.bias", "4.weight", "4.bias"
    }  # fmt: skip


def test_a_clients_answer_is_its_mean_gradient(store):
    """c + c_i+ - c_i = (x - y_i) / (K eta), whatever c and c_i are."""
    fleet = Fleet(store, clients=2, data={"partition": "dirichlet"}, steps=3)
    strategy = fleet.build("scaffold")
    fleet.play(strategy, 1, 2)
    before = fleet.model.to_torch_state_dict()
    fleet.play(strategy, 3, 3)
    for node in (2, 3):
        after, control = fleet.update(node), fleet.update(node, "control")
        for name in before:
            torch.testing.assert_close(
                control[name], (before[name] - after[name]) / (3 * 0.1), rtol=1e-4, atol=1e-6
            )


def controls(fleet: Fleet, strategy) -> np.ndarray:
    """The control variates that count at the clients, once they were told what was taken up."""
    return np.array(
        [
            (
                state["control-new"]
                if "control-new" in state
                and strategy.taken.get(str(node)) == state["control-round"]["round"]
                else state["control"]
            )["weight"].numpy().item()
            for node, state in ((n, c.state) for n, c in fleet.raw.contexts.items())
        ]
    )  # fmt: skip


def test_an_update_that_is_left_out_does_not_part_c_from_the_clients(store):
    fleet = quadratic(store)
    strategy = fleet.build("scaffold")
    fleet.play(strategy, 1, 2)

    def lose(reply: Message) -> None:
        if reply.metadata.src_node_id == 2:
            reply.content["metrics"]["num-examples"] = -1

    fleet.raw.tamper = lose
    fleet.play(strategy, 3, 4)
    assert list(strategy.excluded) == [2]
    fleet.raw.tamper = lambda reply: None
    for number in (5, 6):
        fleet.play(strategy, number, number)
        control = strategy.control["weight"].numpy().item()
        assert control == pytest.approx(controls(fleet, strategy).mean(), abs=1e-6)
    got = fleet.play(strategy, 7, 40)["weight"].item()
    assert got == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("text", ["int8 zstd", "topk fraction=0.1 zstd feedback"])
def test_compressed_models_leave_the_control_variates_as_they_are(store, text):
    fleet = Fleet(store, clients=3, data={"partition": "dirichlet"}, epochs=1)
    strategy = fleet.build("scaffold")
    spec = Spec.parse(text)
    fleet.grid = CidGrid(
        fleet.raw,
        store,
        read_updates=False,
        compression=spec,
        compress_models=spec.codec == "int8",
        exact=strategy.extra_arrays,
    )
    fleet.play(strategy, 1, 4)
    assert not strategy.excluded
    news = [to_torch(context.state["control-new"]) for context in fleet.raw.contexts.values()]
    for name, array in strategy.control.items():
        mean = sum(each[name].double() for each in news) / 3
        assert mean.abs().max() > 1e-3
        assert np.abs(array.numpy() - mean.numpy()).max() < 1e-6
    update = fleet.replies[0].content
    assert cost_of(update["arrays"]).error > 1e-4
    assert cost_of(update["control"]).error == 0


def test_a_run_says_which_records_are_exact(tmp_path, monkeypatch):
    told = []

    class Grid(CidGrid):
        def _update(self, *args):
            update = super()._update(*args)
            told.append((args[2], isinstance(update.weights, Decoded)))
            return update

    monkeypatch.setattr(rounds, "CidGrid", Grid)
    play(
        tmp_path, *QUICK, "strategy=scaffold", "compression=int8", "+strategy.clip_update_norm=9.0"
    )
    assert set(told) == {("arrays", True), ("control", False)}


def test_clients_that_take_part_now_and_then_meet_there_too(store):
    fleet = quadratic(store)
    strategy = fleet.build("scaffold")
    for number in range(1, 160):
        fleet.raw.nodes = [2 + number * number % 3 % 2]
        if number % 5 == 0:
            fleet.raw.nodes = [2, 3]
        fleet.play(strategy, number, number)
    assert strategy.control["weight"].numpy().item() == pytest.approx(0.0, abs=0.02)
    assert fleet.model["weight"].numpy().item() == pytest.approx(0.8, abs=0.02)


def test_a_restored_run_goes_on_as_if_never_stopped(store):
    def run(stop: bool):
        fleet = Fleet(store, clients=3, data={"partition": "dirichlet"})
        strategy = fleet.build("scaffold")
        fleet.play(strategy, 1, 2)
        if stop:
            state, linked = save_state(strategy, store)
            assert strategy.control.cid in linked
            strategy = fleet.build("scaffold")
            load_state(strategy, store, state)
        fleet.play(strategy, 3, 4)
        return fleet.model.cid, strategy.control.cid

    assert run(stop=True) == run(stop=False)


def test_a_bad_control_variate_leaves_the_client_out_by_name(store):
    from fedipfs.exchange import Exchange, from_numpy

    for bad, reason in (
        ({"weight": np.full((1, 1), np.nan, "f4")}, "NaN"),
        ({"weight": np.zeros((2, 1), "f4")}, "the model's is"),
        ({"bias": np.zeros((1, 1), "f4")}, "'weight' is missing"),
    ):
        fleet = quadratic(store)
        strategy = fleet.build("scaffold")

        def spoil(reply: Message, bad=bad) -> None:
            if reply.metadata.src_node_id == 3:
                content = Exchange(store).swap_in(reply.content)
                content["control"] = from_numpy(bad)
                reply.content = Exchange(store).swap_out(content)

        fleet.raw.tamper = spoil
        x = fleet.play(strategy)["weight"]
        assert list(strategy.excluded) == [3]
        assert reason in strategy.excluded[3]
        assert torch.equal(x, fleet.update(2)["weight"])
        assert strategy.taken == {"2": 1}


def test_a_client_that_sends_no_control_variate_is_left_out(store):
    fleet = Fleet(store, clients=3)
    strategy = fleet.build("scaffold")

    def forget(reply: Message) -> None:
        if reply.metadata.src_node_id == 2:
            del reply.content["fedipfs"]["cid:control"]

    fleet.raw.tamper = forget
    fleet.play(strategy)
    assert list(strategy.excluded) == [2]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"optimizer": {"name": "Adam", "lr": 0.1}}, r"train\.optimizer\.name=Adam must be SGD"),
        (
            {"optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}},
            r"~train\.optimizer\.momentum",
        ),
        ({"optimizer": {"name": "SGD", "lr": 0.1, "maximize": True}}, r"maximize=True"),
        (
            {"schedule": {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 9}},
            r"cycle_momentum=false",
        ),
    ],
)
def test_local_training_that_it_cannot_account_for_is_refused(store, train, says):
    with pytest.raises(ConfigError, match=says):
        Fleet(store, clients=2, **train).build("scaffold")


@pytest.mark.parametrize("rate", [0, -1, float("nan"), "fast", True])
def test_a_servers_rate_that_cannot_be_is_refused(store, rate):
    with pytest.raises(ConfigError, match=r"strategy\.server_learning_rate=.* above 0"):
        Fleet(store, clients=2).build("scaffold", server_learning_rate=rate)
