"""A coordinator and participants with real keys, and the links between them, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from grids import DirectGrid

from fedipfs import CidGrid, FolderStore, cid_mod
from fedipfs.exchange import Seal, Vault, use_store
from fedipfs.flower_compat import message_from_bytes, message_to_bytes
from fedipfs.ipld import CID
from fedipfs.store import Store
from fedipfs.trust import Identity, Member, TrustList
from fedipfs.trust.party import Party

COORDINATOR = "coordinator"
NAMES = ("alpha", "beta", "gamma")  # of nodes 2, 3 and 4


class Parties:
    """Each has an identity, a trust list in a file of its own, and a vault over one store."""

    def __init__(self, folder: Path, store: Store, seal: Seal = "all", names=NAMES) -> None:
        self.names, self.store, self.seal = tuple(names), store, seal
        self.keys = {name: Identity.new(name) for name in (COORDINATOR, *names)}
        self.lists = {name: folder / f"{name}.toml" for name in self.keys}
        for path in self.lists.values():
            TrustList(self.members()).save(path)
        self.vaults = {name: self.vault(name) for name in self.keys}

    def members(self) -> Iterator[Member]:
        for name, key in self.keys.items():
            yield Member(key.public, "coordinator" if name == COORDINATOR else "participant")

    def vault(self, name: str, *, seal: Seal | None = None, key: Identity | None = None) -> Vault:
        """The store as `name` sees it, or one who has another key or another way of sealing."""
        role = "coordinator" if name == COORDINATOR else "participant"
        party = Party(key or self.keys[name], role, self.lists[name])
        return Vault(self.store, party, seal or self.seal)

    @property
    def coordinator(self) -> Vault:
        return self.vaults[COORDINATOR]

    def relist(self, reader: str, name: str, **dates: Any) -> None:
        """Give the entry of `name` other dates in the trust list of `reader`."""
        listed = TrustList.load(self.lists[reader]).members
        TrustList(
            replace(one, **dates) if one.identity.organization == name else one for one in listed
        ).save(self.lists[reader])

    def mod(self, message: Message, context: Context, call_next: Callable[..., Message]) -> Message:
        """As `cid_mod`, with the keys of the party that the node belongs to."""
        use_store(self.vaults[self.name_of(message.metadata.dst_node_id)])
        return cid_mod(message, context, call_next)

    def name_of(self, node: int) -> str:
        return self.names[node - 2]

    def grid(self, app: Any, *, named: bool = True, **options: Any) -> CidGrid:
        """The coordinator's grid over a Link to the participants' nodes."""
        link = Link(app, len(self.names))
        name_of = self.name_of if named else None
        return CidGrid(link, self.coordinator, name_of=name_of, **options)


class Link(DirectGrid):
    """Like DirectGrid; `forge` may change what goes out, `tamper` what comes back."""

    forge: Callable[[Message], None] = staticmethod(lambda message: None)

    def _call(self, message: Message) -> Message:
        message = message_from_bytes(message_to_bytes(message))  # the others keep theirs
        self.forge(message)
        return super()._call(message)


def blocks(store: FolderStore) -> dict[CID, bytes]:
    """All that a folder store holds."""
    return {cid: store.get(cid) for cid in store}
