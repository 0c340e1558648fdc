"""Local training against a loop written out, and what it refuses."""

from __future__ import annotations

import copy
import math
import time

import numpy as np
import pytest
import torch

from fedipfs.clients import trainer
from fedipfs.errors import ConfigError, DataError
from fedipfs.tasks import Task

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
SGD = {"name": "SGD", "lr": 0.1}


class Toy(Task):
    def __init__(self, dropout: float = 0.0) -> None:
        self.dropout = dropout

    def model(self):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 5),
            torch.nn.Tanh(),
            torch.nn.Dropout(self.dropout),
            torch.nn.Linear(5, 2),
        )

    def data(self, *, root, fallback):
        raise NotImplementedError


def config(**changed):
    return {
        "batch_size": 8,
        "epochs": 1,
        "steps": None,
        "optimizer": SGD,
        "schedule": None,
        "clip_norm": None,
        "device": "cpu",
        **changed,
    }


def train(
    model=None, *, task=None, x=X, y=Y, seed=3, server_round=1, mu=0.0, correction=None, **changed
):
    task = task or Toy()
    model = task.model() if model is None else model
    got = trainer.train(
        task,
        model,
        x,
        y,
        config=config(**changed),
        seed=seed,
        server_round=server_round,
        proximal_mu=mu,
        correction=correction,
    )
    return model, got


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_equal_to_a_loop_written_out():
    model, got = train(epochs=2, mu=0.3, clip_norm=0.5)
    other = Toy().model()
    start = [parameter.detach().clone() for parameter in other.parameters()]
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    shuffle = torch.Generator().manual_seed(3)
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    losses = []
    for _ in range(2):
        for batch in torch.randperm(50, generator=shuffle).split(8):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(other(x[batch]), y[batch])
            losses += [loss.item()] * len(batch)
            near = sum(((p - s) ** 2).sum() for p, s in zip(other.parameters(), start, strict=True))
            (loss + 0.3 / 2 * near).backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
            optimizer.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-6, atol=1e-7)
    assert got == {
        "train_loss": pytest.approx(np.mean(losses)),
        "num-examples": 50,
        "steps": 14,
    }
    assert type(got["num-examples"]) is int and type(got["steps"]) is int


def test_the_seed_decides_all_and_nothing_else_does():
    task = Toy(dropout=0.5)
    one, _ = train(task=task, seed=7)
    torch.rand(3)  # another client's draws
    two, _ = train(task=task, seed=7)
    other, _ = train(task=task, seed=8)
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


def test_steps_win_over_epochs_and_may_pass_over_the_data_again():
    _, got = train(steps=3, epochs=100)
    assert got["steps"] == 3
    _, got = train(steps=20)
    assert (got["steps"], got["num-examples"]) == (20, 50)


def test_a_batch_larger_than_the_data_is_one_step():
    _, got = train(batch_size=1000)
    assert got["steps"] == 1


def test_the_proximal_term_holds_the_model_back():
    start = weights(Toy().model())
    free, near = (weights(train(epochs=20, mu=mu)[0]) for mu in (0.0, 5.0))
    assert (near - start).norm() < 0.5 * (free - start).norm()


def test_clipping_bounds_the_step():
    start = weights(Toy().model())
    model, _ = train(steps=1, clip_norm=0.01)
    assert (weights(model) - start).norm() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_frozen_parameters_stay():
    model = Toy().model()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    train(model, mu=0.1, clip_norm=1.0)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[3].weight, before[3].weight)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        train(model)


