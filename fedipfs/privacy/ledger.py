"""The site's own account of what the records of a data set have spent, whoever asked.

A folder has one ledger a data set, under the fingerprint of its content (fingerprint.py) and not
of a run or a coordinator: new runs, restarts and copied run folders find what was spent before. A
step is paid for before it is done, so a crash counts as spent. What costs too much is refused, and
nothing is written. chain.py says what the files are, and what cannot be done to them unnoticed.

A changed data set has another fingerprint. Records that are in both versions would have two
budgets, so nothing gets a ledger by the way: a site says whether it is new (`create`), or a version
of what it has (`adopt`), and then both spend from one ledger. Under the fingerprint of the version
there is a chain of one entry, which says whose ledger that is.
"""

from __future__ import annotations

import contextlib
import fcntl
import operator
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fedipfs.errors import BudgetSpent, LedgerError, LedgerTampered, UserError, one_line
from fedipfs.privacy import accounting
from fedipfs.privacy.account import (
    FORMAT,
    Account,
    Spend,
    checked_events,
    checked_fingerprint,
    is_fingerprint,
)
from fedipfs.privacy.accounting import Event, History, merged
from fedipfs.privacy.chain import Chain
from fedipfs.privacy.files import lock, os_errors
from fedipfs.privacy.room import Cap

__all__ = ["Cap", "Ledger", "Receipt", "Spend", "default_folder", "find", "ledgers"]

Path_ = str | os.PathLike[str]
FOLDER = "FEDIPFS_LEDGER"  # the environment variable


class Receipt(NamedTuple):
    """Proof of a spend: `head`, the hash of its line, tells others nothing and fixes all lines up
    to it. `number`, the line's, tells how often others asked: it stays at the site."""

    head: str
    number: int


