"""What strategies that choose among updates have in common: a selector, asked as updates arrive."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedipfs.data import Examples
from fedipfs.errors import ConfigError, FormatError, StoreError
from fedipfs.exchange import StoredArrays
from fedipfs.strategies.base import ClientUpdate, StoreStrategy, as_model
from fedipfs.strategies.screen import parts
from fedipfs.strategies.selector import Candidate, Cross, Score, Selector, make_selector
from fedipfs.tasks import Task

_KEPT = ("run-config", "server-round")  # what evaluators are told of the round


class SelectingStrategy(StoreStrategy):
    """A StoreStrategy whose `selector` scores the updates; see strategies/selector.py.

    None does not. `evaluators` is the most clients that evaluate an update under selector=cross.
    What is chosen, or sent to evaluators, is stored as models are: decoded. Being one client's, it
    is sealed wherever updates are, for all participants instead of for the coordinator alone.
    """

    def __init__(
        self,
        *args: Any,
        selector: str | None = "cross",
        evaluators: int = 3,
        metric: str = "accuracy",
        direction: str = "max",
        seed: int = 0,
        task: Task | None = None,
        held_out: Examples | None = None,
        per_round: int | None = None,
        validation: float | None = None,
        train: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if selector == "server" and task is None:
            raise ConfigError("strategy.selector=server needs the task: give task=")
        self._task = task
        self._device = str((train or {}).get("device", "cpu"))
        self._selector: Selector | None = None
        if selector is not None:
            self._selector = make_selector(
                selector,
                metric=metric,
                direction=direction,
                seed=seed,
                evaluators=evaluators,
                per_round=per_round,
                held_out=held_out,
                device=self._device,
            )
        if validation == 0 and self.needs_validation:
            raise ConfigError(
                f"strategy.selector={selector} goes by what clients measure on examples that they "
                "hold out, and data.validation=0 leaves them none: set data.validation=0.1"
            )
        self._told = ConfigRecord()
        self._shared: dict[int, tuple[StoredArrays, StoredArrays]] = {}  # node -> update, readable

    @property
    def needs_validation(self) -> bool:
        """Whether clients must hold examples out."""
        return self._selector is not None and self._selector.needs_validation

    @property
    def measurements(self) -> int:
        """How often a client measures a model for the selector, in a round, at most."""
        return 0 if self._selector is None else self._selector.measurements

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._shared = {}
        if self._selector is not None:
            self._selector.begin(config)
        messages = super().configure_train(server_round, arrays, config, grid)
        self._told = ConfigRecord({key: config[key] for key in _KEPT if key in config})
        return messages

    def follow_up(self, server_round: int, reply: Message, grid: Grid) -> Iterable[Message]:
        """Questions about an update, for other clients, to be sent while others still train."""
        if not isinstance(self._selector, Cross) or reply.has_error():
            return []
        arrays = list(parts(reply)[0].values())
        if len(arrays) != 1 or not isinstance(arrays[0], StoredArrays):
            return []  # aggregate_train says what is wrong with it
        node = reply.metadata.src_node_id
        try:
            shared = self._readable(node, arrays[0])
        except (StoreError, FormatError):
            return []  # likewise
        config = ConfigRecord({**self._told})
        if (options := self._options_of(node)) is not None:
            config["task-options"] = json.dumps(options)
        content = RecordDict({self.arrayrecord_key: shared, self.configrecord_key: config})
        return self._selector.questions(server_round, node, content, grid.get_node_ids())

    def take_follow_ups(self, replies: Iterable[Message]) -> None:
        """The answers to what `follow_up` asked."""
        if isinstance(self._selector, Cross):
            self._selector.take(replies)

    def _options_of(self, node: int) -> Mapping[str, Any] | None:
        """The options of the task that `node` trains, if they are not the run's."""
        return None

    def _task_of(self, node: int) -> Task | None:
        """The task that `node` trains."""
        return self._task

    def _readable(self, node: int, update: StoredArrays) -> StoredArrays:
        """`update` of `node` as stored model, which everybody on the other side can read."""
        known = self._shared.get(node)
        if known is None or known[0] is not update:
            known = self._shared[node] = (update, as_model(update, self.model.vault))
        return known[1]

    def _rank(self, updates: Iterable[ClientUpdate]) -> list[Score]:
        """The scores of a round's updates, the best first.

        An update that is not what the evaluators saw (clipped, say) has no score.
        """
        if self._selector is None:
            return []
        candidates, unseen = [], []
        for node, update, _, metrics, _ in updates:
            sent, shared = self._shared.get(node, (None, update))
            if sent is update or not isinstance(self._selector, Cross):
                candidates.append(Candidate(node, shared, metrics, self._task_of(node)))
            else:
                why = "it is not what evaluators were given"
                unseen.append(Score(node, update.cid, None, reason=why))
        return self._selector.rank(candidates) + unseen