@pytest.mark.parametrize("name", ["sgd", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_optimizers_by_name_in_any_case(name):
    model, got = train(epochs=3, optimizer={"name": name, "lr": 0.05})
    assert math.isfinite(got["train_loss"])
    assert not torch.equal(weights(model), weights(Toy().model()))


def test_the_rate_is_the_rounds():
    schedule = {"name": "StepLR", "step_size": 2, "gamma": 0.1}
    start = weights(Toy().model())
    moved = [
        (weights(train(steps=1, server_round=r, schedule=schedule)[0]) - start).norm().item()
        for r in (1, 2, 3, 5)
    ]
    assert moved[1] == moved[0]
    assert moved[2] == pytest.approx(moved[0] / 10, rel=1e-3)
    assert moved[3] == pytest.approx(moved[0] / 100, rel=1e-2)


@pytest.mark.filterwarnings("error")
def test_a_schedule_warns_of_nothing():
    train(server_round=4, schedule={"name": "CosineAnnealingLR", "T_max": 10})


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"optimizer": {"name": "Adan", "lr": 0.1}}, r"train\.optimizer\.name=Adan.*Adam"),
        ({"optimizer": {"name": "LBFGS"}}, r"name=LBFGS is unknown"),
        ({"optimizer": {"lr": 0.1}}, r"name=None is unknown"),
        ({"optimizer": {"name": "SGD", "lr": -1}}, r"SGD does not work with lr=-1"),
        ({"optimizer": {"name": "SGD", "lr": "fast"}}, r"SGD does not work with lr=fast"),
        ({"optimizer": {"name": "Adam", "momentum": 0.9}}, r"momentum.*~train\.optimizer"),
        ({"schedule": {"name": "StepLT", "step_size": 1}}, r"train\.schedule\.name=StepLT.*StepLR"),
        ({"schedule": {"name": "StepLR"}}, r"StepLR does not work with no options"),
        ({"schedule": {"name": "ChainedScheduler"}}, r"ChainedScheduler does not work"),
        ({"schedule": {"name": "LambdaLR", "lr_lambda": "x"}}, r"LambdaLR"),
        ({"schedule": {"name": "ReduceLROnPlateau"}}, r"cannot reach round 9"),
        ({"schedule": {"name": "OneCycleLR", "max_lr": 1, "total_steps": 4}}, r"cannot reach"),
        ({"batch_size": 0}, r"train\.batch_size=0"),
        ({"batch_size": 2.5}, r"train\.batch_size=2\.5"),
        ({"epochs": 0}, r"train\.epochs=0"),
        ({"steps": True}, r"train\.steps=True"),
        ({"clip_norm": 0}, r"train\.clip_norm=0"),
        ({"clip_norm": "much"}, r"train\.clip_norm=much"),
        ({"optimizer": None}, r"train\.optimizer=None must have a name"),
        ({"schedule": "StepLR"}, r"train\.schedule=StepLR must have a name"),
        ({"device": "tpu"}, r"train\.device=tpu"),
    ],
)
def test_bad_settings_are_one_clear_line(changed, match):
    with pytest.raises(ConfigError, match=match) as caught:
        train(server_round=9, **changed)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none():
    with pytest.raises(ConfigError, match="no CUDA device"):
        train(device="cuda")
    assert train(device="auto")[1]["steps"] == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_cuda_learns_the_same_and_gives_the_model_back():
    model, got = train(device="cuda", epochs=3)
    other, expected = train(device="cpu", epochs=3)
    assert next(model.parameters()).device.type == "cpu"
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-3, atol=1e-4)
    assert got["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)


def test_no_examples_is_refused():
    with pytest.raises(DataError, match="no training examples"):
        train(x=X[:0], y=Y[:0])


def test_the_data_may_be_read_only():
    x, y = X.copy(), Y.copy()
    x.flags.writeable = y.flags.writeable = False
    model, _ = train(x=x, y=y)
    assert torch.equal(weights(model), weights(train()[0]))


def test_a_call_costs_hardly_more_than_its_steps():
    """Everything besides the steps takes about 0.1 ms; a busy machine may take ten times that."""

    def loop(model, count):
        x, y = torch.tensor(X), torch.tensor(Y)
        for _ in range(count):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for batch in torch.randperm(50).split(8):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()

    def ours(model, count):
        for _ in range(count):
            train(model)

    def best(function):
        times = []
        for _ in range(5):
            began = time.process_time()  # other processes do not count
            function(Toy().model(), 20)
            times.append((time.process_time() - began) / 20)
        return min(times)

    best(loop)  # torch's first optimizer imports a good deal
    assert best(ours) - best(loop) < 1e-3


def test_a_correction_is_added_to_every_gradient_after_clipping():
    terms = {name: torch.full_like(p, 0.3) for name, p in Toy().model().named_parameters()}
    model, _ = train(epochs=2, clip_norm=0.5, correction=terms)
    other = Toy().model()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    shuffle = torch.Generator().manual_seed(3)
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    for _ in range(2):
        for batch in torch.randperm(50, generator=shuffle).split(8):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(other(x[batch]), y[batch]).backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
            for name, parameter in other.named_parameters():
                parameter.grad += terms[name]
            optimizer.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-6, atol=1e-7)


def test_a_correction_moves_a_parameter_without_a_gradient_too():
    class Idle(Toy):
        def model(self):
            model = super().model()
            model.register_parameter("idle", torch.nn.Parameter(torch.zeros(2)))
            return model

    task = Idle()
    terms = {name: torch.ones_like(p) for name, p in task.model().named_parameters()}
    model, _ = train(task=task, steps=4, correction=terms)
    torch.testing.assert_close(model.idle.detach(), torch.full((2,), -0.4))
    assert torch.equal(terms["idle"], torch.ones(2))


def test_no_correction_changes_no_bit():
    terms = {name: torch.zeros_like(p) for name, p in Toy().model().named_parameters()}
    assert torch.equal(weights(train(correction=terms)[0]), weights(train()[0]))


def gradient(model, *, task=None, batch_size=50, seed=3, **changed):
    return trainer.gradient(
        task or Toy(), model, X, Y, config=config(**changed), seed=seed, batch_size=batch_size
    )


@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_the_gradient_is_that_of_the_mean_loss_whatever_the_batch(batch_size):
    model = Toy().model()
    before = weights(model)
    answer, got = gradient(model, batch_size=batch_size)
    other = Toy().model()
    loss = torch.nn.functional.cross_entropy(other(torch.from_numpy(X)), torch.from_numpy(Y))
    loss.backward()
    assert list(answer) == list(model.state_dict())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(answer[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert got == {"train_loss": pytest.approx(loss.item()), "num-examples": 50, "steps": 1}
    assert torch.equal(weights(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_is_clipped_frozen_parameters_have_none_and_dropout_follows_the_seed():
    model = Toy().model()
    answer, _ = gradient(model, clip_norm=0.01)
    norm = torch.cat([each.flatten() for each in answer.values()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-4)
    model[0].requires_grad_(False)
    answer, _ = gradient(model)
    assert not answer["0.weight"].any() and answer["3.weight"].any()
    task = Toy(dropout=0.5)
    one, two, other = (gradient(task.model(), task=task, seed=s)[0] for s in (7, 7, 8))
    assert torch.equal(one["3.weight"], two["3.weight"])
    assert not torch.equal(one["3.weight"], other["3.weight"])


def test_the_gradient_of_no_examples_is_refused():
    with pytest.raises(DataError, match="no training examples"):
        trainer.gradient(Toy(), Toy().model(), X[:0], Y[:0], config=config(), seed=1, batch_size=5)
