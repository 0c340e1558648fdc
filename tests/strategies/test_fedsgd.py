"""FedSGD: the gradient of all clients' loss, and a step of any of torch's optimizers."""

from __future__ import annotations

import pytest
import torch
from fleet import QUADRATIC, Fleet

from fedipfs.errors import ConfigError, Diverged
from fedipfs.strategies import load_state, save_state
from fedipfs.tasks import optim


def pooled(fleet: Fleet, optimizer: dict, rounds: int) -> dict[str, torch.Tensor]:
    """The same on all examples in one place."""
    data = fleet.task.data(root=None, fallback="digits").train
    x, y = fleet.task.inputs(data.inputs), fleet.task.targets(data.targets)
    model = fleet.task.model()
    torch.manual_seed(1)
    model.load_state_dict(fleet.task.model().state_dict())
    step = optim.optimizer(model.parameters(), optimizer)
    for _ in range(rounds):
        step.zero_grad()
        fleet.task.loss(model(x), y).backward()
        step.step()
    return model.state_dict()


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "SGD", "lr": 0.3},
        {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"name": "Adam", "lr": 0.01, "betas": [0.8, 0.99]},
        {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1},
        {"name": "RMSprop", "lr": 0.001, "momentum": 0.5},
    ],
)
def test_it_is_the_optimizer_on_the_pooled_gradient(store, optimizer):
    fleet = Fleet(store, clients=3, batch_size=7)
    expected = pooled(fleet, optimizer, 4)
    got = fleet.play(fleet.build("fedsgd", optimizer=optimizer), 1, 4)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-4, atol=2e-6)
    assert fleet.metrics["steps"] == 1


def test_with_sgd_it_is_fedavg_with_one_full_batch_step(store):
    rounds = dict(clients=4, data={"partition": "dirichlet"}, clip_norm=0.5)
    one = Fleet(store, **rounds, batch_size=10_000)
    other = Fleet(store, **rounds, batch_size=3)
    expected = one.play(one.build("fedavg"), 1, 3)
    got = other.play(other.build("fedsgd", optimizer={"name": "SGD", "lr": 0.1}), 1, 3)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)


def test_buffers_are_averaged_and_what_is_frozen_stays(store, tmp_path):
    file = tmp_path / "frozen.py"
    file.write_text(
        "from fedipfs.tasks.small import Digits\n"
        "class Frozen(Digits):\n"
        "    def model(self):\n"
        "        model = super().model()\n"
        "        model[1].weight.requires_grad_(False)\n"
        "        return model\n"
    )
    fleet = Fleet(store, f"{file}:Frozen", clients=2, options={"norm": True})
    first = {name: each.clone() for name, each in fleet.model.to_torch_state_dict().items()}
    strategy = fleet.build("fedsgd", optimizer={"name": "AdamW", "lr": 0.1, "weight_decay": 1})
    got = fleet.play(strategy)
    assert torch.equal(got["1.weight"], first["1.weight"])
    assert not torch.equal(got["1.bias"], first["1.bias"])
    assert torch.equal(fleet.update(2)["1.weight"], torch.zeros_like(first["1.weight"]))
    means = [fleet.update(node)["2.running_mean"] for node in (2, 3)]
    assert not torch.equal(*means)
    torch.testing.assert_close(got["2.running_mean"], sum(means) / 2, rtol=0.01, atol=1e-3)
    assert got["2.num_batches_tracked"] == fleet.update(2)["2.num_batches_tracked"] > 0


@pytest.mark.parametrize("name", sorted(set(optim._optimizers()) - {"muon"}))
def test_every_optimizer_goes_on_after_a_resume(store, name):
    def make(fleet):
        return fleet.build("fedsgd", optimizer={"name": name, "lr": 0.01})

    fleet = Fleet(store, clients=2)
    strategy = make(fleet)
    fleet.play(strategy, 1, 2)
    half, state = fleet.model, save_state(strategy, store)[0]
    fleet.play(strategy, 3, 4)
    whole, fleet.model = fleet.model, half
    restored = make(fleet)
    load_state(restored, store, state)
    fleet.play(restored, 3, 4)
    assert fleet.model.cid == whole.cid
    if name in ("adam", "adagrad", "rmsprop"):  # it matters
        fleet.model = half
        fleet.play(make(fleet), 3, 4)
        assert fleet.model.cid != whole.cid


def test_a_step_that_overflows_ends_the_run_with_the_remedy(store):
    fleet = Fleet(store, QUADRATIC, clients=2)
    strategy = fleet.build("fedsgd", optimizer={"name": "SGD", "lr": 3e38})
    with pytest.raises(Diverged, match=r"strategy\.optimizer\.lr"):
        fleet.play(strategy)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": {"name": "Adan"}}, r"strategy\.optimizer\.name=Adan is unknown.*Adam"),
        ({"optimizer": {"name": "SGD", "lr": -1}}, r"strategy\.optimizer\.lr=-1 must be a number"),
        ({"optimizer": {"name": "LBFGS"}}, r"name=LBFGS is unknown"),
        ({"optimizer": "SGD"}, r"strategy\.optimizer=SGD must have a name"),
        ({"optimizer": {"name": "SGD", "nesterov": True}}, r"\+strategy\.optimizer\.momentum=0\.9"),
        ({"optimizer": {"name": "SGD"}, "clip_update_norm": 1.0}, r"set train\.clip_norm"),
        ({"optimizer": {"name": "Muon"}}, r"name=Muon cannot .* takes matrices only"),
        ({"optimizer": {"name": "SGD", "differentiable": True}}, r"differentiable=true cannot be"),
        ({"optimizer": {"name": "Adam", "capturable": True}}, r"capturable=true .*~strategy\."),
        ({}, r"optimizer"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(store, options, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Fleet(store, clients=2).build("fedsgd", **options)
    assert "\n" not in str(caught.value)
