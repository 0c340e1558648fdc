"""The configuration: every experiment and every choice composes and fits the code."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp import strategy as flower
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import fedipfs.conf
from fedipfs import tasks
from fedipfs.server.words import quoted
from fedipfs.strategies import STRATEGIES, Brief
from fedipfs.strategies.catalogue import parameters

CONF = Path(next(iter(fedipfs.conf.__path__)))
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
GROUPS = (
    "task",
    "strategy",
    "compression",
    "privacy",
    "secagg",
    "attack",
    "store",
    "engine",
)
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted(CONF.glob(f"{group}/*.yaml"))]
# The parameters that every Flower strategy has are set from `clients`, not in strategy/*.yaml.
COMMON = set(inspect.signature(flower.FedAvg).parameters)


def make(*words: str) -> dict[str, Any]:
    with initialize_config_module("fedipfs.conf", version_base="1.3"):
        config = compose("config", list(words))
    made = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(made, dict)
    return made  # type: ignore[return-value]


def keys(section: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in section.items():
        if isinstance(value, dict) and key not in GROUPS:
            found |= keys(value, f"{prefix}{key}.")
        else:
            found.add(prefix + key)
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_has_a_task(name):
    config = make(f"+experiment={name}")
    assert config["experiment"] == name
    assert keys(config) >= keys(make()) - {"train.schedule"}
    assert 1 <= config["clients"]["per_round"] <= config["clients"]["total"]
    task = tasks.load(config["task"]["target"], config["task"]["options"])
    assert config["task"]["metric"] == task.metric
    assert sum(p.numel() for p in task.model().parameters()) > 0


def test_the_experiments_that_the_documentation_names_are_there():
    assert {
        "mnist", "mnist_noniid", "mnist_mcmahan", "lr_mnist_1000", "digits", "tabular",
        "digits_dp", "mnist_dp", "mnist_dp_secagg",
    } <= set(EXPERIMENTS)  # fmt: skip


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_says_its_name(group, choice):
    (word,) = quoted([f"{group}={choice}"])
    section = make(word)[group]
    assert section["kind" if group == "store" else "name"] == choice


@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "strategy"])
def test_strategy_files_list_all_options(choice):
    told = {field.name for field in dataclasses.fields(Brief)}
    cls = STRATEGIES[choice]
    theirs = set(parameters(cls)) - COMMON - told
    options = set(make(f"strategy={choice}")["strategy"]) - {"name"}
    assert options == theirs - {"train_loss_key", "selection_rule"}


def test_the_key_figures_of_the_experiments():
    lr = make("+experiment=lr_mnist_1000")
    assert (lr["clients"]["total"], lr["clients"]["per_round"]) == (1000, 10)
    assert (lr["train"]["batch_size"], lr["train"]["optimizer"]["lr"]) == (10, 0.03)
    assert (lr["rounds"], lr["train"]["epochs"]) == (100, 1)
    mcmahan = make("+experiment=mnist_mcmahan", "data.partition=shards")
    assert (mcmahan["clients"]["total"], mcmahan["clients"]["per_round"]) == (100, 10)
    assert mcmahan["data"]["shards_per_client"] == 2
    assert (
        make("+experiment=mnist_noniid")["data"] | {"partition": "dirichlet", "alpha": 0.5}
        == (make("+experiment=mnist_noniid")["data"])
    )


def test_values_follow_those_that_they_refer_to():
    config = make("clients.total=7", "runs_dir=/tmp/elsewhere", "strategy=qfedavg")
    assert config["clients"]["per_round"] == 7
    assert config["store"]["path"] == "/tmp/elsewhere/store"
    assert config["strategy"]["client_learning_rate"] == config["train"]["optimizer"]["lr"]


def test_an_unknown_experiment_is_refused():
    with pytest.raises(MissingConfigException, match="by_mood"):
        make("+experiment=by_mood")


def test_every_key_is_explained():
    text = (CONF / "config.yaml").read_text().split("\nhydra:")[0]
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#") and not line.endswith(":"):
            assert "#" in line or "override hydra/" in line or "_self_" in line, line
