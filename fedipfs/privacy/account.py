"""What the entries of a ledger come to: the cap, the versions of the data, what was spent."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fedipfs.errors import ConfigError, LedgerError
from fedipfs.privacy.accounting import Event, History, merged
from fedipfs.privacy.chain import Entry
from fedipfs.privacy.room import Cap, Room

FORMAT = "fedipfs-ledger/v1"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class Spend(NamedTuple):
    """An entry by which something was spent."""

    time: str  # ISO 8601, UTC
    run: str
    round: int
    coordinator: str
    purpose: str
    events: History

    @classmethod
    def of(cls, entry: Entry) -> Spend:
        """Raises KeyError, TypeError, ValueError or ConfigError for what is no such entry."""
        return cls(
            str(entry["time"]),
            str(entry["run"]),
            int(entry["round"]),
            str(entry["coordinator"]),
            str(entry["purpose"]),
            checked_events(entry["events"]),
        )


class Account:
    """Takes in the entries of the ledger of one data set, one after the other."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprints = [fingerprint]  # of all versions of the data set
        self.room: Room
        self.taken = 0  # entries
        self._steps: dict[tuple[float, float], int] = {}

    def take(self, entry: Entry) -> None:
        """Raises KeyError, TypeError, ValueError or UserError for an entry that cannot be next."""
        kind = entry["kind"]
        if (kind == "open") != (self.taken == 0):
            raise ValueError(kind)
        if kind == "open":
            if [entry["format"], entry["fingerprint"]] != [FORMAT, *self.fingerprints]:
                raise ValueError(entry["format"])
            self.room = Room(Cap(**entry["cap"]).checked())
        elif kind == "cap":
            self.room = Room(Cap(**entry["cap"]).checked())
        elif kind == "adopt":
            self.fingerprints.append(checked_fingerprint(entry["fingerprint"]))
        elif kind == "spend":
            for noise, rate, steps in Spend.of(entry).events:
                self._steps[noise, rate] = self._steps.get((noise, rate), 0) + steps
        else:  # it might have spent something
            raise ValueError(kind)
        self.taken += 1

    @property
    def history(self) -> History:
        """All that was spent."""
        return merged(Event(*mechanism, steps) for mechanism, steps in self._steps.items())


def is_fingerprint(text: str) -> bool:
    """Whether `text` can be the fingerprint of a data set."""
    return type(text) is str and _FINGERPRINT.fullmatch(text) is not None


def checked_fingerprint(text: str) -> str:
    """`text`, which must be the fingerprint of a data set. Raises LedgerError."""
    if not is_fingerprint(text):
        raise LedgerError(
            f"{text!r:.80} is not the fingerprint of a data set, which has 64 hexadecimal "
            "digits: see the log of the site's client, or `fedipfs privacy show`"
        )
    return text


def checked_events(events: Iterable[tuple[float, float, int]]) -> History:
    """`events` merged. Raises ConfigError for what no mechanism has, and for no steps at all."""
    if not (found := merged(events)):
        raise ConfigError("there is nothing to pay for: give at least one event with steps")
    return found
