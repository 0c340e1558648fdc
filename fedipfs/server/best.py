"""The best model of a run so far, by one metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedipfs.ipld import CID


def measured(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """A round's results: on the server's test set, else what the clients measured."""
    return line.get("server") or line.get("evaluate") or {}


class Scored(NamedTuple):
    """A model and what it achieved; `score` is the value, turned so that more is better."""

    score: float
    value: float
    round: int
    model: CID


class Best:
    """Follows `metric` from round to round; `direction` is "max" or "min"."""

    def __init__(self, metric: str, direction: str) -> None:
        self.metric, self._sign = metric, 1.0 if direction == "max" else -1.0
        self.so_far: Scored | None = None

    def score(self, line: Mapping[str, Any]) -> float | None:
        """A round's value of the metric, so that more is better; None if there is none."""
        if line.get("diverged"):
            return None
        value = measured(line).get(self.metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return self._sign * value

    def see(self, line: Mapping[str, Any], model: CID) -> bool:
        """Whether a round's model is the best so far (the first of equals); it is kept then."""
        score = self.score(line)
        if score is None or (self.so_far is not None and score <= self.so_far.score):
            return False
        self.so_far = Scored(score, self._sign * score, int(line["round"]), model)
        return True
