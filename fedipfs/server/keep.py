"""What of a run stays pinned as it goes on, and what may be forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedipfs.ipld import CID
from fedipfs.server.best import Best
from fedipfs.store import Store, dag

_HOLD = "fedipfs/hold/v1"


class Keeper:
    """Pins, under names that begin with the run's id.

    Always: every record with its details, the last model, the best one (`best` is kept up to
    date here), and what a resumed run needs. With `everything`, all that the records lead to:
    updates and all models, for audit. Else the models of the last `models` rounds; updates go when
    the store's garbage collection next finds them older than its grace.
    """

    def __init__(
        self, store: Store, run_id: str, *, models: int, everything: bool, best: Best
    ) -> None:
        self._store, self._run_id = store, run_id
        self._models, self._everything, self._best = models, everything, best
        self._kept: dict[int, CID] = {}  # round -> model
        self._hold: tuple[CID, str] | None = None  # what a resumed run needs, and its pin's name
        self._head: CID | None = None
        self._released: list[tuple[CID, str]] = []

    @property
    def best(self) -> CID | None:
        """The best model so far, if any was measured."""
        return self._best.so_far and self._best.so_far.model

    def begin(self, head: CID) -> None:
        """Pin a run's first record and all it leads to, until the first round is complete."""
        self._store.pin(head, self._run_id, recursive=self._everything)
        if not self._everything:
            self._store.pin(head, self._start)
        self._head = head

    def resume(self, head: CID, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take up what an earlier process pinned, and release what it had no time to."""
        self._head = head
        record = dag.get_record(self._store, head)
        last, known = int(record["round"]), {head, record["run"]}
        for line in lines:
            known.add(CID.parse(line["record_cid"]))
            self._best.see(line, CID.parse(line["model_cid"]))
        mine = [
            (root, name, *self._parsed(name))
            for root, names in self._store.pins().items()
            for name in names
            if name == self._run_id or name.startswith(f"{self._run_id}/")
        ]
        state = max((n for *_, kind, n in mine if kind == "state" and n <= last), default=0)
        for root, name, kind, number in mine:
            match kind:
                case "" if self._everything:
                    stays = root == head
                case "":
                    stays = root in known or self._round_of(root) <= last
                case "model":
                    stays = last - self._models < number <= last
                case "best":
                    stays = root == self.best
                case "state":
                    stays = number == state
                case _:
                    stays = kind == "details" and number <= last
            if not stays:
                self._store.unpin(root, name)
            elif kind == "model":
                self._kept[number] = root
            elif kind == "state":
                self._hold = root, name

    def pin(
        self,
        line: Mapping[str, Any],
        record: CID,
        details: CID | None,
        model: CID,
        needed: Sequence[CID],
    ) -> None:
        """Pin what a completed round leaves: its record with the sealed details, what it yields,
        and what a resumed run needs of it.
        """
        self._released = []
        number = int(line["round"])
        self._store.pin(record, self._run_id, recursive=self._everything)
        if self._everything:
            self._release(self._head, self._run_id)
        elif number == 1:
            self._release(self._head, self._start)
        self._head = record
        if self._everything:
            self._best.see(line, model)
            return
        if details is not None:
            self._store.pin(details, f"{self._run_id}/details/{number}")
        self._kept[number] = model
        self._store.pin(model, self._model(number))
        for old in [n for n in self._kept if n <= number - self._models]:
            self._release(self._kept.pop(old), self._model(old))
        before = self.best
        if self._best.see(line, model):
            self._store.pin(model, self._best_name)
            if before != model:
                self._release(before, self._best_name)
        hold = dag.put_record(
            self._store, {"type": _HOLD, "run": self._run_id, "links": list(needed)}
        )
        if self._hold is None or hold != self._hold[0]:
            if self._hold is not None:
                self._release(*self._hold)
            self._hold = hold, f"{self._run_id}/state/{number}"
            self._store.pin(*self._hold)

    def release(self) -> None:
        """Unpin what the last `pin` made superfluous; only once the round counts."""
        for root, name in self._released:
            self._store.unpin(root, name)
        self._released = []

    def _release(self, root: CID | None, name: str) -> None:
        if root is not None:
            self._released.append((root, name))

    @property
    def _start(self) -> str:
        return f"{self._run_id}/start"

    def _parsed(self, name: str) -> tuple[str, int]:
        """What a pin of this run is for, "" for a record, and its round, 0 if it names none."""
        kind, _, number = name.removeprefix(self._run_id).removeprefix("/").partition("/")
        return kind, int(number) if number.isdecimal() else 0

    def _round_of(self, record: CID) -> int:
        return int(dag.get_record(self._store, record).get("round", 0))

    def _model(self, number: int) -> str:
        return f"{self._run_id}/model/{number}"

    @property
    def _best_name(self) -> str:
        return f"{self._run_id}/best"
