"""What is stored is sealed for those who may read it, and what is read is opened.

Two kinds of content: what is shared with the other side (a coordinator's models, a participant's
updates) and what is nobody else's (states, the details of a round). `seal` says which of them
leave this process readable only by its recipients: "none", "updates" (what participants make, and
everybody's own), or "all". A coordinator that hands on what one participant made, as it is, stores
it through `sealing_all()`: sealed for all participants under "updates", too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, cast

from typing_extensions import Buffer

from fedipfs.errors import (
    ConfigError,
    EnvelopeTampered,
    NotSealed,
    SignatureWrong,
    StoreError,
    WeightsError,
)
from fedipfs.ipld import CID, DAG_CBOR, dagcbor, unixfs
from fedipfs.store import Store, dag
from fedipfs.store.base import MAX_BLOCK
from fedipfs.trust import Opener, PublicIdentity, envelope
from fedipfs.trust.party import Party
from fedipfs.weights import Leaves, StoredLeaves, TensorSpec, Weights, chunks

Seal = Literal["none", "updates", "all"]
SEALS: tuple[Seal, ...] = ("none", "updates", "all")

_MAX_SMALL = 64 << 20  # bytes of a state or record that is read as a whole
_MOST_AHEAD = 4  # times the limit that a file's blocks may take: most leaves have half a MAX_BLOCK


def choose_seal(seal: str | None, *, shared: bool, because: str | None) -> Seal:
    """What to seal where `seal` was asked for; None gives the default for that kind of store.

    Raises ConfigError for nothing sealed in a shared store, unless `because` says why.
    """
    if seal is None:
        return "all" if shared else "none"
    if seal not in SEALS:
        raise ConfigError(f"seal={seal} is not one of {', '.join(SEALS)}")
    if shared and seal == "none" and not (because or "").strip():
        raise ConfigError(
            "seal=none with a shared store: whoever learns a CID can read every update and model, "
            "and what is on IPFS cannot be taken back. Leave it at all, or say why that is right: "
            "unsealed_because='the data are public'"
        )
    return seal


class Vault:
    """A store, and who may read what is put into it. Without a `party` nothing is sealed.

    What is shared is for all of the other side, or for the organization `only`. Files whose content
    has more than `limit` bytes are not read: what a message names is the other side's choice.
    """

    _sealing: Vault | None = None  # what `sealing_all` gave

    def __init__(
        self,
        store: Store,
        party: Party | None = None,
        seal: Seal = "none",
        only: str | None = None,
        limit: int | None = None,
    ) -> None:
        if seal not in SEALS:
            raise ConfigError(f"seal={seal} is not one of {', '.join(SEALS)}")
        if seal != "none" and party is None:
            raise ConfigError(
                f"seal={seal} needs keys of this party: name its identity and its trust list"
            )
        self.store, self.party, self.seal, self._only = store, party, seal, only
        self.limit = limit
        coordinates = party is not None and party.role == "coordinator"
        self._seals_shared = seal == "all" or (seal == "updates" and not coordinates)
        self._wants_sealed = seal == "all" or (seal == "updates" and coordinates)

    def only_for(self, organization: str) -> Vault:
        """The same, but what is shared is sealed to this organization of the other side alone."""
        return Vault(self.store, self.party, self.seal, organization, self.limit)

    def sealing_all(self) -> Vault:
        """The same, but it seals models, too, unless nothing is sealed at all."""
        if self.seal == "none" or self._seals_shared:
            return self
        if self._sealing is None:
            self._sealing = Vault(self.store, self.party, self.seal, self._only, self.limit)
            self._sealing._seals_shared = True
        return self._sealing

    def sealing_as(self, file: Weights) -> Vault:
        """The one for what comes of `file`: `sealing_all()` if that is sealed, else this one."""
        return self.sealing_all() if isinstance(file.leaves, _Opened) else self

    def put_weights(
        self, specs: Iterable[TensorSpec], tensor: Callable[[str], Any], *, private: bool = False
    ) -> CID:
        """Store arrays as one safetensors file (see weights.chunks); returns its CID."""
        return self.put_file(chunks(specs, tensor), private=private)

    def weights(
        self, cid: CID, *, max_bytes: int | None = None, sender: PublicIdentity | None = None
    ) -> Weights:
        """A stored safetensors file; raises what `leaves` does, and WeightsError."""
        leaves = self.leaves(cid, max_bytes=max_bytes, sender=sender)
        try:
            return Weights.over(leaves)
        except WeightsError:
            if isinstance(leaves, _Opened):
                leaves.leaf(len(leaves.sizes) - 1)  # an envelope without its end says so itself
            raise

    def put_file(self, pieces: Iterable[Buffer], *, private: bool = False) -> CID:
        """Store a file given as its leaves, sealed if this kind is; returns its root CID."""
        recipients = self._recipients(private)
        if recipients and self.party is not None:
            pieces = envelope.seal(pieces, recipients, self.party.identity.public)
        return unixfs.build(pieces, self.store.put)

    def leaves(
        self, cid: CID, *, max_bytes: int | None = None, sender: PublicIdentity | None = None
    ) -> Leaves:
        """A stored file's content, opened if it is sealed.

        With `sender`, who signed for it on the other side, it must be sealed where this kind is
        (NotSealed), and by nobody else (SignatureWrong): so nobody hands in what another made.
        `max_bytes` bounds the content, as the vault's own `limit` does. Raises EnvelopeError, and
        what StoredLeaves raises.
        """
        if self.limit is not None:
            max_bytes = self.limit if max_bytes is None else min(max_bytes, self.limit)
        most = None if max_bytes is None else max_bytes + _overhead(max_bytes)
        stored = StoredLeaves(self.store, cid, max_bytes=most)
        head = stored.leaf(0) if stored.sizes else b""
        if not envelope.is_sealed(head):
            if sender is not None and self._wants_sealed:
                raise NotSealed(f"{cid} is not sealed, which seal={self.seal} requires")
            if max_bytes is not None and sum(stored.sizes) > max_bytes:
                raise WeightsError(f"{cid} has {sum(stored.sizes)} bytes, not {max_bytes} at most")
            return stored
        if self.party is None:
            raise NotSealed(f"{cid} is sealed, and there are no keys here to open it with")
        opener = Opener(head, self.party.identity)
        if sender is not None and opener.sender != sender.sender_id:
            raise SignatureWrong(f"{cid} was sealed by another than {sender.organization}")
        opened = _Opened(stored, opener)
        if max_bytes is not None and sum(opened.sizes) > max_bytes:
            raise WeightsError(f"{cid} has {sum(opened.sizes)} bytes, not {max_bytes} at most")
        return opened

    def fetch(self, cid: CID) -> None:
        """Bring a file's blocks near, as Store.fetch does.

        With a `limit`, not those of a file whose leaves could be much larger than it declares:
        they are fetched one by one as they are read, and a leaf of another size ends that.
        """
        if self.limit is not None and cid.codec != DAG_CBOR:
            leaves = unixfs.leaf_links(cid, self.store.get)
            if len(leaves) * MAX_BLOCK > max(_MOST_AHEAD * self.limit, MAX_BLOCK):
                return
        self.store.fetch(cid)

    def put_bytes(self, data: bytes, *, private: bool = True) -> CID:
        """Store a small file."""
        return self.put_file(unixfs.chunk(data), private=private)

    def get_bytes(self, cid: CID) -> bytes:
        """A small file's content."""
        if cid.codec == DAG_CBOR:
            raise WeightsError(f"{cid} is a record, not a file")
        leaves = self.leaves(cid, max_bytes=_MAX_SMALL)
        return b"".join(leaves.leaf(index) for index in range(len(leaves.sizes)))

    def put_record(self, value: Any, *, private: bool = False) -> CID:
        """Store a record: as DAG-CBOR, or, where this kind is sealed, as a file that holds that."""
        if self._recipients(private):
            block = dagcbor.encode(value)
            if len(block) > dagcbor.MAX_BLOCK:
                raise StoreError(f"record of {len(block)} bytes: at most {dagcbor.MAX_BLOCK}")
            return self.put_bytes(block, private=private)
        return dag.put_record(self.store, value)

    def get_record(self, cid: CID) -> Any:
        """A record, opened if it is sealed."""
        if cid.codec == DAG_CBOR:
            return dag.get_record(self.store, cid)
        return dagcbor.decode(self.get_bytes(cid))

    def _recipients(self, private: bool) -> Sequence[PublicIdentity]:
        if self.party is None or self.seal == "none" or not (private or self._seals_shared):
            return ()
        if private:
            return [self.party.identity.public]
        audience = self.party.audience(self._only)
        if set(audience) <= {self.party.identity.public}:
            raise ConfigError(
                f"the trust list of {self.party.name} has no valid {self.party.others} to seal to: "
                "add one with `fedipfs keys trust`"
            )
        return audience


