"""What the server says of optimizers and schedules before a client makes one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedipfs.errors import ConfigError
from fedipfs.tasks import optim

SGD = {"name": "SGD", "lr": 0.1}


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD,
        {"name": "sgd", "lr": 1, "momentum": 0.9, "nesterov": True},
        {"name": "Adam", "lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "amsgrad": True},
        {"name": "AdamW", "weight_decay": 0.1, "foreach": None},
        {"name": "RMSprop", "alpha": 0.9, "momentum": 0.1},
        {"name": "Adafactor", "eps": [None, 0.001]},
        {"name": "Rprop", "etas": [0.5, 1.2]},
        {"name": "Adagrad", "lr_decay": 0.1},
        {"name": "Adadelta", "rho": 0.5},
    ],
)
def test_what_is_accepted_can_be_made(optimizer):
    optim.check({"optimizer": optimizer, "schedule": None})
    made = optim.optimizer(torch.nn.Linear(2, 2).parameters(), optimizer)
    assert type(made).__name__.lower() == optimizer["name"].lower()


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "StepLR", "step_size": 2, "gamma": 0.5},
        {"name": "MultiStepLR", "milestones": [2, 4]},
        {"name": "ExponentialLR", "gamma": 0.9},
        {"name": "CosineAnnealingLR", "T_max": 10},
        {"name": "CosineAnnealingWarmRestarts", "T_0": 3, "T_mult": 2},
        {"name": "LinearLR", "start_factor": 0.5, "total_iters": 4},
        {"name": "PolynomialLR", "total_iters": 9, "power": 2.0},
        {"name": "OneCycleLR", "max_lr": 0.5, "total_steps": 9, "cycle_momentum": False},
    ],
)
def test_a_schedule_that_is_accepted_can_be_walked(schedule):
    optim.check({"optimizer": SGD, "schedule": schedule})
    made = optim.optimizer(torch.nn.Linear(2, 2).parameters(), SGD)
    optim.apply_schedule(made, schedule, server_round=5)
    assert made.param_groups[0]["lr"] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": "abc"}, r"train\.optimizer\.lr=abc must be a number above 0"),
        ({"lr": -1}, r"train\.optimizer\.lr=-1 must be a number above 0"),
        ({"lr": 0}, r"lr=0 "),
        ({"lr": True}, r"lr=True "),
        ({"lr": None}, r"lr=None "),
        ({"lr": float("nan")}, r"lr=nan "),
        ({"lr": float("inf")}, r"lr=inf "),
        ({"lr": [0.1]}, r"lr=\[0\.1\] "),
        ({"momentum": -0.1}, r"momentum=-0\.1 must be a number of at least 0"),
        ({"weight_decay": -1}, r"weight_decay=-1 must be a number of at least 0"),
        ({"weight_decay": "x"}, r"weight_decay=x"),
        ({"nesterov": 1, "momentum": 0.9}, r"nesterov=1 must be true or false"),
        ({"nesterov": True}, r"nesterov=true needs a momentum"),
        ({"name": "Adam", "betas": [0.9, 1]}, r"betas=\[0\.9, 1\] must be 2 numbers from 0"),
        ({"name": "Adam", "betas": 0.9}, r"betas=0\.9 must be 2 numbers.*\[0\.9,0\.999\]"),
        ({"name": "Adam", "eps": -1}, r"eps=-1"),
        ({"name": "Adadelta", "rho": 2}, r"rho=2 must be a number from 0 to 1"),
        ({"speed": 1}, r"speed=1.*~train\.optimizer\.OPTION"),
    ],
)
def test_a_wrong_option_is_named(options, says):
    with pytest.raises(ConfigError, match=says):
        optim.check({"optimizer": {**SGD, **options}, "schedule": None})


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"name": "StepLR", "step_size": 0}, r"train\.schedule\.step_size=0 must be a whole"),
        ({"name": "StepLR", "step_size": 1.5}, r"step_size=1\.5 must be a whole number"),
        ({"name": "StepLR"}, r"StepLR does not work with no options"),
        ({"name": "ExponentialLR", "gamma": "x"}, r"gamma=x must be a number of at least 0"),
        ({"name": "ExponentialLR", "gamma": -1}, r"gamma=-1"),
        ({"name": "LinearLR", "start_factor": 0}, r"start_factor=0 must be a number above 0"),
        ({"name": "LambdaLR", "lr_lambda": "x"}, r"LambdaLR cannot be used: it needs a function"),
        ({"name": "ReduceLROnPlateau"}, r"it needs a metric"),
    ],
)
def test_a_wrong_schedule_is_named(schedule, says):
    with pytest.raises(ConfigError, match=says):
        optim.check({"optimizer": SGD, "schedule": schedule})


def test_checking_makes_no_optimizer():
    """The first one of a process costs more than a second of imports."""
    code = (
        "import sys; from fedipfs.tasks import optim;"
        "optim.check({'optimizer': {'name': 'Adam', 'lr': 0.1},"
        " 'schedule': {'name': 'StepLR', 'step_size': 1}});"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_rate_of_a_round():
    train = {"optimizer": SGD, "schedule": {"name": "StepLR", "step_size": 2, "gamma": 0.5}}
    rates = [optim.learning_rate(train, server_round=number) for number in (1, 2, 3, 5)]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.025])
    assert optim.learning_rate({**train, "schedule": None}, server_round=9) == 0.1


def test_another_setting_is_named_as_it_is_called():
    with pytest.raises(ConfigError, match=r"strategy\.optimizer\.lr=-1 must be a number"):
        optim.check_optimizer({**SGD, "lr": -1}, "strategy.optimizer")
    with pytest.raises(ConfigError, match=r"strategy\.optimizer\.name=Adan is unknown"):
        optim.optimizer(torch.nn.Linear(1, 1).parameters(), {"name": "Adan"}, "strategy.optimizer")