class Ledger:
    """The ledger of a data set; `create` and `open` make one.

    Everything that is asked of it is read from the disk again. Raises LedgerTampered for files
    that were altered, and LedgerError for those that cannot be used.
    """

    def __init__(self, chain: Chain) -> None:
        """Not for use elsewhere."""
        self.fingerprint = chain.path.stem  # the one it was created for
        self._chain = chain
        self._account = Account(self.fingerprint)

    @classmethod
    def create(cls, folder: Path_, fingerprint: str, cap: Cap) -> Ledger:
        """Begin a ledger, in a folder that is made if need be.

        Raises LedgerError if the data set has one, its own or another version's, and ConfigError
        for a cap that cannot be.
        """
        chain, terms = _chain(folder, fingerprint), cap.checked()._asdict()
        with os_errors(Path(folder)):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        with _alone(Path(folder)):
            if found := find(folder, fingerprint):
                raise _second(found, fingerprint)
            chain.begin(
                {"kind": "open", "format": FORMAT, "fingerprint": fingerprint, "cap": terms}
            )
        return cls(chain)

    @classmethod
    def open(cls, folder: Path_, fingerprint: str) -> Ledger:
        """The ledger of a data set, which may be that of another version of it (see `adopt`).

        Raises LedgerError, with the commands that help, if there is none. It names the fingerprint,
        by which others could recognize the data: it is for the site's own log.
        """
        if found := find(folder, fingerprint):
            return found
        where = shlex.quote(os.fspath(folder))
        raise LedgerError(
            f"{where} has no privacy ledger for the data set {fingerprint}: say what it may spend, "
            f"`fedipfs privacy init --ledger {where} {fingerprint} --epsilon 3 --delta 1e-5`; or, "
            "if it is another version of a data set that has one, "
            f"`fedipfs privacy adopt --ledger {where} THE_OTHER {fingerprint}`"
        )

    def spend(
        self, events: Iterable[Event], *, purpose: str, run: str, round: int, coordinator: str
    ) -> Receipt:
        """Pay for `events`, which may be done once this has returned: then it is on disk.

        `purpose` is "training", "gradient", "metrics", ... Raises BudgetSpent, having written
        nothing, if all that was spent and this together pass the cap; its text may be shown to the
        coordinator. Raises ConfigError for events that no mechanism has, or none.
        """
        asked = checked_events(events)
        fields = {
            "kind": "spend",
            "run": one_line(run, 200),
            "round": operator.index(round),
            "coordinator": one_line(coordinator, 200),
            "purpose": one_line(purpose, 200),
            "events": asked,
        }
        with self._chain.writing() as append:
            room = self._taken_in().room
            if not room.allows(merged([*self._account.history, *asked])):
                raise BudgetSpent(
                    f"round {round} of run {one_line(run, 100)} would pass the privacy cap of this "
                    f"site's data, {room.cap}: plan less of it or more noise, or ask the site"
                )
            head = append(fields)
            return Receipt(head, self._taken_in().taken)

    def set_cap(self, cap: Cap) -> None:
        """Allow more or less from now on; what was spent stays spent. Raises ConfigError."""
        fields = {"kind": "cap", "cap": cap.checked()._asdict()}
        with self._chain.writing() as append:
            append(fields)

    def adopt(self, fingerprint: str) -> None:
        """Let another version of the data set spend from this ledger, too.

        Raises LedgerError if it has a ledger already.
        """
        folder = self._chain.path.parent
        link = {"kind": "version", "format": FORMAT, "of": self.fingerprint}
        with _alone(folder):
            if not (found := find(folder, fingerprint)):
                _chain(folder, fingerprint).begin(link)
            elif found.fingerprint != self.fingerprint or fingerprint in found.fingerprints:
                raise _second(found, fingerprint)
            with self._chain.writing() as append:  # after the link, which keeps the budget one
                append({"kind": "adopt", "fingerprint": fingerprint})

    @property
    def cap(self) -> Cap:
        """What may be spent in all."""
        with self._reading() as account:
            return account.room.cap

    @property
    def history(self) -> History:
        """All that was spent."""
        with self._reading() as account:
            return account.history

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Those of all versions of the data set, in the order in which they came."""
        with self._reading() as account:
            return tuple(account.fingerprints)

    @property
    def spends(self) -> list[Spend]:
        """The entries by which something was spent, in order."""
        with self._reading():
            return [Spend.of(entry) for entry in self._chain.entries if entry["kind"] == "spend"]

    @property
    def lines(self) -> list[str]:
        """All lines of the file, without their newlines."""
        with self._reading():
            return self._chain.lines.decode().splitlines()

    def epsilon(self, accountant: str | None = None) -> float:
        """What was spent in all, at the cap's delta, by the cap's accountant or another one."""
        with self._reading() as account:
            history, cap = account.history, account.room.cap
        return accounting.epsilon(history, cap.delta, accountant or cap.accountant)

    def remaining(self) -> float:
        """What is left of the cap's epsilon; the epsilons of runs do not simply add up to it."""
        return max(0.0, self.cap.epsilon - self.epsilon())

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Account]:
        with self._chain.reading():
            yield self._taken_in()

    def _taken_in(self) -> Account:
        """The account with all entries that the chain has read."""
        for entry in self._chain.entries[self._account.taken :]:
            try:
                self._account.take(entry)
            except (KeyError, TypeError, ValueError, UserError):
                raise LedgerTampered(
                    f"{self._chain.path}: line {self._account.taken + 1} is not an entry that this "
                    "version knows in the ledger of this data set: was the file renamed, or "
                    "written by a newer version?"
                ) from None
        return self._account


def default_folder() -> Path:
    """$FEDIPFS_LEDGER, else `fedipfs/ledger` in the user's state folder ($XDG_STATE_HOME)."""
    if named := os.environ.get(FOLDER):
        return Path(named)
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "fedipfs" / "ledger"


def find(folder: Path_, fingerprint: str) -> Ledger | None:
    """The ledger from which a data set spends, its own or that of another version of it."""
    chain = _chain(folder, fingerprint)
    if not chain.exists:
        return None
    with chain.reading():
        first = chain.entries[0]
    if first["kind"] == "version" and first.get("format") == FORMAT:
        chain = _chain(folder, str(first.get("of")))
    found = Ledger(chain)
    with found._reading():
        return found


def ledgers(folder: Path_) -> list[Ledger]:
    """All ledgers in `folder`, which need not exist, by fingerprint."""
    paths = [*Path(folder).glob("*.jsonl"), *Path(folder).glob("*.head")]
    names = sorted({path.stem for path in paths if is_fingerprint(path.stem)})
    return [each for name in names if (each := find(folder, name)) and each.fingerprint == name]


def _chain(folder: Path_, fingerprint: str) -> Chain:
    return Chain(Path(folder), checked_fingerprint(fingerprint))


def _second(found: Ledger, fingerprint: str) -> LedgerError:
    return LedgerError(
        f"the data set {fingerprint} spends from {found._chain.path} already, and two ledgers "
        "cannot become one: change the cap with `fedipfs privacy cap`"
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: nobody else gives a data set a ledger in it meanwhile."""
    with os_errors(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            lock(handle, fcntl.LOCK_EX, folder)
            yield
        finally:
            os.close(handle)
