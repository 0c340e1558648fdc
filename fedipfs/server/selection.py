"""Who is asked to train in a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedipfs.errors import RunFailed

log = logging.getLogger(__name__)

_MOST_REST = 1 << 20  # rounds


class Selection:
    """Chooses cohorts from the nodes that are there, round by round; a node may join at any time.

    `per_round` nodes (a whole number, or a share of those that fit), and `extra` more, are drawn at
    random or, for `select` "round_robin", among those asked least often. A node that fails
    `exclude_after` times in a row rests for `rest_rounds` rounds; when it fails again, for twice
    as long. Nodes that rest are asked all the same where too few others are there for a round to
    succeed (`least`). `requires`: see `fits`.
    """

    def __init__(
        self,
        per_round: int | float,
        *,
        least: int = 1,
        seed: int = 0,
        extra: int = 0,
        select: str = "random",
        requires: Mapping[str, Any] | None = None,
        exclude_after: int | None = None,
        rest_rounds: int = 1,
        name_of: Callable[[int], str] = "node {}".format,
    ) -> None:
        self._per_round, self._least, self._seed = per_round, least, seed
        self.extra, self._name_of = extra, name_of
        self._round_robin = select == "round_robin"
        self.requires = dict(requires or {})
        self._exclude_after, self._rest_rounds = exclude_after, rest_rounds
        self._failures: dict[int, int] = {}  # node -> failures in a row
        self._asked: dict[int, int] = {}  # node -> times, for round_robin
        self._until: dict[int, int] = {}  # node -> the last round of its rest

    def fit(
        self, number: int, nodes: Iterable[int], offers: Mapping[int, Mapping[str, Any]]
    ) -> list[int]:
        """Those of `nodes` that offer what is required; RunFailed if no round could succeed."""
        fit = [node for node in sorted(nodes) if fits(self.requires, offers.get(node, {}))]
        if len(fit) < self._least:
            what = f" that offer {dict(self.requires)}" if self.requires else ""
            raise RunFailed(
                f"round {number}: {len(fit)} clients are there{what}, {self._least} are needed; "
                "wait for more, or lower clients.min_successes or clients.requires"
            )
        return fit

    def size(self, fit: int) -> int:
        """How many of `fit` nodes train in a round."""
        if isinstance(self._per_round, int):
            return min(self._per_round, fit)
        return max(self._least, math.ceil(self._per_round * fit - 1e-9))

    def cohort(self, number: int, fit: Sequence[int]) -> list[int]:
        """The nodes of round `number`: as many as its size, and `extra` ones."""
        return self.choose(number, fit, self.size(len(fit)) + self.extra)

    def choose(
        self, number: int, nodes: Sequence[int], count: int, *, draw: int = 0, there: int = 0
    ) -> list[int]:
        """At most `count` of `nodes`, in ascending order.

        `draw` tells draws of a round apart, `there` is how many take part in it already.
        """
        rng = np.random.default_rng([self._seed, number, draw])
        order = [nodes[index] for index in rng.permutation(len(nodes))]
        resting = [node for node in order if self._until.get(node, 0) >= number]
        resting.sort(key=lambda node: self._until[node])
        awake = [node for node in order if self._until.get(node, 0) < number]
        if self._round_robin:
            awake.sort(key=lambda node: self._asked.get(node, 0))
        needed = min(self._least - there, count) - len(awake)
        chosen = (awake + resting[: max(0, needed)])[:count]
        if self._round_robin:
            for node in chosen:
                self._asked[node] = self._asked.get(node, 0) + 1
        return sorted(chosen)

    def heard(self, number: int, succeeded: Iterable[int], failed: Iterable[int]) -> None:
        """Take in who did what was asked in round `number`."""
        for node in succeeded:
            self._failures.pop(node, None)
            self._until.pop(node, None)
        for node in failed:
            times = self._failures[node] = self._failures.get(node, 0) + 1
            if self._exclude_after is not None and times >= self._exclude_after:
                rest = min(self._rest_rounds << min(times - self._exclude_after, 20), _MOST_REST)
                self._until[node] = number + rest
                log.warning(
                    "%s has failed %d times in a row: it rests until round %d (its reasons are in "
                    "the rounds' lines; clients.exclude_after=null asks it all the same)",
                    *(self._name_of(node), times, number + rest),
                )

    def state(self) -> dict[str, Any]:
        """What the next choices depend on, for a run that is resumed."""
        tables = {"failures": self._failures, "asked": self._asked, "until": self._until}
        return {
            name: {str(node): value for node, value in sorted(table.items())}
            for name, table in tables.items()
            if table
        }

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from `state`."""
        for name in ("failures", "asked", "until"):
            table = {int(node): value for node, value in state.get(name, {}).items()}
            setattr(self, f"_{name}", table)


def fits(requires: Mapping[str, Any], offers: Mapping[str, Any]) -> bool:
    """Whether a node that announces `offers` has all that is required.

    `{gpu: true, examples_min: 100}`: `_min` and `_max` compare numbers, other keys must be equal;
    where a node offers a list, it must hold the value. A node is believed what it announces.
    """
    return all(_has(key, wanted, offers) for key, wanted in requires.items())


def _has(key: str, wanted: Any, offers: Mapping[str, Any]) -> bool:
    name, _, bound = key.rpartition("_")
    if bound in ("min", "max") and name:
        value = offers.get(name)
        if type(value) not in (int, float):
            return False
        return bool(value >= wanted if bound == "min" else value <= wanted)
    value = offers.get(key)
    return wanted in value if isinstance(value, list) else value == wanted
