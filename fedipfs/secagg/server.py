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
from fedipfs.secagg import shamir
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
        self._taken: dict[str, dict[str, Any]] = {stage: {} for stage in _ORDER}
        self._stage = 0
        self._invited: Collection[str] = session.cohort
        self._total = np.zeros(session.parameters.dimension, np.uint32)

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
        self._turn(message)
        before = self._taken[self.stage].get(message.by)
        if before is not None:
            if before != message:
                raise SecondAnswer(f"{message.by} answers {self.stage} of {self.session} twice")
            return
        known = message.keys if isinstance(message, Advertise) else self._peers.keys[message.by]
        message.check(self.session, known, self._verify)
        self._check(message, vector)
        if vector is not None:
            np.add(self._total, vector, out=self._total)
        self._taken[self.stage][message.by] = message

    def close_advertise(self) -> Roster:
        """Go on with those who advertised."""
        self._roster = Roster(tuple(self._close(Advertise, "advertised keys")))
        shown = {each.by: each.keys for each in self._roster.clients}
        self._peers = Peers(self.session, shown, self._roster.digest)
        return self._roster

    def close_share(self) -> dict[str, Delivery]:
        """Go on with those who shared: what to deliver to each of them."""
        answers = self._close(Share, "shared their secrets")
        sharers = self._taken[Share.stage] = {each.by: each for each in answers}  # sorted
        to: dict[str, list[bytes]] = {name: [] for name in sharers}
        for name, answer in sharers.items():
            receivers = self._peers.neighbours(name)
            for receiver, sealed in zip(receivers, answer.sealed, strict=True):
                if receiver in to:
                    to[receiver].append(sealed)
        return {name: Delivery(name, tuple(sharers), tuple(each)) for name, each in to.items()}

    def close_masked(self) -> Survivors:
        """Go on with the survivors: those whose vectors have come."""
        if self.stage == Masked.stage:
            self._peers.check_connected(self._taken[Masked.stage])
        self._survivors = Survivors(tuple(self._close(Masked, "sent vectors")))
        return self._survivors

    def close_confirm(self) -> Request:
        """Ask those who confirmed to unmask the sum of all survivors."""
        confirmations = tuple(self._close(Confirm, "confirmed the survivors"))
        survivors = tuple(each.by for each in self._survivors.clients)
        dropped = tuple(name for name in self._sharers() if name not in survivors)
        self._request = Request(survivors, dropped, confirmations)
        return self._request

    @property
    def unmaskable(self) -> bool:
        """Whether `result` has the shares that it needs."""
        if self.stage != Unmask.stage:
            return False
        shares = self._shares()
        return all(len(shares[name]) >= self._threshold for name in self._recovered())

    def result(self) -> Result:
        """The sum, once enough have helped to unmask it: as soon as `unmaskable`.

        Raises SecAggFailed for too few shares, and where shares do not give back what their owner
        has fixed, naming it.
        """
        if self.stage != Unmask.stage:
            raise OutOfTurn(f"{self.session} is at {self.stage}: its sum cannot be unmasked yet")
        shares, secrets = self._shares(), {}
        weights: dict[tuple[int, ...], list[int]] = {}
        for name in self._recovered():
            found = shares[name][: self._threshold]
            if len(found) < self._threshold:
                raise SecAggFailed(
                    f"{len(found)} clients gave a share of what {name} masked with in "
                    f"{self.session}: {self._threshold} are needed"
                )
            points = tuple(point for point, _ in found)
            if points not in weights:
                weights[points] = shamir.coefficients(points)
            secrets[name] = _combine(weights[points], [share for _, share in found], name)
        record = Record(
            session=self.session.to_bytes(),
            clients=self._roster.clients,
            commitments=tuple(map(Commitment.of_share, self._answers(Share))),
            survivors=tuple(self._answers(Masked)),
            confirmations=tuple(self._answers(Confirm)),
            seeds=tuple(secrets[name] for name in self._request.survivors),
            mask_keys=tuple(secrets.get(name, NONE) for name in self._request.dropped),
        )
        total = self._total.copy()
        record.unmask(self._peers, total)
        return Result(total, record)

    def _recovered(self) -> list[str]:
        """Whose secret must be known: survivors' seeds, mask keys of those they masked with."""
        survivors = set(self._request.survivors)
        dropped = [
            name for name in self._request.dropped if self._peers.neighbours(name, survivors)
        ]
        return [*self._request.survivors, *dropped]

    def _shares(self) -> dict[str, list[tuple[int, bytes]]]:
        """By whose secret they are of, all points and shares that have come."""
        sharers = self._sharers()
        found: dict[str, list[tuple[int, bytes]]] = {name: [] for name in sharers}
        for answer in self._answers(Unmask):
            point = self._peers.point(answer.by)
            owners = self._peers.holders(answer.by, sharers)
            for owner, share in zip(owners, answer.shares, strict=True):
                found[owner].append((point, share))
        return found

    @property
    def _threshold(self) -> int:
        return self.session.parameters.threshold

    def _sharers(self) -> dict[str, Share]:
        return self._taken[Share.stage]

    def _answers(self, kind: type[_Answer]) -> list[_Answer]:
        return [answer for _, answer in sorted(self._taken[kind.stage].items())]

    def _close(self, kind: type[_Answer], what: str) -> list[_Answer]:
        """End a stage: its answers, sorted; from now on only who gave one goes on."""
        if self.stage != kind.stage:
            raise OutOfTurn(f"{self.session} is at {self.stage}, not at {kind.stage}")
        answers = self._answers(kind)
        self.session.quorum(answers, what)
        self._stage += 1
        self._invited = frozenset(self._taken[kind.stage])
        return answers

    def _turn(self, message: Signed) -> None:
        """Raises OutOfTurn, TooLate or NotInCohort unless the sender may answer this stage now."""
        self.session.index(message.by)
        stage = _ORDER.index(message.stage)
        if stage > self._stage:
            raise OutOfTurn(f"{message.by} answers {message.stage} before it is asked")
        if stage < self._stage:
            raise TooLate(f"{message.by} answers {message.stage} after it was closed")
        if message.by not in self._invited:
            raise TooLate(f"{message.by} has dropped out of {self.session} before {message.stage}")

    def _check(self, message: Signed, vector: np.ndarray | None) -> None:
        """Raises what fits unless an answer is to what was asked."""
        by, session = message.by, self.session
        if isinstance(message, Advertise):
            shown = {key for each in self._answers(Advertise) for key in each.keys}
            if shown.intersection(message.keys) or message.mask_key == message.seal_key:
                raise WrongKeys(f"{by} shows a key of {session} that is there already")
        elif isinstance(message, Share):
            if message.roster != self._roster.digest:
                raise WrongShare(f"{by} has shared for another roster of {session}")
            if len(message.sealed) != len(self._peers.neighbours(by)):
                raise WrongShare(f"{by} sealed {len(message.sealed)} shares in {session}")
        elif isinstance(message, Masked):
            if message.sharers != names_hash(tuple(self._sharers())):
                raise SurvivorsDiffer(f"{by} masked among other sharers of {session}")
            if any(each.vector == message.vector for each in self._answers(Masked)):
                raise WrongVector(f"{by} names a vector that is another's, {message.vector}")
            wanted = session.parameters.dimension
            if vector is None or vector.shape != (wanted,) or vector.dtype != np.uint32:
                raise WrongVector(f"the vector of {by} is not one of {wanted} uint32")
        elif isinstance(message, Confirm):
            if message.survivors != self._survivors.digest:
                raise SurvivorsDiffer(f"{by} confirms other survivors of {session}")
        elif isinstance(message, Unmask):
            if message.request != self._request.digest:
                raise SurvivorsDiffer(f"{by} unmasks another sum of {session}")
            if len(message.shares) != len(self._peers.holders(by, self._sharers())):
                raise WrongShare(f"{by} gives {len(message.shares)} shares in {session}")
            for share in message.shares:
                shamir.element(share)


def _combine(weights: list[int], shares: list[bytes], name: str) -> bytes:
    try:
        return shamir.combine(weights, shares)
    except WrongShare as error:
        raise SecAggFailed(f"a secret of {name} is lost: {error}") from None
