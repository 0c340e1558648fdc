"""How candidates, the updates of a round, are scored by the run's metric, and put in order.

`reported`  the author's own metric, on what it holds out. Free, and whoever lies wins.
`server`    the metric on the coordinator's held-out examples. Nobody but the coordinator is asked.
`cross`     each candidate is evaluated by other clients, which fetch it by its CID; its score is
            the median of theirs, so that fewer than half of its evaluators cannot decide it alone:
            of an even number the worse of the two in the middle. More than half must answer.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict

from fedipfs import tasks
from fedipfs.data import Examples
from fedipfs.errors import ConfigError, one_line
from fedipfs.exchange import StoredArrays, to_torch
from fedipfs.ipld import CID
from fedipfs.strategies.options import one_of, whole
from fedipfs.strategies.screen import parts
from fedipfs.tasks import Task

BATCH = 200  # examples the coordinator evaluates at a time: changes speed, not the result


class Candidate(NamedTuple):
    """An update, and what its author says of it."""

    node: int
    arrays: StoredArrays
    metrics: Mapping[str, Any]
    task: Task | None = None  # with the architecture of `arrays`


class Score(NamedTuple):
    """What a candidate achieved; `value` is None where nobody could say, for the `reason`."""

    node: int
    cid: CID | None
    value: float | None
    evaluators: tuple[tuple[int, float], ...] = ()  # node and what it measured
    reason: str | None = None

    def note(self) -> dict[str, Any]:
        """For the round's record."""
        by = [{"node": node, "score": value} for node, value in self.evaluators]
        row = {"node": self.node, "cid": self.cid, "score": self.value, "evaluators": by}
        return row if self.reason is None else {**row, "reason": self.reason}


class Selector(ABC):
    """Scores candidates by `metric`, of which `direction` (max or min) says what is better."""

    needs_validation: ClassVar[bool] = False  # examples that clients hold out
    told: ClassVar[Mapping[str, bool]] = {}  # for the "config" of train messages
    measurements = 0  # of models on held-out examples, by each client and round, at most

    def __init__(self, metric: str, direction: str) -> None:
        if direction not in ("max", "min"):
            raise ConfigError(f"task.direction={direction} must be max or min")
        self.metric, self.direction = metric, direction

    def begin(self, config: ConfigRecord) -> None:
        """A round begins; `config` is what its clients will be told, and is added to."""
        config.update(self.told)

    def rank(self, candidates: Iterable[Candidate]) -> list[Score]:
        """All scores, the best first; ties go to the lower node id, the unscored are last."""
        scores = [self._score(candidate) for candidate in candidates]
        sign = -1.0 if self.direction == "max" else 1.0

        def place(score: Score) -> tuple[bool, float, int]:
            return score.value is None, sign * (score.value or 0.0), score.node

        return sorted(scores, key=place)

    @abstractmethod
    def _score(self, candidate: Candidate) -> Score: ...

    def _judged(self, candidate: Candidate, value: Any, whose: str) -> Score:
        """The score that is `value`, if it is one."""
        number, reason = finite(value), None
        if number is None:
            reason = one_line(f"{whose} {self.metric} is {value!r:.80}, not a finite number")
        return Score(candidate.node, candidate.arrays.cid, number, reason=reason)


class Reported(Selector):
    """What the author says that its update achieves on the examples it holds out."""

    needs_validation = True
    told: ClassVar[Mapping[str, bool]] = {"report": True}
    measurements = 1

    def _score(self, candidate: Candidate) -> Score:
        return self._judged(candidate, candidate.metrics.get(f"val_{self.metric}"), "its author's")


class OnServer(Selector):
    """What the update achieves on the coordinator's held-out examples, `held_out`."""

    def __init__(self, metric: str, direction: str, held_out: Examples, device: str) -> None:
        super().__init__(metric, direction)
        self._held_out, self._device = held_out, device

    def _score(self, candidate: Candidate) -> Score:
        assert candidate.task is not None
        module = candidate.task.model()
        module.load_state_dict(to_torch(candidate.arrays))
        examples = self._held_out
        metrics = tasks.evaluate(
            candidate.task,
            module,
            examples.inputs,
            examples.targets,
            batch_size=BATCH,
            device=self._device,
        )
        return self._judged(candidate, metrics.get(self.metric), "the coordinator's")


