"""One secure aggregation: which round of which run, among whom, on what terms."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from fedipfs.errors import BadMessage, DagCborError, NotInCohort, SecAggFailed
from fedipfs.ipld import CID, DAG_CBOR, dagcbor
from fedipfs.secagg.parameters import Parameters
from fedipfs.trust import Statement

PROTOCOL = "fedipfs-secagg/v1"
MAX_ATTEMPTS = 1 << 16

# As `Party.sign`, `Party.verify` and `Party.verify_own`: the last two raise a SignatureRefused.
Sign = Callable[[Statement], bytes]
Verify = Callable[[str, Statement, bytes], object]


@dataclass(frozen=True)
class Session:
    """What the coordinator announces: the run's id, the round, the cohort, the parameters.

    `cohort` is the organizations' names, sorted. A round that failed before vectors were sent can
    be tried again with the next `attempt`, counted from 0; every participant sends a vector in one
    attempt only. Raises FormatError.
    """

    run: str
    round: int
    cohort: tuple[str, ...]
    parameters: Parameters
    attempt: int = 0

    def __post_init__(self) -> None:
        Statement(CID.of(b""), self.run, self.round, "session")  # raises for run and round
        if type(self.attempt) is not int or not 0 <= self.attempt < MAX_ATTEMPTS:
            raise BadMessage(f"attempt={self.attempt!r:.80}: expected 0 to {MAX_ATTEMPTS - 1}")
        for name in self.cohort:
            if type(name) is not str or not 0 < len(name) <= 64 or not name.isprintable():
                raise BadMessage(f"cohort: {name!r:.80} has not 1 to 64 printable characters")
        if self.cohort != tuple(sorted(set(self.cohort))):
            raise BadMessage("cohort: expected sorted names, each once")
        if len(self.cohort) != self.parameters.clients:
            raise BadMessage(
                f"a cohort of {len(self.cohort)}, but parameters for {self.parameters.clients}"
            )

    def index(self, name: str) -> int:
        """A client's place in the cohort, from 0. Raises NotInCohort."""
        place = bisect_left(self.cohort, name)
        if place == len(self.cohort) or self.cohort[place] != name:
            raise NotInCohort(f"{name!r:.80} is not in the cohort of {self}")
        return place

    def quorum(self, found: Collection[object], what: str) -> None:
        """Raises SecAggFailed where fewer than the quorum did something."""
        needed = self.parameters.quorum
        if len(found) < needed:
            raise SecAggFailed(f"{len(found)} clients {what} in {self}: {needed} are needed")

    @cached_property
    def cohort_hash(self) -> bytes:
        """SHA-256 of the sorted names."""
        return hashlib.sha256(dagcbor.encode(list(self.cohort))).digest()

    @cached_property
    def parameter_hash(self) -> bytes:
        """SHA-256 of the parameters."""
        return self.parameters.digest()

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.to_bytes()).digest()

    def statement(
        self, stage: str, by: str, keys: tuple[bytes, bytes], payload: bytes
    ) -> Statement:
        """What a client signs at a stage: where and when, all terms, its keys, its payload's CID.

        `keys` are its two public keys, `payload` is DAG-CBOR.
        """
        content = {
            "protocol": PROTOCOL,
            "attempt": self.attempt,
            "cohort": self.cohort_hash,
            "parameters": self.parameter_hash,
            "by": by,
            "mask key": keys[0],
            "seal key": keys[1],
            "payload": CID.of(payload, DAG_CBOR),
        }
        cid = CID.of(dagcbor.encode(content), DAG_CBOR)
        return Statement(cid, self.run, self.round, f"secagg {stage}")

    def to_bytes(self) -> bytes:
        """As a DAG-CBOR block."""
        return dagcbor.encode(
            {
                "protocol": PROTOCOL,
                "run": self.run,
                "round": self.round,
                "attempt": self.attempt,
                "cohort": list(self.cohort),
                "parameters": self.parameters.plain(),
            }
        )

    @classmethod
    def from_bytes(cls, block: bytes) -> Session:
        """What `to_bytes` gave. Raises FormatError, and BelowFloor for unsafe parameters."""
        try:
            found = dagcbor.decode(block)
        except DagCborError as error:
            raise BadMessage(f"session: {error}") from None
        names = {"protocol", "run", "round", "attempt", "cohort", "parameters"}
        if type(found) is not dict or found.keys() != names:
            raise BadMessage("session: expected a map with " + ", ".join(sorted(names)))
        if found["protocol"] != PROTOCOL or type(found["cohort"]) is not list:
            raise BadMessage(f"session: expected the protocol {PROTOCOL} and a list of names")
        parameters = Parameters.of(found["parameters"])
        cohort = tuple(found["cohort"])
        return cls(found["run"], found["round"], cohort, parameters, found["attempt"])

    def __str__(self) -> str:
        attempt = f", attempt {self.attempt}" if self.attempt else ""
        return f"round {self.round} of {self.run}{attempt}"
