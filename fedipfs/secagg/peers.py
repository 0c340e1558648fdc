"""The clients on a roster: their keys, and who holds shares of whose secrets."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import Any

from fedipfs.errors import NotInCohort, SecAggFailed, SurvivorsDiffer, WrongKeys, WrongVector
from fedipfs.secagg.graph import Graph
from fedipfs.secagg.keys import Agreement, derive
from fedipfs.secagg.messages import Keys, Request, Roster, Signed, Survivors, names_hash
from fedipfs.secagg.session import Session, Verify


class Peers:
    """Those who advertised, as everybody sees them who has the same roster.

    The graph is over the whole cohort, so that nobody gains by keeping others off the roster: who
    is not on it counts as dropped out. `binding` (32 bytes) goes into every key.
    """

    def __init__(self, session: Session, keys: dict[str, Keys], roster: bytes) -> None:
        self.session, self.keys, self.roster = session, keys, roster
        self.binding = hashlib.sha256(b"binding\0" + session.digest + roster).digest()
        seed = hashlib.sha256(b"graph\0" + session.digest + roster).digest()
        self._graph = Graph(session.parameters.clients, session.parameters.neighbours, seed)

    @classmethod
    def check(
        cls, session: Session, roster: Roster, verify: Verify, me: str | None = None
    ) -> Peers:
        """The peers on a roster that came from elsewhere.

        The client `me` checks who signed its neighbours' keys. On a k-regular graph those of the
        others reach it with their confirmations, whose signatures cover their keys. An auditor
        (None) checks all. Raises SecAggFailed for too few, NotInCohort, a SignatureRefused, and
        WrongKeys where two keys are the same.
        """
        session.quorum(roster.clients, "advertised keys")
        owners: dict[bytes, str] = {}
        for each in roster.clients:
            session.index(each.by)
            for key in each.keys:
                if key in owners:
                    raise WrongKeys(f"{owners[key]} and {each.by} show the same key")
                owners[key] = each.by
        peers = cls(session, {each.by: each.keys for each in roster.clients}, roster.digest)
        peers._check_signatures(roster.clients, verify, me)
        return peers

    def neighbours(self, name: str, among: Collection[str] | None = None) -> list[str]:
        """With whom `name` masks, of those on the roster, or of those in `among`; sorted."""
        there = self.keys if among is None else among
        cohort = self.session.cohort
        places = self._graph.of(self.session.index(name))
        return [cohort[place] for place in places if cohort[place] in there]

    def holders(self, name: str, among: Collection[str] | None = None) -> list[str]:
        """Who holds shares of the secrets of `name`: its neighbours and itself; sorted."""
        there = self.keys if among is None else among
        found = self.neighbours(name, there)
        return sorted([*found, name]) if name in there else found

    def check_connected(self, names: Collection[str]) -> None:
        """Raises SecAggFailed unless the masks among these hide all but the sum of all of them."""
        if not self._graph.connects([self.session.index(name) for name in names]):
            raise SecAggFailed(
                f"the survivors of {self.session} fall into groups that share no masks: more than "
                "their sum would be seen"
            )

    def point(self, name: str) -> int:
        """Where the polynomials are evaluated for `name`: its place in the cohort, from 1."""
        return self.session.index(name) + 1

    def pair_key(self, agreement: Agreement, mine: str, other: str) -> bytes:
        """The key of the mask that two clients share; the first by name adds it."""
        first, second = sorted((mine, other))
        shared = agreement.exchange(self.keys[other][0], other)
        return derive(shared, "pair mask", self.binding, first, second)

    def check_survivors(
        self,
        survivors: Survivors,
        sharers: Collection[str],
        verify: Verify,
        me: str | None = None,
    ) -> None:
        """Raises what fits unless all sent what they are said to have sent, and are enough.

        NotInCohort for who has not shared, SurvivorsDiffer for who masked among other sharers,
        WrongVector for a vector that two name, a SignatureRefused (of whom: as in `check`);
        SecAggFailed where they are too few or the masks among them fall apart.
        """
        owners: dict[str, str] = {}
        hashed = names_hash(tuple(sharers))
        known = set(sharers)
        for each in survivors.clients:
            if each.by not in known:
                raise NotInCohort(f"{each.by} has not shared secrets in {self.session}")
            if each.sharers != hashed:
                raise SurvivorsDiffer(f"{each.by} was shown other sharers in {self.session}")
            if each.vector in owners:
                raise WrongVector(
                    f"{owners[each.vector]} and {each.by} name one vector, {each.vector}"
                )
            owners[each.vector] = each.by
        self.session.quorum(owners, "sent vectors")
        self._check_signatures(survivors.clients, verify, me)
        self.check_connected(owners.values())

    def check_confirmations(self, request: Request, survivors: bytes, verify: Verify) -> None:
        """Raises what fits unless a quorum of the survivors confirmed the digest `survivors`."""
        known = set(request.survivors)
        for each in request.confirmations:
            if each.by not in known:
                raise NotInCohort(f"{each.by} is no survivor of {self.session}")
            if each.survivors != survivors:
                raise SurvivorsDiffer(f"{each.by} has confirmed other survivors of {self.session}")
        self.session.quorum(request.confirmations, "confirmed the survivors")
        self._check_signatures(request.confirmations, verify)

    def _check_signatures(
        self, answers: Iterable[Signed], verify: Verify, me: str | None = None
    ) -> None:
        checked = self.keys if me is None else set(self.neighbours(me))
        for each in answers:
            if each.by in checked:
                each.check(self.session, self.keys[each.by], verify)

    def plain(self) -> dict[str, Any]:
        """As DAG-CBOR holds it."""
        return {"keys": {name: list(keys) for name, keys in self.keys.items()}, "by": self.roster}

    @classmethod
    def of(cls, session: Session, found: dict[str, Any]) -> Peers:
        """What `plain` gave."""
        keys = {name: (pair[0], pair[1]) for name, pair in sorted(found["keys"].items())}
        return cls(session, keys, found["by"])
