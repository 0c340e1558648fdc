"""What a run needs and what can fail before it leaves a trace: store, task, data, strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedipfs import data, tasks
from fedipfs.data import Dataset, Examples
from fedipfs.errors import BadUpdate, ConfigError
from fedipfs.exchange import (
    StoredArrays,
    check_update,
    from_torch,
    get_ensemble,
    load_model,
    to_torch,
)
from fedipfs.ipld import CID, DAG_CBOR
from fedipfs.server import private, secagg
from fedipfs.server.private import Masking
from fedipfs.server.settings import cohort_size
from fedipfs.server.spending import Price
from fedipfs.store import Store, dag, open_store
from fedipfs.strategies import STRATEGIES, Brief, Mean, build, required_successes

_NONE = Examples(np.zeros((0, 1), np.float32), np.zeros(0, np.int64))
_NOBODYS = Dataset("partners", _NONE, _NONE)  # where partners train and evaluate
_VALIDATION = 0.1  # share of its examples that a client holds out where they are needed


@dataclass
class Bench:
    """The parts of a run, ready before its folder is made."""

    config: dict[str, Any]  # complete: what the strategy needs is filled in
    store: Store
    task: tasks.Task
    dataset: Dataset  # its test set without what is held out for choices
    strategy: Strategy
    min_successes: int  # of a round
    model: ArrayRecord  # the model that the first round begins with
    told: list[str]  # what the user is to know before the first round
    warnings: list[str]
    price: Price | None  # of noised means, see Spending
    masks: Masking | None  # of clients that add noise, see Federation

    @classmethod
    def prepare(cls, config: Mapping[str, Any], *, remote: bool = False) -> Bench:
        """Everything that the checked `config` names; UserError for what the user can mend.

        With `remote` the clients have data of their own: what is loaded here is to evaluate on.
        """
        config = _with_evaluation(config)
        _refuse_mismatch(config)
        clients, options, target = config["clients"], config["data"], config["task"]["target"]
        # The configuration is the coordinator's own here, so what it names may be loaded.
        task = tasks.load(
            target, config["task"]["options"], allowed=(*tasks.ALLOWED, target.rpartition(":")[0])
        )
        task = private.task_for(config["privacy"], task)
        tasks.optim.check(config["train"])
        store = open_store(config["store"])
        store.ready()
        if remote:
            _refuse_unknown(config)
        dataset = (
            _NOBODYS
            if remote and not config["evaluate"]["server"]
            else task.data(root=options["root"], fallback=options["fallback"])
        )
        dataset, held_out = _split(dataset, options["held_out"], config["seed"])
        validation = options["validation"]
        brief = Brief(
            per_round=cohort_size(clients),
            min_successes=clients["min_successes"],
            clients=clients["total"],
            evaluates=config["evaluate"]["federated"],
            seed=config["seed"],
            metric=config["task"]["metric"],
            direction=config["task"]["direction"],
            train=config["train"],
            validation=_VALIDATION if validation is None else validation,
            task=task,
            task_target=target,
            task_options=config["task"]["options"],
            held_out=held_out,
        )
        strategy = build(config["strategy"], brief)
        if validation is None:
            needed = brief.evaluates or getattr(strategy, "needs_validation", False)
            options["validation"] = _VALIDATION if needed else 0.0
        config["secagg"] = secagg.prepare(config, strategy, len(dataset.train))
        planned = private.prepare(config, dataset, task, strategy, brief)
        config |= {"privacy": planned.section, "rounds": planned.rounds}
        strategy = planned.strategy
        if not remote:
            # Workers will find the partition in the cache; it fails early if it cannot be made.
            data.partition(
                dataset.train.targets,
                name=options["partition"],
                clients=clients["total"],
                seed=config["seed"],
                alpha=options["alpha"],
                shards_per_client=options["shards_per_client"],
                classes_per_client=options["classes_per_client"],
            )
        model = _initial_model(store, task, config["seed"], config["init_from"])
        least = required_successes(strategy, brief)
        told = secagg.announce(config, strategy, private.float_values(task), planned.masks)
        return cls(
            config,
            store,
            task,
            dataset,
            strategy,
            least,
            model,
            told + planned.told,
            planned.warnings,
            planned.price,
            planned.masks,
        )

    def evaluate(
        self, model: ArrayRecord, config: Mapping[str, Any], result: CID | None = None
    ) -> dict[str, float]:
        """Loss and metrics on the server's test set of `model`, or of the ensemble `result`."""
        if result is None:
            module = self.task.model()
            module.load_state_dict(to_torch(model))
        else:
            assert isinstance(model, StoredArrays)
            module = load_model(result, model.vault, task=self.task)
        test = self.dataset.test
        return tasks.evaluate(
            self.task,
            module,
            test.inputs,
            test.targets,
            batch_size=config["evaluate"]["batch_size"],
            device=config["train"]["device"],
        )


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    """ConfigError for what would be computed from data that this machine does not have."""
    for section, name, key in (
        ("secagg", "on", "examples"),
        ("privacy", "dp_sgd", "examples"),
        ("privacy", "dp_sgd", "delta"),
    ):
        if config[section]["name"] == name and config[section][key] is None:
            raise ConfigError(
                f"{section}.{key} is not known where partners have data of their own; set it"
            )
    if config["attack"]["name"] != "none":
        raise ConfigError(
            f"attack={config['attack']['name']} is for experiments with simulated clients; "
            "choose attack=none, or engine=local"
        )
    if config["clients"]["clock"] != "real":
        raise ConfigError(
            f"clients.clock={config['clients']['clock']} is for simulated clients; choose real"
        )
    if config["data"]["held_out"] and not config["evaluate"]["server"]:
        raise ConfigError("data.held_out is a share of the coordinator's own test set; leave it 0")


