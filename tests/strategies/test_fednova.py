"""FedNova: changes per step are averaged; steps that cannot be are not believed."""

from __future__ import annotations

import pytest
import torch
from fleet import QUADRATIC, Fleet
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import ConfigError
from fedipfs.exchange import from_torch, store_arrays
from fedipfs.strategies.fednova import accumulated

TWO = {"partition": "pathological", "classes_per_client": 1}
SGD = {"name": "SGD", "lr": 0.1}


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_with_momentum_it_is_the_papers_closed_form(steps, rho):
    expected = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    assert accumulated(steps, momentum=rho) == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 60), st.floats(1e-3, 1))
def test_with_a_proximal_term_it_is_the_papers_closed_form(steps, pull):
    expected = (1 - (1 - pull) ** steps) / pull
    assert accumulated(steps, pull=pull) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=25)
@given(st.integers(1, 30), st.floats(0, 0.95), st.floats(0, 0.9))
def test_it_is_what_torchs_sgd_makes_of_gradients_of_one(steps, rho, pull):
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rate = 0.5
    optimizer = torch.optim.SGD([w], lr=rate, momentum=rho)
    for _ in range(steps):
        w.grad = 1 + (pull / rate) * w.detach()
        optimizer.step()
    got = accumulated(steps, momentum=rho, pull=pull)
    assert got == pytest.approx(-w.item() / rate, rel=1e-6)
    assert got > 0


def test_steps_beyond_all_reason_cost_nothing():
    assert accumulated(2**50) == 2**50


@pytest.mark.parametrize("options", [{}, {"norm": True}])
@pytest.mark.parametrize(("mu", "momentum"), [(0.0, 0.0), (0.0, 0.9), (0.5, 0.0), (0.1, 0.5)])
def test_with_equal_steps_it_is_fedavg(store, mu, momentum, options):
    train = {"optimizer": {**SGD, "momentum": momentum}, "batch_size": 50}
    got = []
    for name in ("fednova", "fedprox"):
        fleet = Fleet(store, clients=3, options=options, **train)
        got.append(fleet.play(fleet.build(name, proximal_mu=mu), 1, 2))
    for name in got[0]:
        torch.testing.assert_close(got[0][name], got[1][name], rtol=0, atol=1e-6)


def test_two_quadratics_with_unequal_steps_by_hand(store):
    """4 examples, so 4 steps on w^2 / 2, and 12 steps on 2 (w - 1)^2.

    From w = 0.5: y_0 = 0.5 * 0.9^4 = 0.32805 and y_1 = 1 - 0.5 * 0.6^12 = 0.998911609...
    d_0 = (0.5 - y_0) / 4, d_1 = (0.5 - y_1) / 12, p = (1/4, 3/4), tau_eff = 10.
    """
    fleet = Fleet(store, QUADRATIC, clients=2, data=TWO, options={"counts": [4, 12]}, batch_size=1)
    fleet.model = store_arrays(fleet.vault, from_torch({"weight": torch.tensor([[0.5]])}))
    strategy = fleet.build("fednova")
    got = fleet.play(strategy)["weight"].item()
    assert got == pytest.approx(0.5 - 10 * (0.17195 / 4 / 4 - 0.498911609 / 12 * 3 / 4), abs=1e-6)
    assert got == pytest.approx(0.7043510, abs=1e-6)
    notes = strategy.notes
    assert notes["effective_steps"] == pytest.approx(10)
    assert sorted(each["steps"] for each in notes["updates"]) == [4, 12]
    assert sorted(each["weight"] for each in notes["updates"]) == pytest.approx([0.625, 0.625])


def test_its_fixed_point_is_the_optimum_where_fedavgs_leans_to_the_hasty_client(store):
    """Steps of both are small here, so that only their number parts FedAvg from the optimum."""
    ends = {}
    for name in ("fednova", "fedavg"):
        fleet = Fleet(
            store,
            QUADRATIC,
            clients=2,
            data=TWO,
            options={"counts": [2, 8], "curves": [1.0, 1.0]},
            batch_size=1,
            optimizer={"name": "SGD", "lr": 0.02},
        )
        ends[name] = fleet.play(fleet.build(name), 1, 50)["weight"].item()
    assert ends["fednova"] == pytest.approx(0.8, abs=0.02)
    assert ends["fedavg"] > 0.9


@pytest.mark.parametrize(
    "steps", [0, -3, 1.5, 10**9, float("inf"), float("nan"), 17, "missing", [3, 3]]
)
def test_steps_that_cannot_be_leave_the_client_out_by_name(store, steps):
    fleet = Fleet(store, clients=3)  # 509 examples in batches of 32: 16 steps
    strategy = fleet.build("fednova")

    def lie(reply) -> None:
        if reply.metadata.src_node_id == 3:
            if steps == "missing":
                del reply.content["metrics"]["steps"]
            else:
                reply.content["metrics"]["steps"] = steps

    fleet.raw.tamper = lie
    fleet.play(strategy)
    assert list(strategy.excluded) == [3]
    assert [each["node"] for each in strategy.notes["updates"]] == [2, 4]


def test_fewer_steps_than_asked_for_are_believed(store):
    fleet = Fleet(store, clients=3)
    strategy = fleet.build("fednova")

    def less(reply) -> None:
        if reply.metadata.src_node_id == 3:
            reply.content["metrics"]["steps"] = 5

    fleet.raw.tamper = less
    fleet.play(strategy)
    by_node = {each["node"]: each for each in strategy.notes["updates"]}
    assert by_node[3]["weight"] == pytest.approx(16 / 5 * by_node[2]["weight"], rel=0.01)


@pytest.mark.parametrize(
    ("train", "options", "says"),
    [
        (
            {"optimizer": {"name": "Adam", "lr": 0.1}},
            {},
            r"train\.optimizer\.name=Adam must be SGD",
        ),
        (
            {"optimizer": {**SGD, "momentum": 0.9, "nesterov": True}},
            {},
            r"train\.optimizer\.nesterov=True",
        ),
        ({"optimizer": {**SGD, "dampening": 0.5}}, {}, r"dampening=0\.5"),
        ({}, {"proximal_mu": 10}, r"overshoot; lower one"),
        ({}, {"proximal_mu": -1}, r"proximal_mu=-1 must be a number of at least 0"),
        ({"clip_norm": 1.0}, {"proximal_mu": 0.1}, r"train\.clip_norm=null"),
    ],
)
def test_local_training_that_it_cannot_account_for_is_refused(store, train, options, says):
    with pytest.raises(ConfigError, match=says):
        Fleet(store, clients=2, **train).build("fednova", **options)
