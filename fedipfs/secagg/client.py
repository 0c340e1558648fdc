"""A participant in secure aggregation: one method a stage, each answered once.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", figure
4, in the variant against active adversaries; on k-regular graphs SecAgg+ (Bell et al. 2020). The
coordinator is trusted with nothing: whatever it sends is checked against what this client knows.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numpy as np

from fedipfs.errors import (
    BothShares,
    NotInCohort,
    SecAggFailed,
    SecondAnswer,
    SurvivorsDiffer,
    TooLate,
    WrongKeys,
    WrongShare,
    WrongVector,
)
from fedipfs.secagg import keys, masks, shamir
from fedipfs.secagg.floors import Floors
from fedipfs.secagg.journal import Entry, Journal
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
)
from fedipfs.secagg.peers import Peers
from fedipfs.secagg.session import Session, Sign, Verify

_Answer = TypeVar("_Answer", bound=Signed)


class Client:
    """The client `name` in a session; all that it must remember is in its journal.

    So another process can take the next stage. `sign` signs as `name` (`Party.sign`), `verify`
    checks another participant's signature against a list of this client's own
    (`Party.verify_own`). Asked the same again, every method gives the same answer again.

    Raises BelowFloor for parameters that the site does not permit, NotInCohort. Every method
    raises SecAggRefused (by its kinds), SignatureRefused, SecAggFailed where too few are left, and
    JournalError.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        sign: Sign,
        verify: Verify,
        floors: Floors,
        journal: Journal,
    ) -> None:
        floors.check(session.parameters)
        session.index(name)
        self.session, self.name = session, name
        self._sign, self._verify, self._journal = sign, verify, journal

    def __repr__(self) -> str:
        return f"Client({self.name}, {self.session})"

    def advertise(self) -> Advertise:
        """ADVERTISE: take part, with two fresh keys."""
        done = self._done(Advertise, self.session.digest)
        if done:
            return done
        private = [secrets.token_bytes(keys.KEY) for _ in range(2)]
        message = Advertise(self.name, *map(keys.public_of, private))
        message = message.signed(self.session, message.keys, self._sign)
        state = {"mask": private[0], "seal": private[1]}
        return self._say(message, self.session.digest, state)

    def share(self, roster: Roster) -> Share:
        """SHARE: a fresh seed for the self-mask; shares of it and of the mask key to holders."""
        done = self._done(Share, roster.digest)
        if done:
            return done
        said = self._said(Advertise)
        own = next((each for each in roster.clients if each.by == self.name), None)
        if own is None:
            raise TooLate(f"{self.name} is not on the roster of {self.session}")
        if own != Advertise.from_bytes(said.answer):
            raise WrongKeys(f"the roster of {self.session} has other keys of {self.name}")
        peers = Peers.check(self.session, roster, self._verify, self.name)
        holders = peers.holders(self.name)
        self._enough(holders, "hold shares")
        seed, points = secrets.token_bytes(shamir.SECRET), [peers.point(each) for each in holders]
        halves = [
            shamir.split(secret, self.session.parameters.threshold, points)
            for secret in (seed, said.state["mask"])
        ]
        both = {holder: a + b for holder, a, b in zip(holders, *halves, strict=True)}
        kept = both.pop(self.name)
        masking, sealing = (keys.Agreement(said.state[use]) for use in ("mask", "seal"))
        sealed, with_them = [], {}
        for holder, pair in both.items():
            shared = sealing.exchange(peers.keys[holder][1], holder)
            key = keys.derive(shared, "seal", peers.binding, self.name, holder)
            sealed.append(keys.seal(key, pair, peers.binding))
            key = keys.derive(shared, "seal", peers.binding, holder, self.name)
            with_them[holder] = [key, peers.pair_key(masking, self.name, holder)]
        commitment = keys.commit(seed, peers.binding, self.name)
        message = Share(self.name, roster.digest, commitment, tuple(sealed))
        message = message.signed(self.session, peers.keys[self.name], self._sign)
        state = {"peers": peers.plain(), "seed": seed, "kept": kept, "keys": with_them}
        return self._say(message, roster.digest, state)

    def masked(self, delivery: Delivery) -> Masked | None:
        """What `mask` has answered, and would again: then no vector is needed.

        None if it has not. Raises SecondAnswer where a vector may have left and was not named.
        """
        done = self._done(Masked, delivery.digest)
        if done is None and self._journal.read("mask") is not None:
            raise self._left()
        return done

    def mask(
        self, delivery: Delivery, vector: np.ndarray, put: Callable[[np.ndarray], str]
    ) -> Masked:
        """MASKED: mask the vector in place, hand it to `put`, and say where that has put it.

        `vector` is uint32 of `dimension` coordinates, and must not be used again. `put` is called
        at most once in a session, since a second vector under the same masks would give both
        away: what fails between is not tried again. Once answered, `vector` is not looked at.
        """
        done = self.masked(delivery)
        if done:
            return done
        shared = self._said(Share)
        peers = Peers.of(self.session, shared.state["peers"])
        self._check_vector(vector)
        received = self._open(peers, delivery, shared.state["keys"])
        received[self.name] = shared.state["kept"]
        state = {"peers": shared.state["peers"], "sharers": list(delivery.sharers)}
        intent = Entry(delivery.digest, b"", {**state, "shares": received})
        if self._journal.write("mask", intent) is not intent:
            raise self._left()
        add = [keys.derive(shared.state["seed"], "self mask", peers.binding, self.name)]
        subtract: list[bytes] = []
        for peer in peers.neighbours(self.name, set(delivery.sharers)):
            (add if self.name < peer else subtract).append(shared.state["keys"][peer][1])
        masks.apply(vector, add, subtract)
        message = Masked(self.name, delivery.sharers_hash, put(vector))
        message = message.signed(self.session, peers.keys[self.name], self._sign)
        return self._say(message, delivery.digest)

    def confirm(self, survivors: Survivors) -> Confirm:
        """CONFIRM: sign who survived and where their vectors are, this client's among them."""
        done = self._journal.read(Confirm.stage)
        if done:
            if done.request != survivors.digest:
                raise SurvivorsDiffer(
                    f"{self.name} has confirmed other survivors of {self.session}"
                )
            return Confirm.from_bytes(done.answer)
        said, (peers, sharers, _) = self._said(Masked), self._masked()
        own = next((each for each in survivors.clients if each.by == self.name), None)
        if own is None:
            raise TooLate(f"{self.name} does not count as a survivor of {self.session}")
        if own != Masked.from_bytes(said.answer):
            raise WrongVector(f"{own.vector} is not the vector that {self.name} sent")
        peers.check_survivors(survivors, sharers, self._verify, self.name)
        names = [each.by for each in survivors.clients]
        self._enough(peers.holders(self.name, set(names)), "hold shares and survived")
        message = Confirm(self.name, survivors.digest)
        message = message.signed(self.session, peers.keys[self.name], self._sign)
        return self._say(message, survivors.digest, {"survivors": names})

    def unmask(self, request: Request) -> Unmask:
        """UNMASK: one share for each peer, once a quorum has confirmed the same survivors.

        All secrets of the session are removed before the answer leaves.
        """
        done = self._done(Unmask, request.digest)
        if done:
            return done
        confirmed, (peers, sharers, received) = self._said(Confirm), self._masked()
        survivors = set(request.survivors)
        twice = survivors.intersection(request.dropped)
        if twice:
            raise BothShares(f"asked for both shares of {min(twice)} in {self.session}")
        if list(request.survivors) != confirmed.state["survivors"] or (
            survivors.union(request.dropped) != set(sharers)
        ):
            raise SurvivorsDiffer(f"asked to unmask another sum of {self.session} than confirmed")
        peers.check_confirmations(request, confirmed.request, self._verify)
        half = shamir.SHARE
        shares = tuple(
            received[peer][:half] if peer in survivors else received[peer][half:]
            for peer in peers.holders(self.name, set(sharers))
        )
        message = Unmask(self.name, request.digest, shares)
        message = message.signed(self.session, peers.keys[self.name], self._sign)
        return self._say(message, request.digest)

    def _open(
        self, peers: Peers, delivery: Delivery, known: dict[str, list[bytes]]
    ) -> dict[str, bytes]:
        """What the neighbours sealed to this client, by name: a share of each of two secrets."""
        sharers = set(delivery.sharers)
        if delivery.to != self.name:
            raise WrongShare(f"shares for {delivery.to} were sent to {self.name}")
        if self.name not in sharers:
            raise TooLate(f"{self.name} does not count as having shared in {self.session}")
        if strangers := sharers - peers.keys.keys():
            raise NotInCohort(f"{min(strangers)} has shown no keys in {self.session}")
        self.session.quorum(sharers, "shared their secrets")
        self._enough(peers.holders(self.name, sharers), "hold shares")
        neighbours = peers.neighbours(self.name, sharers)
        if len(delivery.sealed) != len(neighbours):
            raise WrongShare(
                f"{len(delivery.sealed)} sealed shares came to {self.name} from "
                f"{len(neighbours)} neighbours"
            )
        found = {}
        for sender, sealed in zip(neighbours, delivery.sealed, strict=True):
            pair = keys.unseal(known[sender][0], sealed, peers.binding, sender)
            for share in (pair[: shamir.SHARE], pair[shamir.SHARE :]):
                shamir.element(share)
            found[sender] = pair
        return found

    def _check_vector(self, vector: np.ndarray) -> None:
        wanted, flags = self.session.parameters.dimension, vector.flags
        if vector.shape != (wanted,) or vector.dtype != np.uint32:
            raise WrongVector(
                f"a vector of {wanted} uint32 expected, not {vector.dtype} {vector.shape}"
            )
        if not (flags.c_contiguous and flags.writeable):
            raise WrongVector("a vector is masked in place: it must be contiguous and writable")

    def _left(self) -> SecondAnswer:
        return SecondAnswer(
            f"a vector of {self.name} may have left in {self.session}: it is not masked twice"
        )

    def _masked(self) -> tuple[Peers, list[str], dict[str, bytes]]:
        """What is known since MASKED: peers, who shared, and this client's shares by name."""
        state = self._journal.need("mask").state
        return Peers.of(self.session, state["peers"]), state["sharers"], state["shares"]

    def _enough(self, holders: Collection[str], what: str) -> None:
        needed = self.session.parameters.threshold
        if len(holders) < needed:
            raise SecAggFailed(
                f"{len(holders)} clients {what} for {self.name} in {self.session}: {needed} are "
                "needed"
            )

    def _done(self, kind: type[_Answer], request: bytes) -> _Answer | None:
        """The answer that was given at a stage, if one was. Raises SecondAnswer for another."""
        entry = self._journal.read(kind.stage)
        if entry is None:
            return None
        self._journal.same(kind.stage, entry, request)
        return kind.from_bytes(entry.answer)

    def _said(self, kind: type[Signed]) -> Entry:
        """What was answered at an earlier stage. Raises OutOfTurn, TooLate."""
        return self._journal.need(kind.stage)

    def _say(
        self, message: _Answer, request: bytes, state: dict[str, Any] | None = None
    ) -> _Answer:
        """Put an answer on disk; the one to give, which is an earlier one if there was one."""
        mine = Entry(request, message.to_bytes(), state or {})
        entry = self._journal.write(message.stage, mine)
        return message if entry is mine else type(message).from_bytes(entry.answer)
