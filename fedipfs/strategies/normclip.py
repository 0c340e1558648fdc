"""A bound on what one client can do to the model: updates are shortened to a norm."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedipfs.errors import BadUpdate, EdgeError, FormatError, StoreError, one_line
from fedipfs.exchange import StoredArrays, check_update
from fedipfs.flower_compat import CLIENT_APP_RAISED_EXCEPTION, error_instead
from fedipfs.strategies.delta import norm, scaled
from fedipfs.strategies.options import positive


class NormClip(Strategy):
    """Any strategy on updates w_k' = w_t + min(1, C / ||w_k - w_t||_2) (w_k - w_t).

    C is `clip_update_norm`, and w_t the model that client k was sent. Sun et al. 2019, "Can You
    Really Backdoor Federated Learning?", section 5. Norms are over floating-point tensors; others
    (counters) are neither counted nor changed, and further records (`extra_arrays`) stay as they
    are. Costs one pass over each update and its base; what is clipped is computed as it is read,
    so it has no CID of its own.

    It asks, evaluates, screens and remembers as `strategy` does: each attribute that it has not
    itself is that one's.
    """

    def __init__(self, strategy: Strategy, clip_update_norm: float) -> None:
        self.strategy = strategy
        self.clip_update_norm = positive("clip_update_norm", clip_update_norm)
        self._clipped: dict[int, float] = {}
        self._shortened: dict[int, tuple[Message, Message]] = {}  # node -> reply, as it is clipped

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.strategy, name)

    @property
    def notes(self) -> dict[str, Any]:
        """Those of the strategy, and the norm before clipping of each update that was clipped."""
        clipped = [{"node": node, "norm": norm} for node, norm in sorted(self._clipped.items())]
        own = {"norm": self.clip_update_norm, "clipped": len(clipped), "updates": clipped}
        return {**getattr(self.strategy, "notes", {}), "clip_update_norm": own}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._clipped, self._shortened = {}, {}
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def follow_up(self, server_round: int, reply: Message, grid: Grid) -> Iterable[Message]:
        """What the strategy asks of others about the clipped update, if it asks anything."""
        follow = getattr(self.strategy, "follow_up", None)
        return () if follow is None else follow(server_round, self._clip(reply), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        clipped = [reply if reply.has_error() else self._clip(reply) for reply in replies]
        return self.strategy.aggregate_train(server_round, clipped)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()

    def _clip(self, reply: Message) -> Message:
        """A message like `reply`, which stays as it was, with a shorter update if need be.

        The same one for the same reply: what others evaluate is what is combined.

        An update whose norm cannot be taken becomes an error that says why: it might be read
        unclipped otherwise, by whoever has better luck with it.
        """
        node = reply.metadata.src_node_id
        if node in self._shortened and self._shortened[node][0] is reply:
            return self._shortened[node][1]
        extra = getattr(self.strategy, "extra_arrays", ())
        content = RecordDict()
        try:
            for key, record in reply.content.items():
                if isinstance(record, ArrayRecord) and key not in extra:
                    record = self._clip_record(node, record)
                content[key] = record
        except (BadUpdate, StoreError, FormatError) as error:
            return error_instead(reply, Error(CLIENT_APP_RAISED_EXCEPTION, one_line(error)))
        clipped = copy.copy(reply)
        clipped.content = content
        self._shortened[node] = reply, clipped
        return clipped

    def _clip_record(self, node: int, record: ArrayRecord) -> ArrayRecord:
        if not isinstance(record, StoredArrays) or record.base is None:
            raise EdgeError("updates are clipped as they are read: run NormClip on a CidGrid")
        update, base = record.weights, record.base.weights
        check_update(record, base.specs, read=False)
        length = norm(update, base)
        if length <= self.clip_update_norm:
            return record
        self._clipped[node] = length
        return record.over(scaled(update, base, self.clip_update_norm / length))
