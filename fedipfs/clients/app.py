"""The ClientApp: fetch the model by CID, train on local data, store the update, answer its CID.

What a train message's "config" record says:

- `server-round`, and `run-config`, the CID of the run's configuration;
- `proximal-mu` (FedProx): the weight of the proximal term;
- `report`: answer also what the update achieves on the examples held out here, as `val_accuracy`
  and so on;
- `answer`: "gradient" for the gradient on all examples (FedSGD) instead of the trained weights;
- `control-round` (SCAFFOLD, with an array record `control`): the last round whose control variate
  the server took up;
- `personal`: patterns of the tensors that stay here; what came in is answered in their place;
- `task-options`: a JSON object, the options of another architecture for the same task;
- under privacy `run`, what the site's ledger calls the run (see private.py), and `loss`: answer
  also the loss of the model that came;
- under secure aggregation, in messages of the type `train.secagg`, what stages.py names.

An evaluate message has the first two, `personal` and `task-options`, or `ensemble`, the CID of
the ensemble that it asks about, and then no arrays; of several messages to a client only those to
train change what it remembers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedipfs import data, tasks
from fedipfs.clients import personal, private, secure
from fedipfs.clients.control import Control
from fedipfs.clients.demands import Demands
from fedipfs.clients.gate import gate_in_use, gate_mod
from fedipfs.clients.parallel import Recipe, trainer_for
from fedipfs.clients.seeding import seed_everything
from fedipfs.clients.trainer import gradient
from fedipfs.clients.trainer import train as train_model
from fedipfs.data import Dataset, Examples
from fedipfs.errors import ConfigError, PolicyRefused, one_line
from fedipfs.exchange import (
    StoredArrays,
    cid_mod,
    default_vault,
    from_torch,
    load_model,
    stored_cid,
    to_torch,
)
from fedipfs.exchange.mod import answering
from fedipfs.ipld import CID
from fedipfs.privacy.fingerprint import digests, fingerprint

if TYPE_CHECKING:
    from fedipfs.privacy.rdp import Event
    from fedipfs.trust import PublicIdentity

app = ClientApp(mods=[gate_mod, cid_mod])

_MOST_HELD_OUT = 0.9  # share of a client's examples


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came in on this client's examples."""
    Demands.of(context.node_config).refuse_plain("an update")
    return Message(_trained(message, context), reply_to=message)


def _trained(message: Message, context: Context, part: Event | None = None) -> RecordDict:
    """What `train` answers; `part` is what a part in a noised sum costs the records."""
    site = _site(message, context)
    noisy = site.is_private and _ask(message).get("answer") != "gradient"
    # Refuses what it cannot do before anything is spent.
    several = trainer_for(context.node_config, site.recipe(message), private=noisy)
    guard = site.guard(message, context, part)
    with guard.discreet() if guard else nullcontext():
        return _learnt(site, guard, several or train_model, message, context)