def _with_evaluation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` in which it is settled who evaluates."""
    strategy = STRATEGIES.get(str(config["strategy"]["name"]))
    at_clients = bool(getattr(strategy, "needs_federated_evaluation", False))
    evaluate = dict(config["evaluate"])
    if evaluate["federated"] is None:
        evaluate["federated"] = at_clients
    if evaluate["server"] is None:
        evaluate["server"] = not at_clients
    if at_clients and (evaluate["server"] or not evaluate["federated"]):
        raise ConfigError(
            f"strategy={config['strategy']['name']} makes models that are whole only at the "
            "clients: leave out evaluate.server=true and evaluate.federated=false"
        )
    if evaluate["federated"] and config["data"]["validation"] == 0:
        raise ConfigError(
            "evaluate.federated=true needs examples to evaluate on; set data.validation=0.1"
        )
    return {**config, "evaluate": evaluate, "data": dict(config["data"])}


def _refuse_mismatch(config: Mapping[str, Any]) -> None:
    """ConfigError for settings that the strategy has no use for, or that it would make wrong."""
    name = config["strategy"]["name"]
    if name == "fedbuff" and config["clients"]["extra"]:
        raise ConfigError(
            "clients.extra asks more clients than a round needs, and strategy=fedbuff replaces "
            "each that has answered; leave it at 0 and choose clients.per_round"
        )
    if name != "fedsgd":
        return
    if (codec := config["compression"]["name"]) != "none":
        raise ConfigError(
            f"compression={codec} takes updates for changes of the model, and strategy={name} is "
            "answered with gradients; leave it at none"
        )
    if (attack := config["attack"]["name"]) not in ("none", "nan", "label_flip"):
        raise ConfigError(
            f"attack={attack} is made of models, and strategy={name} is answered with gradients; "
            "choose nan or label_flip"
        )


def _split(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Examples | None]:
    """The data set without the share of its test set that is for choices, and that share."""
    if not share:
        return dataset, None
    test = dataset.test
    count = round(share * len(test))
    if not 0 < count < len(test):
        raise ConfigError(
            f"data.held_out={share} of {len(test)} test examples leaves nothing on one side"
        )
    order = np.random.default_rng([seed, len(test)]).permutation(len(test))
    held, rest = np.sort(order[:count]), np.sort(order[count:])
    parts = [Examples(test.inputs[part], test.targets[part]) for part in (rest, held)]
    return replace(dataset, test=parts[0]), parts[1]


def _initial_model(store: Store, task: tasks.Task, seed: int, init_from: str | None) -> ArrayRecord:
    """The task's own model, initialised by `seed`, with the weights of `init_from` if given."""
    import torch

    torch.manual_seed(seed)
    module = task.model()
    if init_from is not None:
        arrays = _given_model(store, init_from)
        try:
            module.load_state_dict(to_torch(arrays))
        except RuntimeError as error:
            why = str(error).splitlines()[-1].strip()
            raise ConfigError(f"init_from={init_from} does not fit the task: {why}") from None
    return from_torch(module.state_dict())


def _given_model(store: Store, init_from: str) -> StoredArrays:
    """A file, what a CID names, or the mean of an ensemble's members by their weights."""
    path = Path(init_from)
    cid = dag.add_file(store, path) if path.is_file() else _cid(init_from)
    if cid.codec != DAG_CBOR:
        return StoredArrays.open(store, cid)
    cids, recipe = get_ensemble(store, cid)
    members = [StoredArrays.open(store, each) for each in cids]
    mean = Mean(members[0].weights.specs.values())
    try:
        for member, weight in zip(members, recipe.weights, strict=True):
            check_update(member, members[0].weights.specs, read=False)
            mean.add(member.weights, weight)
    except BadUpdate as error:
        raise ConfigError(
            f"init_from={init_from} is an ensemble whose members have no mean: {error}; begin "
            "with one of them (fedipfs store cat shows them)"
        ) from None
    return mean.store(members[0])


def _cid(text: str) -> CID:
    try:
        return CID.parse(text)
    except ValueError:
        raise ConfigError(
            f"init_from={text} is neither a safetensors file nor the CID of one"
        ) from None
