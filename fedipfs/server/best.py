"""The best model of a run so far, by one metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedipfs.ipld import CID

SERVER, CLIENTS = "server", "median"  # the keys of a round's line that hold results


def source(config: Mapping[str, Any]) -> str:
    """Whose results count in a run: the server's on its test set, else the median client's.

    One or the other from beginning to end, as they are not comparable. Clients are only believed;
    a median at least cannot be moved by fewer than half of them.
    """
    return SERVER if config["evaluate"]["server"] else CLIENTS


class Scored(NamedTuple):
    """A model and what it achieved; `score` is the value, turned so that more is better."""

    score: float
    value: float
    round: int
    model: CID


class Best:
    """Follows `metric` from round to round; `direction` is "max" or "min", `source` see there."""

    def __init__(self, metric: str, direction: str, source: str = SERVER) -> None:
        self._source = source
        self.metric, self._sign = metric, 1.0 if direction == "max" else -1.0
        self.so_far: Scored | None = None

    def score(self, line: Mapping[str, Any]) -> float | None:
        """A round's value of the metric, so that more is better; None if there is none."""
        if line.get("diverged"):
            return None
        value = (line.get(self._source) or {}).get(self.metric)
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
