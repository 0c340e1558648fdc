"""The clients' models stay models, and answer together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedipfs.errors import ConfigError, one_line
from fedipfs.exchange import (
    StoredArrays,
    check_update,
    from_torch,
    specs_of,
    store_arrays,
    stored_cid,
    to_torch,
)
from fedipfs.exchange.ensemble import MAX_MEMBERS, Recipe, put_ensemble
from fedipfs.ipld import CID
from fedipfs.strategies.base import ClientUpdate
from fedipfs.strategies.distill import Distillation, Teacher
from fedipfs.strategies.mean import Mean
from fedipfs.strategies.options import one_of, within_round
from fedipfs.strategies.selecting import SelectingStrategy
from fedipfs.strategies.selector import SELECTORS, Score
from fedipfs.tasks import Task
from fedipfs.tasks.ensemble import VOTING


class EnsembleStrategy(SelectingStrategy):
    """p(c | x) = sum_{k in S} a_k p_k(c | x), the members S voting (see tasks.ensemble.Ensemble).

    start=own: member k trains on from its own model, w_k <- Train_k(w_k), and stays a member in
    rounds in which it is not asked; beyond 1,024 members (without `top_k`) those that were heard
    longest ago leave, the lowest node ids first, and `notes` name them. start=common: all train on
    from the mean of the members, w_k <- Train_k(w), w = sum_{k in S} a_k w_k, and the members are
    those of the round; with weighting=examples and no `top_k`, w is FedAvg's.

    S: all members, or the `top_k` with the best score under `selector`; a member not asked this
    round keeps the score it had. a_k, before they are divided by their sum: 1 (weighting=uniform),
    the examples n_k (examples), or by score: s_k where more is better, at least 0, and
    1 / (1 + max(s_k, 0)) where less is; unscored members then do not count, unless all are.

    `architectures`, task options each, are dealt to clients in turn (start=own only). What the
    next round begins with is w, or, where there are several architectures, the first model
    unchanged. `result` is the ensemble's record.

    With `distill` (FedDF, see Distillation) the ensemble teaches a student, which begins at w
    (of several architectures, at the mean of the members that have the run's own, or at the last
    student), becomes the next model, and is the result; `notes` still link the ensemble.
    """

    def __init__(
        self,
        *args: Any,
        start: str = "own",
        top_k: int | None = None,
        voting: str = "soft",
        weighting: str = "uniform",
        architectures: Sequence[Mapping[str, Any]] | None = None,
        distill: Mapping[str, Any] | None = None,
        selector: str = "cross",
        clients: int = 0,
        task: Task | None = None,
        task_target: str = "",
        task_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        selects = top_k is not None or weighting == "score"
        super().__init__(
            *args, selector=selector if selects else None, task=task, seed=seed, **kwargs
        )
        one_of("selector", selector, SELECTORS)
        one_of("start", start, ("own", "common"))
        one_of("voting", voting, VOTING)
        one_of("weighting", weighting, ("uniform", "examples", "score"))
        if task is None or not task_target:
            raise ConfigError("strategy=ensemble needs the task: give task= and task_target=")
        per_round = kwargs.get("per_round")
        if top_k is not None:
            within_round("top_k", top_k, per_round)
        most = top_k or (clients if start == "own" else per_round) or 0
        if most > MAX_MEMBERS:
            raise ConfigError(
                f"an ensemble of {most} members; at most {MAX_MEMBERS} are taken: set a lower "
                "strategy.top_k"
            )
        self._start, self._top_k, self._weighting = start, top_k, weighting
        self._voting, self._seed, self._target = voting, seed, task_target
        self._options, self._tasks = _architectures(architectures, start, task, task_options or {})
        self._several = architectures is not None
        self._distillation = (
            None if distill is None else Distillation.of(distill, kwargs.get("held_out"), task)
        )
        self._result: CID | None = None
        # By node, in text where the values are plain; kept for a resumed run.
        self.members: dict[int, StoredArrays] = {}
        self.examples: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.heard: dict[str, int] = {}  # the last round with an answer
        self.architecture: dict[str, int] = {}

    @property
    def result(self) -> CID | None:
        """The ensemble's record; None while there is none, or if its student is the result."""
        return None if self._distillation is not None else self._result

    # ---- asking

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if self._start == "common":
            return messages
        for message in sorted(messages, key=lambda each: each.metadata.dst_node_id):
            name = str(message.metadata.dst_node_id)
            self.architecture.setdefault(name, len(self.architecture) % len(self._options))
        first: dict[int, StoredArrays] = {}  # architecture -> its model
        for message in messages:
            node = message.metadata.dst_node_id
            own = ConfigRecord({**config})
            if (options := self._options_of(node)) is not None:
                own["task-options"] = json.dumps(options)
            number = self.architecture[str(node)]
            if (model := self.members.get(node) or first.get(number)) is None:
                model = first[number] = self._first_model(number)
            message.content = RecordDict({self.arrayrecord_key: model, self.configrecord_key: own})
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if (result := self.result) is None:
            return super().configure_evaluate(server_round, arrays, config, grid)
        config["ensemble"] = str(result)
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        for message in messages:  # the ensemble takes the place of the model
            message.content = RecordDict({self.configrecord_key: config})
        return messages

    def _options_of(self, node: int) -> Mapping[str, Any] | None:
        return self._options[self.architecture[str(node)]] if self._several else None

    def _task_of(self, node: int) -> Task | None:
        return self._tasks[self.architecture.get(str(node), 0)]

    def _first_model(self, number: int) -> StoredArrays:
        """What a client without a model of its own begins with."""
        if not self._several:
            return self.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            state = self._tasks[number].model().state_dict()
        return store_arrays(self.model.vault, from_torch(state))

    # ---- combining

    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        for update in updates:  # before anything is remembered
            check_update(update.arrays, specs_of(update.arrays.base or self.model), read=True)
        ranking = self._rank(updates)
        if self._start == "common":
            self.members, self.examples, self.scores, self.heard = {}, {}, {}, {}
        for update in updates:
            self.members[update.node] = self._readable(update.node, update.arrays)
            self.examples[str(update.node)] = update.examples
            self.scores.pop(str(update.node), None)
            self.heard[str(update.node)] = server_round
        self.scores |= {str(each.node): each.value for each in ranking if each.value is not None}
        dropped = self._drop()
        nodes = self._selected()
        weights = self._weights(nodes)
        chosen = {node: weight for node, weight in zip(nodes, weights, strict=True) if weight > 0}
        self._result = self._record(chosen)
        self._note(chosen, ranking)
        if dropped:
            self._notes["dropped"] = {"nodes": dropped}
        model = self._mean(chosen)
        return model if self._distillation is None else self._taught(model, chosen, server_round)

    def _drop(self) -> list[int]:
        """Let members go that are too many to vote; returns their node ids."""
        spare = 0 if self._top_k is not None else max(0, len(self.members) - MAX_MEMBERS)
        oldest = sorted(self.members, key=lambda node: (self.heard.get(str(node), 0), node))
        for node in oldest[:spare]:
            del self.members[node]
            for kept in (self.examples, self.scores, self.heard):
                kept.pop(str(node), None)
        return sorted(oldest[:spare])

    def _selected(self) -> list[int]:
        """The members that vote, by node id: all, or those of the best scores."""
        nodes = sorted(self.members)
        if self._top_k is not None:
            sign, scores = 1.0 if self._least_is_best else -1.0, self.scores

            def place(node: int) -> tuple[bool, float, int]:
                value = scores.get(str(node))
                return value is None, sign * (value or 0.0), node

            nodes = sorted(sorted(nodes, key=place)[: self._top_k])
        return nodes

    def _weights(self, nodes: list[int]) -> list[float]:
        if self._weighting == "examples":
            return [self.examples[str(node)] for node in nodes]
        uniform = [1.0] * len(nodes)
        if self._weighting == "uniform":
            return uniform
        scores = [self.scores.get(str(node)) for node in nodes]
        weights = [
            0.0
            if score is None
            else 1 / (1 + max(score, 0.0))
            if self._least_is_best
            else max(score, 0.0)
            for score in scores
        ]
        return weights if sum(weights) > 0 else uniform

    @property
    def _least_is_best(self) -> bool:
        return self._selector is not None and self._selector.direction == "min"

    def _record(self, chosen: Mapping[int, float]) -> CID:
        options = tuple(self._options[self.architecture.get(str(node), 0)] for node in chosen)
        recipe = Recipe(self._target, options, tuple(chosen.values()), self._voting)
        cids = [stored_cid(self.members[node]) for node in chosen]
        return put_ensemble(self.model.vault, cids, recipe)

    def _note(self, chosen: Mapping[int, float], ranking: list[Score]) -> None:
        members = [
            {
                "node": node,
                "cid": stored_cid(self.members[node]),
                "weight": weight,
                "score": self.scores.get(str(node)),
            }
            for node, weight in chosen.items()
        ]
        self._notes = {"ensemble": self._result, "members": members}
        if self._selector is not None:
            self._notes["ranking"] = [score.note() for score in ranking]

    def _mean(self, chosen: Mapping[int, float]) -> StoredArrays:
        """sum_k a_k w_k over the members of the model's own structure; the model if none is."""
        if self._several and self._distillation is None:
            return self.model
        specs = specs_of(self.model)
        alike = [node for node in chosen if specs_of(self.members[node]) == specs]
        if not alike:
            return self.model
        if len(alike) == 1:  # as it is, so as it is sealed
            return self.members[alike[0]]
        mean = Mean(specs.values())
        for node in alike:
            mean.add(self.members[node].weights, chosen[node])
        return mean.store(self.model)

    def _taught(
        self, start: StoredArrays, chosen: Mapping[int, float], server_round: int
    ) -> StoredArrays:
        assert self._distillation is not None
        assert self._task is not None
        student = _module(self._task, start)
        loss = self._distillation.teach(
            student,
            self._task,
            self._teachers(chosen),
            seed=int(np.random.SeedSequence([self._seed, server_round]).generate_state(1)[0]),
            device=self._device,
        )
        self._notes["distill_loss"] = loss
        return store_arrays(self.model.vault, from_torch(student.state_dict()))

    def _teachers(self, chosen: Mapping[int, float]) -> Iterable[Teacher]:
        for node, weight in chosen.items():
            task = self._task_of(node)
            assert task is not None
            yield _module(task, self.members[node]), task, weight


def _module(task: Task, arrays: StoredArrays) -> torch.nn.Module:
    module = task.model()
    module.load_state_dict(to_torch(arrays))
    return module


def _architectures(
    given: Sequence[Mapping[str, Any]] | None, start: str, task: Task, own: Mapping[str, Any]
) -> tuple[list[Mapping[str, Any]], list[Task]]:
    """The task options of each architecture, and their tasks; the run's own if none are given."""
    if given is None:
        return [dict(own)], [task]
    if start != "own":
        raise ConfigError(
            f"strategy.architectures needs strategy.start=own: models of different architecture "
            f"have no common one to begin with (start={start})"
        )
    if not isinstance(given, list | tuple) or not given:
        raise ConfigError("strategy.architectures is to be a list of task options, or null")
    options: list[Mapping[str, Any]] = []
    made: list[Task] = []
    for each in given:
        if not isinstance(each, Mapping):
            raise ConfigError(f"strategy.architectures: {each} is no set of task options")
        try:
            made.append(type(task)(**each))
            made[-1].model()
        except Exception as error:  # whatever the task's code says
            why = one_line(error)
            raise ConfigError(f"strategy.architectures: {dict(each)} does not fit: {why}") from None
        options.append(dict(each))
    return options, made
