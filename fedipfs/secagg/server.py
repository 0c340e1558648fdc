"""The coordinator of secure aggregation: collects, relays, and unmasks the sum of the survivors.

It is told nothing that it could abuse: what it does here, clients check (client.py). It checks in
turn what clients send, so that one of them cannot put words in another's mouth.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fedipfs.errors import (
    OutOfTurn,
    SecAggFailed,
    SecondAnswer,
    SurvivorsDiffer,
    TooLate,
    WrongKeys,
    WrongShare,
    WrongVector,
)
from fedipfs.secagg import keys, shamir
from fedipfs.secagg.messages import (
    Advertise,
    Confirm,
    Delivery,
    Masked,
    Request,
    Roster,
    Share,
    Signed,
    Survivors,
    Unmask,
    names_hash,
)
from fedipfs.secagg.peers import Peers
from fedipfs.secagg.record import NONE, Commitment, Record
from fedipfs.secagg.session import Session, Verify

_Answer = TypeVar("_Answer", bound=Signed)
_ORDER = [kind.stage for kind in (Advertise, Share, Masked, Confirm, Unmask)]


@dataclass(frozen=True)
class Result:
    """The modular sum over the survivors (uint32), and the record that an auditor needs.

    `record.total` is empty: put the sum into a store and name it there (dataclasses.replace).
    """

    total: np.ndarray
    record: Record


class Server:
    """Collects one stage after the other: `take` what comes, then `close` the stage.

    `verify` checks a participant's signature (`Party.verify`). `take` raises SecAggRefused (by its
    kinds) and SignatureRefused for what is left out: the round goes on without it. Closing a
    stage raises SecAggFailed if too few are left, and leaves the stage open. What comes after its
    stage was closed is TooLate, and its sender counts as dropped out for ever.
    """

    def __init__(self, session: Session, verify: Verify) -> None:
        self.session, self._verify = session, verify
        self._stage = 0
        self._taken: dict[str, dict[str, Any]] = {stage: {} for stage in _ORDER}
        self._invited: Collection[str] = session.cohort
        self._seen: set[object] = set()  # keys and vectors that somebody has named already
        self._total = np.zeros(session.parameters.dimension, np.uint32)
        self._shares: dict[str, dict[int, bytes]] = {}  # by owner and point
        self._result: Result | None = None

    @property
    def stage(self) -> str:
        """The stage that answers are collected for."""
        return _ORDER[self._stage]

    def missing(self) -> list[str]:
        """Who could still answer at this stage, sorted."""
        return sorted(set(self._invited) - self._taken[self.stage].keys())

    def take(self, message: Signed, vector: np.ndarray | None = None) -> None:
        """A client's answer; with MASKED also its vector, which is added up and not kept.

        That the vector is the one that the message names is the caller's to check: a store that
        gives it by its CID has done so. An answer that is there already is not taken again.
        """
        self._check_turn(message)
        before = self._taken[self.stage].get(message.by)
        if before is not None:
            if before != message:
                raise SecondAnswer(f"{message.by} answers {self.stage} of {self.session} twice")
            return
        known = message.keys if isinstance(message, Advertise) else self._peers.keys[message.by]
        message.check(self.session, known, self._verify)
        if isinstance(message, Advertise):
            self._take_keys(message)
        elif isinstance(message, Share):
            self._check_share(message)
        elif isinstance(message, Masked):
            self._take_vector(message, vector)
        elif isinstance(message, Confirm):
            if message.survivors != self._survivors.digest:
                raise SurvivorsDiffer(f"{message.by} confirms other survivors of {self.session}")
        elif isinstance(message, Unmask):
            self._take_shares(message)
        self._taken[self.stage][message.by] = message

    def close_advertise(self) -> Roster:
        """Go on with those who advertised."""
        self._roster = Roster(tuple(self._close(Advertise, "advertised keys")))
        shown = {each.by: each.keys for each in self._roster.clients}
        self._peers = Peers(self.session, shown, self._roster.digest)
        return self._roster

    def close_share(self) -> dict[str, Delivery]:
        """Go on with those who shared: what to deliver to each of them, by name."""
        answers = self._close(Share, "shared their secrets")
        self._sharers = tuple(each.by for each in answers)
        self._sharers_hash = names_hash(self._sharers)
        self._shares = {name: {} for name in self._sharers}
        to: dict[str, list[bytes]] = {name: [] for name in self._sharers}
        for answer in answers:  # sorted, so everyone's come sorted
            receivers = self._peers.neighbours(answer.by)
            for receiver, sealed in zip(receivers, answer.sealed, strict=True):
                if receiver in to:
                    to[receiver].append(sealed)
        return {name: Delivery(name, self._sharers, tuple(each)) for name, each in to.items()}

    def close_masked(self) -> Survivors:
        """Go on with the survivors: those whose vectors have come."""
        if self.stage == Masked.stage:
            self._peers.check_connected(self._taken[self.stage])
        self._survivors = Survivors(tuple(self._close(Masked, "sent vectors")))
        return self._survivors

    def close_confirm(self) -> Request:
        """Ask those who confirmed to unmask the sum of all survivors: a quorum will do as proof."""
        quorum = self.session.parameters.quorum
        confirmations = tuple(self._close(Confirm, "confirmed the survivors")[:quorum])
        survivors = self._taken[Masked.stage]
        dropped = tuple(name for name in self._sharers if name not in survivors)
        self._request = Request(tuple(sorted(survivors)), dropped, confirmations)
        return self._request

    @property
    def unmaskable(self) -> bool:
        """Whether `result` has the shares that it needs."""
        needed = self.session.parameters.threshold
        return self.stage == Unmask.stage and all(
            len(self._shares[name]) >= needed for name in self._recovered()
        )

    def result(self) -> Result:
        """The sum, once enough have helped to unmask it: as soon as `unmaskable`.

        Raises SecAggFailed for too few shares, and where shares do not give back what their owner
        has fixed, naming it.
        """
        if self.stage != Unmask.stage:
            raise OutOfTurn(f"{self.session} is at {self.stage}: its sum cannot be unmasked yet")
        if self._result is not None:
            return self._result
        secrets = self._secrets()
        record = Record(
            session=self.session.to_bytes(),
            clients=self._roster.clients,
            commitments=tuple(map(Commitment.of_share, self._answers(Share))),
            survivors=self._survivors.clients,
            confirmations=self._request.confirmations,
            seeds=tuple(secrets[name] for name in self._request.survivors),
            mask_keys=tuple(secrets.get(name, NONE) for name in self._request.dropped),
        )
        record.unmask(self._peers, self._total)
        self._result = Result(self._total, record)
        return self._result

    def _secrets(self) -> dict[str, bytes]:
        """By name: seeds of survivors, mask keys of those who dropped out."""
        needed = self.session.parameters.threshold
        found: dict[str, bytes] = {}
        coefficients: dict[tuple[int, ...], list[int]] = {}  # in the complete graph, one for all
        for name in self._recovered():
            shares = self._shares[name]
            points = tuple(sorted(shares)[:needed])
            if len(points) < needed:
                raise SecAggFailed(
                    f"{len(points)} clients gave a share of what {name} masked with in "
                    f"{self.session}: {needed} are needed"
                )
            if points not in coefficients:
                coefficients[points] = shamir.coefficients(points)
            try:
                secret = shamir.combine(coefficients[points], [shares[point] for point in points])
            except WrongShare as error:
                raise SecAggFailed(
                    f"what {name} masked with in {self.session} is lost: {error}"
                ) from None
            found[name] = secret
        return found

    def _recovered(self) -> list[str]:
        """Whose secret must be known: survivors', and theirs with whom a survivor masked."""
        survivors = self._taken[Masked.stage]
        dropped = [
            name for name in self._request.dropped if self._peers.neighbours(name, survivors)
        ]
        return [*self._request.survivors, *dropped]

    def _take_keys(self, message: Advertise) -> None:
        for key in message.keys:
            if keys.is_weak(key):
                raise keys.weak(message.by)
        if message.mask_key == message.seal_key or self._seen.intersection(message.keys):
            raise WrongKeys(f"{message.by} shows a key of {self.session} that is there already")
        self._seen.update(message.keys)

    def _check_share(self, message: Share) -> None:
        if message.roster != self._roster.digest:
            raise WrongShare(f"{message.by} has shared for another roster of {self.session}")
        if len(message.sealed) != len(self._peers.neighbours(message.by)):
            raise WrongShare(
                f"{message.by} has sealed {len(message.sealed)} shares in {self.session}"
            )

    def _take_vector(self, message: Masked, vector: np.ndarray | None) -> None:
        if message.sharers != self._sharers_hash:
            raise SurvivorsDiffer(f"{message.by} masked among other sharers of {self.session}")
        if message.vector in self._seen:
            raise WrongVector(f"{message.by} names a vector that is another's, {message.vector}")
        wanted = self.session.parameters.dimension
        if vector is None or vector.shape != (wanted,) or vector.dtype != np.uint32:
            raise WrongVector(f"the vector of {message.by} is not one of {wanted} uint32")
        self._seen.add(message.vector)
        np.add(self._total, vector, out=self._total)

    def _take_shares(self, message: Unmask) -> None:
        if message.request != self._request.digest:
            raise SurvivorsDiffer(f"{message.by} unmasks another sum of {self.session}")
        owners = self._peers.holders(message.by, self._shares)
        if len(message.shares) != len(owners):
            raise WrongShare(f"{message.by} gives {len(message.shares)} shares in {self.session}")
        for share in message.shares:
            shamir.element(share)
        point = self._peers.point(message.by)
        for owner, share in zip(owners, message.shares, strict=True):
            self._shares[owner][point] = share

    def _check_turn(self, message: Signed) -> None:
        """Raises OutOfTurn, TooLate or NotInCohort unless the sender may answer this stage now."""
        self.session.index(message.by)
        stage = _ORDER.index(message.stage)
        if stage > self._stage:
            raise OutOfTurn(f"{message.by} answers {message.stage} before it is asked")
        if stage < self._stage:
            raise TooLate(f"{message.by} answers {message.stage} after it was closed")
        if message.by not in self._invited:
            raise TooLate(f"{message.by} has dropped out of {self.session} before {message.stage}")

    def _close(self, kind: type[_Answer], what: str) -> list[_Answer]:
        """End a stage: its answers, sorted; from now on only who gave one goes on."""
        if self.stage != kind.stage:
            raise OutOfTurn(f"{self.session} is at {self.stage}, not at {kind.stage}")
        answers = self._answers(kind)
        self.session.quorum(answers, what)
        self._stage += 1
        self._invited = frozenset(self._taken[kind.stage])
        return answers

    def _answers(self, kind: type[_Answer]) -> list[_Answer]:
        return [answer for _, answer in sorted(self._taken[kind.stage].items())]
