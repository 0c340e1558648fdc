"""The record of a session: enough for anybody to recompute the sum from the masked vectors.

It holds what was signed, and the secrets that unmask the sum: seeds of survivors and mask keys of
those who dropped out, never both of one client. Whoever has it and all the masked vectors can
compute the sum, as the coordinator could, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np

from fedipfs.errors import BadMessage, SecAggFailed, WrongVector
from fedipfs.secagg import keys, masks
from fedipfs.secagg.messages import (
    HASH,
    Advertise,
    Confirm,
    Masked,
    Message,
    Request,
    Roster,
    Share,
    Signed,
    Survivors,
    check_fields,
    check_list,
    check_parts,
    share_payload,
)
from fedipfs.secagg.peers import Peers
from fedipfs.secagg.session import Session, Verify

NONE = bytes(keys.KEY)  # in the place of a mask key that nobody has masked with


@dataclass(frozen=True)
class Commitment(Signed):
    """What a client signed at SHARE, with the hash of its sealed shares in their place."""

    stage = "share"
    by: str
    roster: bytes
    commitment: bytes
    sealed_hash: bytes
    signature: bytes = b""

    def __post_init__(self) -> None:
        check_fields(self, roster=HASH, commitment=HASH, sealed_hash=HASH)

    @classmethod
    def of_share(cls, share: Share) -> Self:
        """What a record keeps of an answer."""
        return cls(share.by, share.roster, share.commitment, share.sealed_hash, share.signature)

    def payload(self) -> bytes:
        return share_payload(self.roster, self.commitment, self.sealed_hash)


@dataclass(frozen=True)
class Record(Message):
    """One session, as the coordinator gives it to auditors. All lists are sorted by name.

    clients       who advertised which keys
    commitments   of all who shared; those among them who are no survivors have dropped out
    survivors     where their masked vectors are
    confirmations of the survivors
    seeds         of the survivors' self-masks, in their order
    mask_keys     private, of those who dropped out, in their order (zeros: none was needed)
    total         where the unmasked sum is: a CID or another text
    """

    parts: ClassVar[dict[str, type[Message]]] = {
        "clients": Advertise,
        "commitments": Commitment,
        "survivors": Masked,
        "confirmations": Confirm,
    }
    session: bytes
    clients: tuple[Advertise, ...]
    commitments: tuple[Commitment, ...]
    survivors: tuple[Masked, ...]
    confirmations: tuple[Confirm, ...]
    seeds: tuple[bytes, ...] = field(repr=False)
    mask_keys: tuple[bytes, ...] = field(repr=False)
    total: str = ""

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            check_parts(getattr(self, name), part)
        check_list(self.seeds, keys.KEY, len(self.survivors))
        check_list(self.mask_keys, keys.KEY, len(self.dropped))
        if type(self.session) is not bytes or type(self.total) is not str:
            raise BadMessage("Record: a session is bytes, a total is named by a text")

    @property
    def dropped(self) -> tuple[str, ...]:
        """Who has shared and did not send a vector in time."""
        names = {each.by for each in self.survivors}
        return tuple(each.by for each in self.commitments if each.by not in names)

    def audit(self, verify: Verify, vector: Callable[[str], np.ndarray]) -> np.ndarray:
        """The modular sum, recomputed from the masked vectors: uint32. Compare it with `total`.

        `vector` gives a masked vector by its reference and checks that it is that. Raises what is
        wrong: SignatureRefused, SecAggRefused by its kinds, SecAggFailed, BadMessage.
        """
        peers = self.check(verify)
        wanted = peers.session.parameters.dimension
        total = np.zeros(wanted, np.uint32)
        for each in self.survivors:
            masked = vector(each.vector)
            if masked.shape != (wanted,) or masked.dtype != np.uint32:
                raise WrongVector(f"the vector of {each.by} is not one of {wanted} uint32")
            np.add(total, masked, out=total)
        self.unmask(peers, total)
        return total

    def check(self, verify: Verify) -> Peers:
        """The session's peers, if all that was signed is as it must be. Raises as `audit`."""
        session = Session.from_bytes(self.session)
        peers = Peers.check(session, Roster(self.clients), verify)
        sharers = tuple(each.by for each in self.commitments)
        for each in self.commitments:
            if each.by not in peers.keys or each.roster != peers.roster:
                raise BadMessage(f"{each.by} has shared for another roster of {session}")
            each.check(session, peers.keys[each.by], verify)
        session.quorum(sharers, "shared their secrets")
        survivors = Survivors(self.survivors)
        peers.check_survivors(survivors, sharers, verify)
        names = tuple(each.by for each in self.survivors)
        request = Request(names, self.dropped, self.confirmations)
        peers.check_confirmations(request, survivors.digest, verify)
        return peers

    def unmask(self, peers: Peers, total: np.ndarray) -> None:
        """Take all masks off the sum of the masked vectors, in place.

        Raises SecAggFailed unless the secrets are those that their owners fixed.
        """
        names = [each.by for each in self.survivors]
        fixed = {each.by: each.commitment for each in self.commitments}
        add: list[bytes] = []
        subtract: list[bytes] = []
        for name, seed in zip(names, self.seeds, strict=True):
            if keys.commit(seed, peers.binding, name) != fixed[name]:
                raise SecAggFailed(_lost(name, "seed", peers))
            subtract.append(keys.derive(seed, "self mask", peers.binding, name))
        for name, private in zip(self.dropped, self.mask_keys, strict=True):
            partners = peers.neighbours(name, set(names))
            if not partners:
                continue
            if keys.public_of(private) != peers.keys[name][0]:
                raise SecAggFailed(_lost(name, "mask key", peers))
            agreement = keys.Agreement(private)
            for partner in partners:
                key = peers.pair_key(agreement, name, partner)
                (subtract if partner < name else add).append(key)
        masks.apply(total, add, subtract)


def _lost(name: str, what: str, peers: Peers) -> str:
    return (
        f"the {what} of {name} that was put together in {peers.session} is not the one it has "
        "fixed: a client gave a wrong share, and there is no sum"
    )