def _learnt(
    site: Site,
    guard: private.Guard | None,
    learn: Callable[..., dict[str, float]],
    message: Message,
    context: Context,
) -> RecordDict:
    ask = _ask(message)
    examples, held_out = site.examples(context)
    server_round = int(ask["server-round"])  # type: ignore[arg-type]
    task, model = site.load(message)
    came = personal.put_on(model, _patterns(ask), context.state)
    control = _control(message, model, context)
    seeds = np.random.SeedSequence(
        [site.config["seed"], server_round, int(context.node_config["partition-id"])]
    )
    seed = int(seeds.generate_state(1)[0])
    loss = guard.loss(task, model, examples) if guard and ask.get("loss") else None
    if ask.get("answer") == "gradient":
        answer, metrics = gradient(
            task,
            model,
            examples.inputs,
            examples.targets,
            config=site.config["train"],
            seed=seed,
            batch_size=site.config["evaluate"]["batch_size"],
            private=guard.training(task, model, examples, whole=True) if guard else None,
        )
    else:
        metrics = learn(
            task,
            model,
            examples.inputs,
            examples.targets,
            config=site.config["train"],
            seed=seed,
            server_round=server_round,
            proximal_mu=float(ask.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
            correction=control.correction if control else None,
            private=guard.training(task, model, examples) if guard else None,
        )
        answer = model.state_dict()
    if loss is not None:
        metrics["train_loss"] = loss
    if ask.get("report"):
        reported = site.measure(task, model, held_out, guard)
        metrics |= {f"val_{name}": value for name, value in reported.items()}
    if came:
        personal.keep(model, came, context.state)
    content = RecordDict({"arrays": from_torch({**answer, **came})})
    if control:
        rate = tasks.optim.learning_rate(site.config["train"], server_round=server_round)
        content["control"] = control.answer(
            steps=int(metrics["steps"]), learning_rate=rate, server_round=server_round
        )
    content["metrics"] = MetricRecord(dict(metrics))
    if guard:
        content[private.RECORD] = guard.record()
    return content


@app.train("secagg")
def train_masked(message: Message, context: Context) -> Message:
    """As `train`, but what leaves is masked: the stage MASKED of secure aggregation."""
    is_private = _site(message, context).is_private
    return secure.masked(
        message, context, private=is_private, train=lambda part: _trained(message, context, part)
    )


@app.query("secagg")
def secagg(message: Message, context: Context) -> Message:
    """Another stage of secure aggregation; see secure.py."""
    return secure.answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the model that came in on the examples this client holds out."""
    Demands.of(context.node_config).refuse_plain("what a model achieves here")
    site = _site(message, context)
    guard = site.guard(message, context)
    with guard.discreet() if guard else nullcontext():
        _, held_out = site.examples(context)
        task, model = site.load(message)
        personal.put_on(model, _patterns(_ask(message)), context.state)
        metrics = site.measure(task, model, held_out, guard)
    count = len(held_out) if guard is None else site.known_held_out
    record = MetricRecord({"num-examples": count, **metrics})
    content = RecordDict({"metrics": record})
    if guard:
        content[private.RECORD] = guard.record()
    return Message(content, reply_to=message)


@app.query("prefetch")
def prefetch(message: Message, context: Context) -> Message:
    """For Flower, which knows no message without a function; `cid_mod` has fetched the model."""
    return Message(RecordDict(), reply_to=message)


@app.query("capabilities")
def capabilities(message: Message, context: Context) -> Message:
    """What this node has to offer, for the choice of a cohort; see clients.requires.

    How many examples it has, a site does not tell whose updates leave under masks only.
    """
    site = _site(message, context)
    offers: dict[str, bool | int | list[str]] = {
        "gpu": torch.cuda.is_available(),
        "gpus": torch.cuda.device_count(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if gate := gate_in_use():
        offers["tasks"] = list(gate.policy.tasks)
    if not site.is_private:
        private.require_none(context, lambda: site.fingerprint(context))
    if not Demands.of(context.node_config).required:
        if site.is_private:
            offers["examples"] = int(site.config["privacy"]["examples"])
        else:
            offers["examples"] = sum(map(len, site.examples(context)))
    return Message(RecordDict({"capabilities": ConfigRecord({**offers})}), reply_to=message)


class Opened(NamedTuple):
    """What a site's data set follows from: the run's configuration, and the node's own.

    `own`: the data are the site's own, and not a part of the task's; then `tasks` are the targets
    that may be trained, else what else may be imported.
    """

    run_config: str
    partitions: int
    root: str = ""
    tasks: str = ""
    device: str = ""
    own: bool = False


_own: list[Dataset] = []


def use_data(dataset: Dataset) -> None:
    """Train on this data set of the site's own, where the node's configuration says `own-data`.

    What is held out is its test set if it has one; under record-level privacy, where the size of
    that would tell of records, a share of its training set, as for the parts of a task's data.
    """
    _own[:] = [dataset]


def count_examples(run_config: str | None, context: Context) -> tuple[int, int]:
    """How many examples a run trains on here, and how many it holds out; see Gate.

    `run_config` is the CID of its configuration; None: how many the site's own data have.
    """
    if run_config is None:
        (dataset,) = _own
        return len(dataset.train), len(dataset.test)
    return _open_site(_opened(run_config, context)).counts(context)


class Site(NamedTuple):
    """What a client keeps between messages of one run."""

    config: dict[str, Any]
    allowed: tuple[str, ...]  # tasks that may be imported
    dataset: Dataset
    parts: list[np.ndarray]
    opened: Opened  # what it was opened with

    def load(self, message: Message) -> tuple[tasks.Task, torch.nn.Module]:
        """The task, and its module with the weights that came with `message`."""
        given = _ask(message).get("task-options")
        target, options, _ = self.recipe(message)
        replace = bool(self.config["privacy"].get("replace_layers"))
        task = _task(target, options, self.allowed, replace)
        if (ensemble := _ask(message).get("ensemble")) is not None:
            if _patterns(_ask(message)):
                raise ConfigError("an ensemble has no personal layers; ask for one or the other")
            asked = answering()
            sender = asked.sender if asked else None
            return task, _ensemble(str(ensemble), target, self.allowed, sender)
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        if given or gate_in_use():
            _check_shapes(task, arrays, must=bool(given))
        model = _module(target, options, self.allowed, replace)
        model.load_state_dict(_state_dict(arrays))
        return task, model

    def recipe(self, message: Message) -> Recipe:
        """What `message` wants trained."""
        given = _ask(message).get("task-options")
        options = json.loads(str(given)) if given else self.config["task"]["options"]
        return Recipe(
            self.config["task"]["target"], json.dumps(options, sort_keys=True), self.allowed
        )

    @property
    def is_private(self) -> bool:
        """Whether the run asks for record-level privacy."""
        return bool(self.config["privacy"]["name"] == private.LEVEL)

    def guard(
        self, message: Message, context: Context, part: Event | None = None
    ) -> private.Guard | None:
        """What stands between this message and the data; None where no privacy is asked for.

        Raises PrivacyRequired if it has to be, unless a `part` in a noised sum is paid for.
        """
        arrays, ask = message.content.get("arrays"), _ask(message)
        sender = arrays.sender if isinstance(arrays, StoredArrays) else None
        asked = private.Asked(
            str(ask.get("run", "")),
            int(ask["server-round"]),  # type: ignore[arg-type]
            sender.organization if sender else "unsigned",
        )
        if not self.is_private:
            private.require_none(context, lambda: self.fingerprint(context), part, asked)
            return None
        kind = message.metadata.message_type
        return private.Guard(self.config, self.fingerprint(context), context, asked, kind)

    def fingerprint(self, context: Context) -> str:
        """That of all this client's records, by which it finds its privacy ledger."""
        return _fingerprint(self.opened, self.place(context))

    def place(self, context: Context) -> int:
        """Which of the parts is this client's."""
        return 0 if self.opened.own else int(context.node_config["partition-id"])

    @property
    def known_held_out(self) -> int:
        """How many examples a client holds out, as everybody may know it."""
        share = self.config["data"]["validation"] or 0.0
        return max(1, round(self.config["privacy"]["examples"] * share / (1 - share)))

    def examples(self, context: Context) -> tuple[Examples, Examples]:
        """This client's training and held-out examples."""
        if (split := self._split(context)) is None:
            return self.dataset.train, self.dataset.test
        train, test = split
        training = _take(self.dataset.train, train)
        if context.node_config.get("label-flip"):  # the site's own wish: a simulated attacker
            classes = int(self.dataset.train.targets.max()) + 1
            training = Examples(training.inputs, classes - 1 - training.targets)
        return training, _take(self.dataset.train, test)

    def counts(self, context: Context) -> tuple[int, int]:
        """How many examples there are of each."""
        train, test = self._split(context) or (self.dataset.train, self.dataset.test)
        return len(train), len(test)

    def _split(self, context: Context) -> tuple[np.ndarray, np.ndarray] | None:
        """Which of the examples are trained on and which held out; None for the site's own sets."""
        indices = self.parts[self.place(context)]
        share = self.config["data"]["validation"] or 0.0
        if not 0 <= share <= _MOST_HELD_OUT:
            raise ConfigError(f"data.validation={share!r:.40} must be from 0 to {_MOST_HELD_OUT}")
        if self.opened.own and len(self.dataset.test) and not self.is_private:
            return None
        if self.is_private and share:
            # By the record alone: one more or less shall not move others from side to side.
            held_out = _held_out(self.opened, self.place(context), share)
            return indices[~held_out], indices[held_out]
        train, test = np.split(indices, [len(indices) - round(len(indices) * share)])
        return train, test

    def measure(
        self,
        task: tasks.Task,
        model: torch.nn.Module,
        examples: Examples,
        guard: private.Guard | None,
    ) -> dict[str, float]:
        """Loss and metrics of `model` on `examples`, which are held out."""
        if guard is not None:
            return guard.measure(task, model, examples, self.known_held_out)
        return tasks.evaluate(
            task,
            model,
            examples.inputs,
            examples.targets,
            batch_size=self.config["evaluate"]["batch_size"],
            device=self.config["train"]["device"],
        )


_latest: list[tuple[CID, dict[str, Any]]] = []  # all clients of a round begin with the same model


def _state_dict(arrays: ArrayRecord) -> dict[str, Any]:
    cid = stored_cid(arrays)
    if not _latest or _latest[0][0] != cid:
        _latest[:] = [(cid, to_torch(arrays))]
    return _latest[0][1]


def _take(examples: Examples, indices: np.ndarray) -> Examples:
    return Examples(examples.inputs[indices], examples.targets[indices])


def _ask(message: Message) -> ConfigRecord:
    record = message.content["config"]
    assert isinstance(record, ConfigRecord)
    return record


def _patterns(ask: ConfigRecord) -> list[str]:
    """What stays at the client; see personal.py."""
    return [str(each) for each in ask.get("personal", [])]  # type: ignore[union-attr]


def _control(message: Message, model: torch.nn.Module, context: Context) -> Control | None:
    """SCAFFOLD's control variates, if some came with `message`."""
    came = message.content.get("control")
    if not isinstance(came, ArrayRecord):
        return None
    taken = int(_ask(message).get("control-round", 0))  # type: ignore[arg-type]
    return Control(model, came, context.state, taken=taken)


def _opened(run_config: str, context: Context) -> Opened:
    node = context.node_config
    own = bool(node.get("own-data"))
    return Opened(
        run_config,
        int(node["num-partitions"]),
        str(node.get("data-root") or ""),
        str(node.get("allowed-targets" if own else "allowed-tasks") or ""),
        str(node.get("device") or ""),
        own,
    )


def _site(message: Message, context: Context) -> Site:
    opened = _opened(str(_ask(message)["run-config"]), context)
    site = _open_site(opened)
    if opened.own:  # elsewhere the worker does it, which knows the run's seed
        seed_everything(site.config["seed"], context.node_id, message)
    return site


@lru_cache(maxsize=64)
def _held_out(opened: Opened, place: int, share: float) -> np.ndarray:
    """Which of a client's records are held out under privacy: by a hash of each one's content."""
    site = _open_site(opened)
    records = _take(site.dataset.train, site.parts[place])
    firsts = [each[:8] for each in digests(records.inputs, records.targets)]
    return np.frombuffer(b"".join(firsts), "<u8") < int(share * 2**64)


@lru_cache(maxsize=1024)
def _fingerprint(opened: Opened, place: int) -> str:
    site = _open_site(opened)
    records = _take(site.dataset.train, site.parts[place])
    return fingerprint(records.inputs, records.targets)


@lru_cache(maxsize=1)
def _open_site(opened: Opened) -> Site:
    config = default_vault("participant").get_record(CID.parse(opened.run_config))
    if opened.device:
        config = {**config, "train": {**config["train"], "device": opened.device}}
    target, own_tasks = config["task"]["target"], tuple(filter(None, opened.tasks.split(",")))
    if opened.own:
        return _own_site(config, str(target), own_tasks, opened)
    allowed = (*tasks.ALLOWED, *own_tasks)
    task = tasks.load(target, config["task"]["options"], allowed=allowed)
    dataset = task.data(root=opened.root or None, fallback=config["data"]["fallback"])
    split = config["data"]
    parts = data.partition(
        dataset.train.targets,
        name=split["partition"],
        clients=opened.partitions,
        seed=config["seed"],
        alpha=split["alpha"],
        shards_per_client=split["shards_per_client"],
        classes_per_client=split["classes_per_client"],
    )
    return Site(config, allowed, dataset, parts, opened)


def _own_site(
    config: dict[str, Any], target: str, targets: tuple[str, ...], opened: Opened
) -> Site:
    """A site with data of its own, where exactly `targets` may be trained."""
    if target not in targets:  # before anything is imported
        raise PolicyRefused(f"policy.tasks: {one_line(target, 120)} is no task of this site")
    if not _own:
        raise ConfigError("this site has loaded no data")
    (dataset,) = _own
    module = target.rpartition(":")[0]
    return Site(config, (module,), dataset, [np.arange(len(dataset.train))], opened)


@lru_cache(maxsize=1)  # all clients of a round evaluate the same
def _ensemble(
    cid: str, target: str, allowed: tuple[str, ...], sender: PublicIdentity | None
) -> torch.nn.Module:
    vault = default_vault("participant")
    return load_model(cid, vault, task=target, allowed=allowed, sender=sender)


@lru_cache(maxsize=8)
def _task(target: str, options: str, allowed: tuple[str, ...], replace: bool) -> tasks.Task:
    """A task with `options`, given as JSON; `replace`: with layers that DP-SGD can train."""
    task = tasks.load(target, json.loads(options), allowed=allowed)
    if not replace:
        return task
    from fedipfs.privacy.models import WithPrivateLayers  # it takes Opacus along

    return WithPrivateLayers(task)


@lru_cache(maxsize=8)
def _module(target: str, options: str, allowed: tuple[str, ...], replace: bool) -> torch.nn.Module:
    """One module of a task, loaded anew for every message."""
    return _task(target, options, allowed, replace).model()


def _check_shapes(task: tasks.Task, arrays: ArrayRecord, *, must: bool) -> None:
    """ConfigError unless `arrays` are those of the task's model, which is not given memory here.

    Its options are the coordinator's: they must not ask for more than the model that came. Unless
    it `must` be possible, a task that needs values while it makes its model is not checked.
    """
    try:
        with torch.device("meta"):
            wanted = {name: tuple(each.shape) for name, each in task.model().state_dict().items()}
    except Exception:
        if must:
            raise
        return
    if wanted != {name: tuple(array.shape) for name, array in arrays.items()}:
        raise ConfigError("the model that came is not one of the task with its options")