class _Opened:
    """The content of a sealed file: the leaf after the header is its chunk 0."""

    def __init__(self, stored: StoredLeaves, opener: Opener) -> None:
        self.cid = stored.cid
        self._stored, self._opener = stored, opener
        chunks = stored.sizes[1:]
        if any(size != envelope.CHUNK for size in chunks[:-1]):
            raise EnvelopeTampered(f"{stored.cid}: sealed chunks have other sizes than they must")
        envelope.plain_size(sum(chunks))  # raises if the end is missing
        self.sizes = [size - envelope.TAG for size in chunks]

    def leaf(self, index: int) -> bytes:
        last = index == len(self.sizes) - 1
        return self._opener.open(index, self._stored.leaf(index + 1), last=last)


@lru_cache(maxsize=8)
def _plain(store: Any) -> Vault:
    return Vault(store)


def vault_of(where: Store | Vault) -> Vault:
    """`where`, or the vault over it that seals nothing."""
    return where if isinstance(where, Vault) else _plain(cast(Any, where))


def explicit(where: Store | Vault) -> Vault:
    """As `vault_of`; ConfigError for a bare store that others can read."""
    if not isinstance(where, Vault) and where.shared:
        raise ConfigError(
            "others can read this store: give Vault(store, party, 'all') with this party's keys, "
            "or Vault(store) if nothing in it is private"
        )
    return vault_of(where)


def _overhead(size: int) -> int:
    """The most that sealing adds: the header with 4096 recipients, and a tag a chunk."""
    return envelope.CHUNK + envelope.TAG * (size // envelope.PLAIN + 1)