class Cross(Selector):
    """The median of what at most `evaluators` other clients measure on what they hold out.

    A round has its own ring of all nodes, ordered by SHA-256 of seed, round and node; a candidate
    goes to those that follow its author. So the choice does not depend on who answers first, and
    each node evaluates about as often as the others. Evaluators that fail are left out. Unless more
    than half of those asked answer there is no score: otherwise a liar would be all that is left.
    Of an even number of answers the worse of the two in the middle counts.
    """

    needs_validation = True

    def __init__(self, metric: str, direction: str, seed: int, evaluators: int) -> None:
        super().__init__(metric, direction)
        self._seed, self._evaluators = seed, evaluators
        self.measurements = evaluators
        self.begin(ConfigRecord())

    def begin(self, config: ConfigRecord) -> None:
        super().begin(config)
        self._asked: list[tuple[Message, int]] = []  # question, author of the candidate
        self._answers: dict[int, dict[int, float]] = {}  # author -> evaluator -> value
        self._failed: dict[int, str] = {}  # author -> why an evaluator has no answer

    def questions(
        self, server_round: int, node: int, content: RecordDict, nodes: Iterable[int]
    ) -> list[Message]:
        """What to ask of `nodes` as soon as the candidate of `node`, in `content`, is there."""
        chosen = ring_after(self._seed, server_round, node, nodes)[: self._evaluators]
        # The group goes into the signature: answers about two candidates cannot be exchanged.
        candidate = next(iter(content.array_records.values()))
        group = str(candidate.cid) if isinstance(candidate, StoredArrays) else ""
        asked = [Message(content, each, "evaluate", group_id=group) for each in chosen]
        self._asked += [(message, node) for message in asked]
        return asked

    def take(self, replies: Iterable[Message]) -> None:
        """The answers to `questions`."""
        # Numbers are given as messages are sent, so only now do the questions have theirs.
        authors = {message.metadata.message_id: author for message, author in self._asked}
        for reply in replies:
            author = authors.get(reply.metadata.reply_to_message_id)
            if author is None:
                continue
            evaluator = reply.metadata.src_node_id
            if reply.has_error():
                self._failed[author] = f"node {evaluator}: {reply.error.reason}"
                continue
            _, metrics = parts(reply)
            value = metrics[0].get(self.metric) if len(metrics) == 1 else None
            if (number := finite(value)) is None:
                self._failed[author] = f"node {evaluator}: {self.metric} is {value!r:.80}"
            else:
                self._answers.setdefault(author, {})[evaluator] = number

    def _score(self, candidate: Candidate) -> Score:
        node, cid = candidate.node, candidate.arrays.cid
        answers = sorted(self._answers.get(node, {}).items())
        asked = len({each.metadata.dst_node_id for each, by in self._asked if by == node})
        if 2 * len(answers) <= asked or not asked:
            why = self._failed.get(node, "no answer" if asked else "nobody was there")
            reason = f"{len(answers)} of {asked} evaluators gave a score, too few ({why})"
            return Score(node, cid, None, tuple(answers), one_line(reason))
        worse = statistics.median_low if self.direction == "max" else statistics.median_high
        return Score(node, cid, worse([value for _, value in answers]), tuple(answers))


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def ring_after(seed: int, server_round: int, node: int, nodes: Iterable[int]) -> list[int]:
    """All `nodes` but `node`, in the order in which they follow it on the round's ring."""

    def place(each: int) -> bytes:
        return hashlib.sha256(f"{seed}/{server_round}/{each}".encode()).digest()

    ring = sorted({*nodes, node}, key=place)
    at = ring.index(node)
    return ring[at + 1 :] + ring[:at]


SELECTORS: Sequence[str] = ("reported", "server", "cross")


def make_selector(
    name: str,
    *,
    metric: str,
    direction: str,
    seed: int,
    evaluators: int,
    per_round: int | None,
    held_out: Examples | None,
    device: str,
) -> Selector:
    """The selector `name`; ConfigError for one that cannot work here."""
    one_of("selector", name, SELECTORS)
    whole("evaluators", evaluators, 1)
    if name == "reported":
        return Reported(metric, direction)
    if name == "server":
        if held_out is None or not len(held_out):
            raise ConfigError(
                "strategy.selector=server needs examples of the coordinator's own that nothing is "
                "reported on: set data.held_out=0.2, or strategy.selector=cross"
            )
        return OnServer(metric, direction, held_out, device)
    if per_round is not None and per_round < 2:
        raise ConfigError(
            f"strategy.selector=cross has clients evaluate each other's updates; with "
            f"clients.per_round={per_round} there is nothing to choose from: take 2 or more"
        )
    return Cross(metric, direction, seed, evaluators)
