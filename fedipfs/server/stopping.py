"""When a run ends before its last round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedipfs.server.best import SERVER, Best

_LEAST_LOSS = 0.1  # a run that begins with a good model may get a little worse


class Stopping:
    """Watches the rounds; `options` is the section `stop` of the configuration, `source` whose
    results count (server/best.py).

    `wall_s`: no round begins later than that many seconds after the start; `target`: the metric is
    reached; `patience`: so many evaluations in a row without an improvement of more than
    `min_delta`; `divergence`: the loss is not finite, or over so many times the first one measured.
    """

    def __init__(
        self, options: Mapping[str, Any], metric: str, direction: str, source: str = SERVER
    ) -> None:
        self._options, self._metric, self._source = options, metric, source
        self._sign = 1.0 if direction == "max" else -1.0
        self._judge = Best(metric, direction, source)
        self._top: float | None = None
        self._since = 0  # evaluations without improvement
        self._first_loss: float | None = None
        self.diverged: str | None = None  # why, if it did

    def see(self, line: Mapping[str, Any]) -> str | None:
        """Why the run should stop after this round, if it should; sets `diverged` if it did."""
        if why := self._divergence(line):
            self.diverged = why
            return why
        score = self._judge.score(line)
        if score is None:
            return None
        target, patience = self._options["target"], self._options["patience"]
        if target is not None and score >= self._sign * target:
            return f"{self._metric} has reached stop.target={target:g}"
        if self._top is None or score > self._top + self._options["min_delta"]:
            self._top, self._since = score, 0
        else:
            self._since += 1
        if patience is not None and self._since >= patience:
            return f"{self._metric} has not improved in {self._since} evaluations (stop.patience)"
        return None

    def out_of_time(self, seconds: float) -> str | None:
        """Why no further round should begin after a run of `seconds`, if it should not."""
        limit = self._options["wall_s"]
        if limit is None or seconds < limit:
            return None
        return f"{seconds:.0f} s have passed (stop.wall_s={limit:g})"

    def _divergence(self, line: Mapping[str, Any]) -> str | None:
        factor = self._options["divergence"]
        results = line.get(self._source) or {}
        if factor is None or "loss" not in results:
            return None
        loss = results["loss"]
        if loss is None or not math.isfinite(loss):
            return f"the loss of round {line['round']} is not finite"
        if self._first_loss is None:
            self._first_loss = max(float(loss), _LEAST_LOSS)
        elif loss > factor * self._first_loss:
            return (
                f"the loss of round {line['round']} is {loss:.4g}, over {factor:g} times "
                f"that of the first evaluation, {self._first_loss:.4g}"
            )
        return None
