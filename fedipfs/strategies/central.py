"""Client-level differential privacy at the coordinator: noise on the mean of clipped updates."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedipfs.errors import (
    BadUpdate,
    ConfigError,
    EdgeError,
    FormatError,
    StoreError,
    one_line,
)
from fedipfs.exchange import StoredArrays, check_update, specs_of
from fedipfs.privacy import noise
from fedipfs.privacy.accounting import Event
from fedipfs.privacy.central import Forecast, adapted, event, forecast, update_multiplier
from fedipfs.strategies.clipped import ClippedSum, base_of, length
from fedipfs.strategies.delta import Derived
from fedipfs.strategies.fedavg import FedAvg
from fedipfs.strategies.screen import parts, require, screen
from fedipfs.strategies.sensitivity import check_needs_only_mean
from fedipfs.weights import Tensors, TensorSpec, is_float

if TYPE_CHECKING:
    from torch import nn

    from fedipfs.strategies.catalogue import Brief

log = logging.getLogger(__name__)

_BEYOND = 1e300
_UNREADABLE = (BadUpdate, StoreError, FormatError)
_OPTIONS = ("noise_multiplier", "clip_norm", "adaptive", "target_quantile", "clip_lr",
            "count_stddev", "delta")  # fmt: skip


class CentralDP(Strategy):
    """`strategy` on one update, w_t + (sum_k min(1, C / ||d_k||_2) d_k + N(0, (z C)^2 I)) / m.

    d_k = w_k - w_t are the changes of the m clients whose updates can be used; all count alike,
    however many examples they have. C is `clip_norm`, z `noise_multiplier`. McMahan et al. 2018,
    "Learning Differentially Private Recurrent Language Models", with a flat clip and every client
    of the cohort; noise is drawn for the m that are there, not for those that were asked.

    With `adaptive` C follows the `target_quantile` of the lengths: Andrew et al. 2021,
    "Differentially Private Learning with Adaptive Clipping", Algorithm 1. The number of updates
    not longer than C gets noise N(0, s^2), s being `count_stddev`, and the updates get
    (z^-2 - (2 s)^-2)^(-1/2) instead of z, so that both together cost what z says.

    Private is what any one client contributes to a round: replaced by zero it would hardly be
    missed. Who took part or failed, and so m, is public. Clients trust the coordinator, which sees
    their updates; it must publish neither these nor anything else that they measured. So no metric
    of theirs is handed on, and `notes` hold only what the noise covers.

    Clipped and noised are all floating-point tensors, BatchNorm's statistics included (a variance
    may come out negative: prefer GroupNorm). Others (counters, which would tell how many examples
    there are) stay as they were. `leaders` has the tensors that move, each with the one whose
    values and noise it takes, which for tied weights is another; None: all, each its own.

    Noise is fresh in every call, so a run that is resumed does not end with the same CID. Raises
    ConfigError for a strategy that does more with updates than taking their mean.
    """

    screens_replies = True

    def __init__(
        self,
        strategy: Strategy,
        noise_multiplier: float,
        clip_norm: float,
        *,
        adaptive: bool = False,
        target_quantile: float = 0.5,
        clip_lr: float = 0.2,
        count_stddev: float | None = None,
        min_successes: int = 1,
        leaders: Mapping[str, str] | None = None,
    ) -> None:
        check_needs_only_mean(strategy)
        if isinstance(strategy, FedAvg):
            strategy.min_successes = 1  # it gets one update, the mean
        self.strategy = strategy
        self.noise_multiplier = _positive("noise_multiplier", noise_multiplier)
        self.clip_norm = _positive("clip_norm", clip_norm)
        self.adaptive = adaptive
        self.target_quantile = _fraction("target_quantile", target_quantile)
        self.clip_lr = _positive("clip_lr", clip_lr)
        if count_stddev is None:
            count_stddev = self.noise_multiplier
        self.count_stddev = _positive("count_stddev", count_stddev)
        if adaptive and 2 * self.count_stddev <= self.noise_multiplier:
            raise ConfigError(
                f"privacy.count_stddev={count_stddev} must be above half of "
                f"privacy.noise_multiplier={noise_multiplier}, or no noise on the updates makes "
                "up for it; leave it out, or raise it"
            )
        self.min_successes = max(1, min_successes)
        self._leaders = None if leaders is None else dict(leaders)
        self._excluded: dict[int, str] = {}
        self._notes: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.strategy, name)

    @property
    def excluded(self) -> dict[int, str]:
        """Node id -> reason, for the round aggregated last."""
        return self._excluded

    @property
    def notes(self) -> dict[str, Any]:
        """How the updates were combined last, for the round's record, which others may read."""
        return self._notes

    def forecast(
        self, model: ArrayRecord, *, rounds: int, delta: float, clients: int, per_round: int
    ) -> Forecast:
        """What a run of `rounds` rounds that begins with `model` will cost, and for what."""
        return forecast(
            self.noise_multiplier,
            rounds,
            delta,
            clients,
            per_round=per_round,
            values=sum(spec.elements for spec in self._specs(specs_of(model))),
            count_stddev=self.count_stddev if self.adaptive else None,
        )

    def spent(self, rounds: int) -> Event:
        """What `rounds` rounds cost each client."""
        return event(self.noise_multiplier, rounds)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        good, self._excluded = screen(replies, self.weighted_by_key)
        self._notes = {}
        total, first = self._sum(server_round, {each.metadata.src_node_id: each for each in good})
        update, source = _update(first), noise.generator()
        base = base_of(update).weights
        multiplier = self.noise_multiplier
        if self.adaptive:
            multiplier = update_multiplier(multiplier, self.count_stddev)
        deviation = multiplier * self.clip_norm
        self._notes = {
            "updates": total.count,
            "clip_norm": self.clip_norm,
            "noise_multiplier": self.noise_multiplier,
            "noise_stddev": deviation / total.count,
        }
        values = total.noised_mean(base, deviation, source)
        if self.adaptive:
            fraction = (total.fitting + source.normal(0, self.count_stddev)) / total.count
            self._notes |= {"count_stddev": self.count_stddev, "fraction_fitting": fraction}
            self.clip_norm = adapted(self.clip_norm, fraction, self.target_quantile, self.clip_lr)
        mean = copy.copy(first)
        mean.content = RecordDict(
            {
                self.arrayrecord_key: update.over(self._moved(base, values)),
                "metrics": MetricRecord({self.weighted_by_key: 1}),
            }
        )
        arrays, _ = self.strategy.aggregate_train(server_round, [mean])
        return arrays, MetricRecord()

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

    def _sum(self, server_round: int, replies: dict[int, Message]) -> tuple[ClippedSum, Message]:
        """The sum of the updates that can be read, and the first reply that brought one.

        Each is read twice: its length must be known before it is added.
        """
        lengths = {}
        for node, reply in replies.items():
            try:
                lengths[node] = self._length(_update(reply))
            except _UNREADABLE as error:
                self._excluded[node] = one_line(error)
        while True:
            for node, reason in self._excluded.items():
                log.warning("round %d: update of node %d left out: %s", server_round, node, reason)
            good = [node for node in replies if node not in self._excluded]
            require(self.min_successes, len(good), self._excluded, f"round {server_round}")
            first = replies[good[0]]
            total = ClippedSum(self._specs(base_of(_update(first)).weights.specs), self.clip_norm)
            for node in good:
                try:
                    total.add(_update(replies[node]), lengths[node])
                except _UNREADABLE as error:  # rare: it could be read just now
                    self._excluded[node] = one_line(error)
                    break
            else:
                return total, first

    def _length(self, update: StoredArrays) -> float:
        specs = base_of(update).weights.specs
        check_update(update, specs, read=False)
        return length(update, self._specs(specs))

    def _moved(self, base: Tensors, values: Mapping[str, np.ndarray]) -> Tensors:
        """`base` with `values`, flat, in the tensors that move."""
        leaders = self._leaders_in(base.specs)

        def piece(name: str, start: int) -> np.ndarray:
            if name not in leaders:
                return base.piece(name, start)
            step = base.piece_starts(base.specs[name]).step
            return values[leaders[name]][start : start + step]

        return Derived(base, piece)

    def _specs(self, specs: Mapping[str, TensorSpec]) -> list[TensorSpec]:
        """What is summed and gets noise of its own."""
        leaders = self._leaders_in(specs)
        return [spec for spec in specs.values() if leaders.get(spec.name) == spec.name]

    def _leaders_in(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
        if self._leaders is not None:
            return self._leaders
        return {spec.name: spec.name for spec in specs.values() if is_float(spec)}


def central(strategy: Strategy, options: Mapping[str, Any], brief: Brief) -> CentralDP:
    """`strategy` with client-level privacy as `options`, the section `privacy`, describe it.

    They are those of CentralDP (null: its default) and `delta`, which is only checked here.
    `count_stddev` null is clients.per_round / 20, as in the paper, but at least the noise
    multiplier: for few clients so little noise on the count would have to be made up for on the
    updates. Raises ConfigError for an unknown option, for what cannot be right, and where
    something would be published that the noise does not cover.
    """
    given = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if key not in _OPTIONS:
            close = get_close_matches(key, _OPTIONS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            raise ConfigError(f"unknown privacy.{key}{hint} choose one of: {', '.join(_OPTIONS)}")
    for key in ("noise_multiplier", "clip_norm"):
        if key not in given:
            raise ConfigError(f"privacy.{key} is missing; give a number above 0")
    if brief.evaluates:
        raise ConfigError(
            "evaluate.federated=true publishes what clients measure, which privacy=central does "
            "not cover; set evaluate.federated=false and have the server evaluate"
        )
    if "delta" in given:
        _fraction("delta", given.pop("delta"))
    if type(given.get("adaptive", False)) is not bool:
        raise ConfigError(f"privacy.adaptive={given['adaptive']} must be true or false")
    if "count_stddev" not in given:
        least = _positive("noise_multiplier", given["noise_multiplier"])
        given["count_stddev"] = max(least, brief.per_round / 20)
    return CentralDP(
        strategy,
        **given,
        min_successes=brief.min_successes,
        leaders=None if brief.task is None else moving(brief.task.model()),
    )


def moving(model: nn.Module) -> dict[str, str]:
    """The floating-point tensors of a state_dict that training may change, and whose values each
    takes: the first name's of tied weights, else its own."""
    frozen = {id(each) for each in model.parameters() if not each.requires_grad}
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(each), name)
        for name, each in model.state_dict(keep_vars=True).items()
        if each.is_floating_point() and id(each) not in frozen
    }


def _update(reply: Message) -> StoredArrays:
    (update,) = parts(reply)[0].values()
    if not isinstance(update, StoredArrays):
        raise EdgeError("updates are read from the store: run CentralDP on a CidGrid")
    return update


def _positive(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < _BEYOND:
        raise ConfigError(f"privacy.{key}={value} must be a number above 0")
    return float(value)


def _fraction(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1:
        raise ConfigError(f"privacy.{key}={value} must be a number between 0 and 1")
    return float(value)
