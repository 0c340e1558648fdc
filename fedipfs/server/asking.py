"""Whom a round asks, and how their answers come: a cohort, or a buffer that is never empty."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import Strategy

from fedipfs.exchange import CidGrid, Stamp, StoredArrays, Vault, stored_cid
from fedipfs.flower_compat import CLIENT_APP_RAISED_EXCEPTION, error_instead
from fedipfs.ipld import CID
from fedipfs.server.cohort import Answers, CohortGrid, Flights, ask
from fedipfs.server.engine.base import NodeGrid
from fedipfs.server.engine.clock import SimulatedGrid
from fedipfs.server.secure import Secure
from fedipfs.server.selection import Selection
from fedipfs.strategies import update_in

CAPABILITIES = "query.capabilities"  # the type of a message that asks what a node offers


@dataclass
class Asking:
    """Asks clients what a strategy wants to know, through `edge` over `grid`.

    `run` is signed for where messages are signed (None: they are not), `config` the CID of what
    clients go by; they are told of `told`, too, and with `tells_cohort` to how many a message goes.
    With `secure` they answer under masks. See Federation for the rest.
    """

    edge: CidGrid
    grid: NodeGrid
    strategy: Strategy
    selection: Selection
    config: CID
    seed: int
    run: str | None = None
    deadline_s: float | None = None
    poison: Callable[[int, list[Message]], list[Message]] | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    tells_cohort: bool = False
    secure: Secure | None = None
    _flights: Flights = field(init=False)

    def __post_init__(self) -> None:
        self._offers: dict[int, dict[str, Any]] = {}  # node -> what it announces
        self._flights = Flights(self.edge, self.grid.now, self.deadline_s)

    def train(self, number: int, model: StoredArrays) -> Answers:
        """The answers of round `number`, which begins with `model`."""
        self.stamp(number)
        asynchronous = getattr(self.strategy, "asynchronous", False)
        return (self._buffer if asynchronous else self._cohort)(number, model)

    def evaluate(self, number: int, model: StoredArrays, nodes: list[int]) -> list[Message]:
        """What these nodes say of `model`; nothing if the strategy does not ask them."""
        messages = self._configured("evaluate", number, model, nodes)
        return ask(self.edge, messages, now=self.grid.now, deadline_s=self.deadline_s).replies

    def stamp(self, number: int) -> None:
        """Sign for round `number` from now on, where messages are signed."""
        if self.run is not None:
            self.edge.stamp = Stamp(self.run, number)

    @property
    def bases(self) -> list[CID]:
        """What clients that are at work began with: a resumed run asks them again."""
        found = (cid for flight in self._flights.all() for cid in reference(flight.base))
        return [cid for cid in found if cid is not None]

    def heard(self, number: int, replies: list[Message], failures: Mapping[int, str]) -> None:
        """Take in who failed of those that replied."""
        nodes = [reply.metadata.src_node_id for reply in replies]
        self.selection.heard(number, [node for node in nodes if node not in failures], failures)

    def state(self) -> dict[str, Any]:
        """What the next rounds depend on, for a run that is resumed."""
        now = self.grid.now() if isinstance(self.grid, SimulatedGrid) else None
        return {
            "selection": self.selection.state(),
            "flights": [
                [
                    flight.node,
                    flight.asked,
                    reference(flight.base),
                    None if now is None else flight.began,
                ]
                for flight in self._flights.all()
            ],
            "now": now,
        }

    def restore(self, state: Mapping[str, Any], vault: Vault) -> None:
        """Go on from `state`: who was left out, who is at work (and is asked again)."""
        self.selection.restore(state["selection"])
        for node, asked, (cid, order), began in state["flights"]:
            base = StoredArrays.open(vault, cid, order)
            if isinstance(self.grid, SimulatedGrid):
                self.grid.set_now(began)
            self._send(asked, base, [node])
        if isinstance(self.grid, SimulatedGrid):
            self.grid.set_now(state["now"])

    def _cohort(self, number: int, model: StoredArrays) -> Answers:
        """A cohort trains, and all (or the first so many) are waited for."""
        fit = self.selection.fit(number, *self._nodes(number))
        cohort, enough = self.selection.cohort(number, fit), self.selection.size(len(fit))
        if self.secure is not None:
            messages = self._configured("train", number, model, cohort)
            return self.secure.train(number, model, messages)
        follow = getattr(self.strategy, "follow_up", None)

        def follow_up(reply: Message) -> Iterable[Message]:
            return () if follow is None else follow(number, reply, self.edge)

        answers = ask(
            self.edge,
            self._configured("train", number, model, cohort),
            now=self.grid.now,
            enough=enough if enough < len(cohort) else None,
            deadline_s=self.deadline_s,
            follow_up=follow_up if self.poison is None else None,
        )
        if self.poison is None:
            return answers
        # The adversary wants to see all updates before it makes its own.
        replies = self._poisoned(number, answers.replies)
        questions = [
            each for reply in replies if not reply.has_error() for each in follow_up(reply)
        ]
        further = ask(self.edge, questions, now=self.grid.now, deadline_s=self.deadline_s)
        return Answers(replies, further.replies, answers.unneeded)

    def _buffer(self, number: int, model: StoredArrays) -> Answers:
        """Clients train all the time; who answers is replaced, until the buffer is full."""
        strategy: Any = self.strategy
        fit = self.selection.fit(number, *self._nodes(number))
        at_once = self.selection.size(len(fit))
        replies: list[Message] = []
        good = draw = 0
        while good < strategy.buffer_size:
            busy = {flight.node for flight in self._flights.all()}
            busy |= {reply.metadata.src_node_id for reply in replies}
            idle = [node for node in fit if node not in busy]
            free = at_once - len(self._flights)
            if idle and free > 0:
                draw += 1
                there = len(self._flights) + good
                chosen = self.selection.choose(number, idle, free, draw=draw, there=there)
                if chosen:
                    self._send(number, model, chosen)
            if not self._flights:
                break
            for reply in self._flights.land():
                update = update_in(reply, getattr(strategy, "extra_arrays", ()))
                asked = getattr(update, "asked", None) or number
                if strategy.is_late(number, asked):
                    reply = error_instead(reply, _too_late(number - asked))
                replies.append(reply)
                good += not reply.has_error()
        return Answers(self._poisoned(number, replies), [])

    def _poisoned(self, number: int, replies: list[Message]) -> list[Message]:
        """The replies as the adversary has them; what it changed nobody has signed."""
        if self.poison is None:
            return replies
        poisoned = self.poison(number, replies)
        for before, after in zip(replies, poisoned, strict=True):
            if before is not after:
                self.edge.signed.pop(after.metadata.src_node_id, None)
        return poisoned

    def _send(self, number: int, base: StoredArrays, nodes: list[int]) -> None:
        self.stamp(number)
        self._flights.send(self._configured("train", number, base, nodes), number, base)

    def _nodes(self, number: int) -> tuple[list[int], dict[int, dict[str, Any]]]:
        """The nodes that are there, and what they offer, as far as that matters."""
        nodes = list(self.edge.get_node_ids())
        unknown = [node for node in nodes if node not in self._offers]
        if self.selection.requires and unknown:
            self._offers |= self._announced(number, unknown)
        return nodes, self._offers

    def _announced(self, number: int, nodes: list[int]) -> dict[int, dict[str, Any]]:
        config = ConfigRecord({"run-config": str(self.config), "server-round": number})
        questions = [
            self.edge.create_message(RecordDict({"config": config}), CAPABILITIES, node, "")
            for node in nodes
        ]
        # The deadline is for training; but a partner may be away for good.
        limit = self.deadline_s if self.tells_cohort else None
        answers = ask(self.edge, questions, now=self.grid.now, deadline_s=limit)
        return {
            reply.metadata.src_node_id: dict(next(iter(reply.content.config_records.values()), {}))
            for reply in answers.replies
            if not reply.has_error()
        }

    def _configured(
        self, what: str, number: int, model: StoredArrays, nodes: list[int]
    ) -> list[Message]:
        """The strategy's messages to these nodes, and no others."""
        # Flower's strategies draw from the global generator, which clients in this process
        # (engine=serial) have used meanwhile.
        seed = np.random.SeedSequence([self.seed, number, what == "evaluate"])
        random.seed(int(seed.generate_state(1)[0]))
        configure = getattr(self.strategy, f"configure_{what}")
        config = ConfigRecord({"run-config": str(self.config), **self.told})
        if self.tells_cohort:
            config["cohort"] = len(nodes)
        return list(configure(number, model, config, CohortGrid(self.edge, nodes)))


def reference(arrays: StoredArrays) -> list[CID | None]:
    """The CIDs by which a stored record is opened again."""
    return [stored_cid(arrays), arrays.order]


def _too_late(late: int) -> Error:
    return Error(CLIENT_APP_RAISED_EXCEPTION, f"its update came {late} models late")
