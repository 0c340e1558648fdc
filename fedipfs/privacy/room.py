"""What a site allows, and whether a history of mechanisms stays within it."""

from __future__ import annotations

import math
from typing import NamedTuple

from fedipfs.errors import ConfigError
from fedipfs.privacy import accounting
from fedipfs.privacy.accounting import ACCOUNTANTS, MOST_STEPS, History, merged


class Cap(NamedTuple):
    """What a site allows: `epsilon` at `delta`, as `accountant` ("prv" or "rdp") computes it."""

    epsilon: float
    delta: float
    accountant: str = "prv"

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:g} at delta {self.delta:g}"

    def checked(self) -> Cap:
        """The same in numbers that JSON keeps exactly. Raises ConfigError if it cannot be."""
        if not (0 < self.epsilon < math.inf):
            raise ConfigError(f"epsilon={self.epsilon}: a cap is a positive number, such as 3")
        if not (0 < self.delta < 1):
            raise ConfigError(f"delta={self.delta}: choose one far below 1 / records, such as 1e-5")
        if self.accountant not in ACCOUNTANTS:
            raise ConfigError(
                f"accountant={self.accountant!r:.80}: choose one of {', '.join(ACCOUNTANTS)}"
            )
        return Cap(float(self.epsilon), float(self.delta), self.accountant)


class Room:
    """Knows a history that fits the cap, so that most spends cost a comparison and no epsilon.

    A part of what fits fits. So when one more epsilon is to be computed anyway, it tries a history
    that is ahead of what is asked, by as much as it was; by half of it where that does not fit;
    and so on. In a thousand rounds, of whatever mechanisms in whatever order, that makes dozens.
    """

    def __init__(self, cap: Cap) -> None:
        self.cap = cap
        self._known: dict[tuple[float, float], int] = {}
        self._ahead = 1.0

    def allows(self, history: History) -> bool:
        """Whether `history` fits the cap."""
        if all(steps <= self._known.get((noise, rate), 0) for noise, rate, steps in history):
            return True
        if not self._fits(history):
            return False
        self._know(history)
        most = max(each.steps for each in history)
        while self._ahead * most >= 1:
            ahead = merged(
                each._replace(steps=min(MOST_STEPS, math.ceil(each.steps * (1 + self._ahead))))
                for each in history
            )
            if self._fits(ahead):
                self._know(ahead)
                break
            self._ahead /= 2
        return True

    def _fits(self, history: History) -> bool:
        cap = self.cap
        return accounting.epsilon(history, cap.delta, cap.accountant) <= cap.epsilon

    def _know(self, history: History) -> None:
        self._known = {(noise, rate): steps for noise, rate, steps in history}
