"""What a run has cost in privacy so far: of each client's records, or of the clients themselves.

At record level this is what clients say they paid for what arrived here; each site's own ledger
knows more (other runs, answers that were lost), and is what holds it to its budget.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message

from fedipfs.errors import one_line
from fedipfs.privacy import noise

OnRelease = Callable[[int], None]
Price = Callable[[list[int]], dict[str, float]]
RECORD = "privacy"  # the key of what an answer says of its own privacy

_MOST_STEPS = 10_000_000  # of one mechanism: what accounting takes
_LONGEST = 160  # characters of what a client says
_KEPT = ("name", "delta", "accountant")  # of the section, for records
_TOLD = (*_KEPT, "noise_multiplier", "clip_norm", "sample_rate")  # and for the summary


class Spending(ABC):
    """Keeps count over rounds; `section` is the run's `privacy`, complete."""

    unit: str

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._section = section

    @classmethod
    def of(
        cls,
        section: Mapping[str, Any],
        started: int = 0,
        on_release: OnRelease = lambda count: None,
        price: Price | None = None,
    ) -> Spending | None:
        """What fits the level of privacy; None where there is nothing to count. See OfClients."""
        if section["name"] == "none":
            return None
        return (
            OfRecords(section) if price is None else OfClients(section, started, on_release, price)
        )

    @abstractmethod
    def close(self) -> dict[str, Any]:
        """What the round's record says: all that was spent so far, and what it comes to."""

    @abstractmethod
    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from what `close` gave."""

    @abstractmethod
    def cost(self) -> dict[str, float]:
        """`epsilon` so far, by the accountant that counts, and `epsilon_NAME` by each."""

    @abstractmethod
    def noise(self) -> str:
        """Whose noise it was."""

    def summary(self) -> dict[str, Any]:
        """What the run's summary says."""
        section = self._section
        return {
            "unit": self.unit,
            **{key: section[key] for key in _TOLD if key in section},
            "planned_epsilon": section["epsilon"],
            **self.cost(),
            "noise": self.noise(),
        }

    def _head(self) -> dict[str, Any]:
        return {key: self._section[key] for key in _KEPT if key in self._section}


class OfRecords(Spending):
    """What each client's records have paid for what arrived here."""

    unit = "record"

    def __init__(self, section: Mapping[str, Any]) -> None:
        super().__init__(section)
        self._spent: dict[str, list[list[Any]]] = {}  # client -> events, those alike summed
        self._notes: dict[str, dict[str, Any]] = {}  # client -> what it says in this round
        self._noise: set[str] = set()

    def heard(self, client: str, reply: Message) -> None:
        """Take in what an answer says it cost."""
        if reply.has_error():
            return
        record = reply.content.get(RECORD)
        said = dict(record) if isinstance(record, ConfigRecord) else {}
        for event in self._events(said.get("events")):
            self._add(client, event)
        notes = {
            key: one_line(said[key], _LONGEST)
            for key in ("ledger", "clipping", "noise")
            if isinstance(said.get(key), str) and said[key]
        }
        self._notes.setdefault(client, {}).update(notes)
        self._noise |= {notes["noise"]} if "noise" in notes else set()

    def close(self) -> dict[str, Any]:
        notes, self._notes = self._notes, {}
        clients = {
            name: {"events": events, **self._cost(events), **notes.get(name, {})}
            for name, events in sorted(self._spent.items())
        }
        return {**self._head(), "clients": clients, **self.cost()}

    def restore(self, record: Mapping[str, Any]) -> None:
        for name, each in record["clients"].items():
            self._spent[name] = [list(event) for event in each["events"]]
            self._noise |= {each["noise"]} if "noise" in each else set()

    def cost(self) -> dict[str, float]:
        costs = [self._cost(events) for events in self._spent.values()] or [self._cost([])]
        return {key: max(cost[key] for cost in costs) for key in costs[0]}

    def noise(self) -> str:
        made = "; ".join(sorted(self._noise)) or "none so far"
        return f"{made}; {noise.FLOATS}"

    def _events(self, values: Any) -> Iterable[list[Any]]:
        """Those of the triples (noise multiplier, sampling rate, steps) that this run can have.

        Whatever a client says of others, the run goes on, and epsilon is not long to compute.
        """
        section = self._section
        own = [section["noise_multiplier"], section["sample_rate"]]
        metrics = [section["metrics_noise_multiplier"], 1.0]
        if not isinstance(values, list | tuple):
            return
        for at in range(0, len(values) - 2, 3):
            *mechanism, steps = values[at : at + 3]
            if mechanism in (own, metrics) and type(steps) in (int, float) and steps >= 1:
                yield [*map(float, mechanism), math.floor(min(steps, _MOST_STEPS))]

    def _add(self, client: str, event: list[Any]) -> None:
        multiplier, rate, steps = event
        known = self._spent.setdefault(client, [])
        for each in known:
            if each[:2] == [multiplier, rate]:
                each[2] = min(each[2] + steps, _MOST_STEPS)
                return
        known.append([multiplier, rate, steps])

    def _cost(self, events: list[list[Any]]) -> dict[str, float]:
        return by_accountants(
            [tuple(event) for event in events], self._section["delta"], self._section["accountant"]
        )


class OfClients(Spending):
    """What all clients alike have paid for the noised means that were made.

    `price` says what rounds with so many survivors each cost; 0 stands for a round that nobody
    knows the survivors of. `on_release` is told, before a mean is made, how many were begun: what a
    process that was killed had begun counts as spent. `started` is what it was told last.
    """

    unit = "client"

    def __init__(
        self, section: Mapping[str, Any], started: int, on_release: OnRelease, price: Price
    ) -> None:
        super().__init__(section)
        self._started, self._on_release, self._price = started, on_release, price
        self._survivors: list[int] = []
        self._take_up()

    def released(self) -> None:
        """Take in that a round's noised mean is about to be made."""
        self._survivors.append(0)
        self._on_release(len(self._survivors))

    def survived(self, count: int) -> None:
        """Take in how many clients are in the mean that was made last."""
        self._survivors[-1] = count

    def close(self) -> dict[str, Any]:
        return {**self._head(), "survivors": list(self._survivors), **self.cost()}

    def restore(self, record: Mapping[str, Any]) -> None:
        self._survivors = list(record["survivors"])
        self._take_up()

    def cost(self) -> dict[str, float]:
        return self._price(self._survivors)

    def noise(self) -> str:
        if self._section["name"] == "distributed":
            return f"{noise.SECRET} of each client; integers"
        return f"{noise.SECRET}; {noise.FLOATS}"

    def _take_up(self) -> None:
        """Count what was begun and is in no record."""
        self._survivors += [0] * (self._started - len(self._survivors))


def by_accountants(
    history: list[tuple[Any, ...]], delta: float, accountant: str
) -> dict[str, float]:
    """`epsilon` by the accountant that counts, and `epsilon_NAME` by each."""
    from fedipfs.privacy.accounting import ACCOUNTANTS, epsilon

    found = {name: epsilon(history, delta, name) for name in ACCOUNTANTS}
    return {
        "epsilon": found[accountant],
        **{f"epsilon_{name}": value for name, value in found.items()},
    }
