"""What a run has cost in privacy so far: of each client's records, or of the clients themselves.

At record level this is what clients say they paid for what arrived here; each site's own ledger
knows more (other runs, answers that were lost), and is what holds it to its budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message

from fedipfs.errors import one_line
from fedipfs.privacy import noise

OnRelease = Callable[[int], None]
RECORD = "privacy"  # the key of what an answer says of its own privacy
_MOST_STEPS = 10_000_000  # of one mechanism: what accounting takes
_LONGEST = 160  # characters of what a client says


class Spending:
    """Keeps count over rounds; `section` is the run's `privacy`, complete.

    `on_release` is told, before a noised mean is made, how many were begun: what a process that
    was killed had begun counts as spent. `started` is what it was told last.
    """

    def __init__(self, section: Mapping[str, Any], started: int, on_release: OnRelease) -> None:
        self._section = section
        self._started, self._on_release = started, on_release
        self._spent: dict[str, list[list[Any]]] = {}  # whose -> events, those alike summed
        self._notes: dict[str, dict[str, Any]] = {}  # client -> what it says in this round
        self._noise = {noise.SECRET} if section["name"] != "dp_sgd" else set()
        self._take_up()

    @classmethod
    def of(cls, section: Mapping[str, Any], started: int, on_release: OnRelease) -> Spending | None:
        """None where there is nothing to count."""
        return None if section["name"] == "none" else cls(section, started, on_release)

    def heard(self, client: str, reply: Message) -> None:
        """Take in what an answer says it cost."""
        if reply.has_error() or self._section["name"] != "dp_sgd":
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

    def released(self) -> None:
        """Take in that a round's noised mean is about to be made: all clients pay alike."""
        self._add("", [self._section["noise_multiplier"], 1.0, 1])
        self._on_release(sum(steps for *_, steps in self._spent[""]))

    def close(self) -> dict[str, Any]:
        """What the round's record says: all events so far, what they come to, and the notes."""
        notes, self._notes = self._notes, {}
        section = {key: self._section[key] for key in ("name", "delta", "accountant")}
        if self._section["name"] == "central":
            return {**section, "events": self._spent.get("", []), **self._cost("")}
        clients = {
            name: {"events": events, **self._cost(name), **notes.get(name, {})}
            for name, events in sorted(self._spent.items())
        }
        return {**section, "clients": clients, **self._most()}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from what `close` gave."""
        if "clients" in record:
            known = {name: each["events"] for name, each in record["clients"].items()}
            said = (each.get("noise") for each in record["clients"].values())
            self._noise |= {text for text in said if text}
        else:
            known = {"": record["events"]}
        self._spent = {name: [list(event) for event in events] for name, events in known.items()}
        if "clients" not in record:
            self._take_up()

    def _take_up(self) -> None:
        """Count what was begun and is in no record."""
        counted = sum(steps for *_, steps in self._spent.get("", []))
        if counted < self._started:
            self._add("", [self._section["noise_multiplier"], 1.0, self._started - counted])

    def summary(self) -> dict[str, Any]:
        """What the run's summary says."""
        section = self._section
        kept = ("name", "delta", "accountant", "noise_multiplier", "clip_norm", "sample_rate")
        cost = self._cost("") if section["name"] == "central" else self._most()
        found = {key: section[key] for key in kept if key in section}
        unit = "client" if section["name"] == "central" else "record"
        made = "; ".join(sorted(self._noise)) or "none so far"
        return {
            "unit": unit,
            **found,
            "planned_epsilon": section["epsilon"],
            **cost,
            "noise": f"{made}; as floating-point numbers (their last bits are not hidden)",
        }

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

    def _add(self, whose: str, event: list[Any]) -> None:
        multiplier, rate, steps = event
        known = self._spent.setdefault(whose, [])
        for each in known:
            if each[:2] == [multiplier, rate]:
                each[2] = min(each[2] + steps, _MOST_STEPS)
                return
        known.append([multiplier, rate, steps])

    def _cost(self, whose: str) -> dict[str, float]:
        """Epsilon of all so far, by the accountant that counts, and the other as a check."""
        from fedipfs.privacy.accounting import ACCOUNTANTS, epsilon

        history = [tuple(event) for event in self._spent.get(whose, [])]
        found = {name: epsilon(history, self._section["delta"], name) for name in ACCOUNTANTS}
        by = {f"epsilon_{name}": value for name, value in found.items()}
        return {"epsilon": found[self._section["accountant"]], **by}

    def _most(self) -> dict[str, float]:
        costs = [self._cost(name) for name in self._spent] or [self._cost("")]
        return {key: max(cost[key] for cost in costs) for key in costs[0]}
