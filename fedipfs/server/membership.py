"""Who is a member of the federation, with which number, and by which SuperNode."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from fedipfs.errors import ConfigError, FormatError, JoinError, JoinRefused
from fedipfs.server.home import Home
from fedipfs.trust import (
    Member,
    PublicIdentity,
    TrustList,
    document,
    files,
    joining,
    nodekey,
)
from fedipfs.trust.joining import Federation, JoinRequest

__all__ = ["Entry", "Home", "Registry", "federation_of", "synchronise"]

FORMAT = "fedipfs-members/v1"
MAX_FILE = 16 << 20  # bytes

_REQUIRED: dict[str, type] = {
    "number": int,
    **document.KEYS,
    "node_key": str,
    "retired": list,
    "admitted": str,
}
_OPTIONAL: dict[str, type] = {"node_id": int, "removed": str}


@dataclass(frozen=True)
class Entry:
    """An organization that is or was a member.

    Its `number` is its own for ever. `node_key` is the public key of its SuperNode, `node_id`
    the SuperLink's name for that, None while it is not registered there. `retired` are node keys
    that it had before.
    """

    number: int
    identity: PublicIdentity
    node_key: str
    node_id: int | None
    admitted: datetime
    removed: datetime | None = None
    retired: tuple[str, ...] = ()

    @property
    def organization(self) -> str:
        """Its name."""
        return self.identity.organization


class Registry:
    """The members in members.json, and with them the trust list, which say the same.

    What another process changes counts at once. Changes are made one at a time, and each is
    whole. Raises JoinError for a file that is damaged.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._version: tuple[int, int, int] | None = None
        self._serial, self._members = 0, tuple[Entry, ...]()
        self._held = False

    @classmethod
    def open(cls, home: Home) -> Registry:
        """The registry of a coordinator's folder; empty if nobody was admitted yet."""
        registry = cls(home)
        registry._refresh()
        return registry

    @property
    def members(self) -> tuple[Entry, ...]:
        """All that were ever admitted, by number."""
        self._refresh()
        return self._members

    @property
    def active(self) -> tuple[Entry, ...]:
        """Those that are members now, by number."""
        return tuple(each for each in self.members if each.removed is None)

    @property
    def serial(self) -> int:
        """How often the members changed."""
        self._refresh()
        return self._serial

    def find(self, name: str) -> Entry:
        """The member with this name, else the last that had it. Raises ConfigError."""
        named = [each for each in self.members if each.organization == name]
        if named:
            return max(named, key=lambda each: (each.removed is None, each.number))
        names = ", ".join(each.organization for each in self.active) or "nobody"
        raise ConfigError(f"{name!r:.80} is no member: members are {names}")

    def consider(self, request: JoinRequest) -> Entry:
        """The entry that `admit` would make of a request, without admitting it.

        Raises JoinRefused for one that contradicts what is known, and TrustListError.
        """
        entry = self._considered(request, joining.now())
        self._trusting(entry.identity)
        return entry

    def admit(self, request: JoinRequest) -> Entry:
        """Make an organization a member, or give a member's SuperNode its new key.

        Who was a member before, with the same keys, gets its number back. Its fingerprint must
        have been compared. Raises what `consider` does.
        """
        with self.changing():
            entry = self._considered(request, joining.now())
            trusted = self._trusting(entry.identity)
            trusted.save(self.home.trust)
            if entry not in self._members:
                self._put(entry, serial=self._serial + 1)
        return entry

    def remove(self, name: str) -> Entry:
        """End a membership: from now on its signatures count no more. Raises ConfigError."""
        with self.changing():
            at, entry = joining.now(), self.find(name)
            if entry.removed:
                return entry
            entry = replace(entry, removed=at)
            trusted = TrustList.load(self.home.trust)
            if any(one.identity.organization == name for one in trusted.members):
                trusted.revoke(name, at).save(self.home.trust)
            self._put(entry, serial=self._serial + 1)
        return entry

    def note_node(self, number: int, node_id: int | None) -> None:
        """Note the SuperLink's id for a member's node; None: it has none."""
        with self.changing():
            (entry,) = (each for each in self._members if each.number == number)
            if entry.node_id != node_id:
                self._put(replace(entry, node_id=node_id), serial=self._serial)

    def _considered(self, request: JoinRequest, at: datetime) -> Entry:
        who, name = request.identity, request.identity.organization
        if name.casefold() == self.home.organization.casefold():
            raise JoinRefused(f"{name} is the coordinator's own name: have the site take another")
        before = None
        for one in self.members:
            used = request.node_key in (one.node_key, *one.retired)
            if one.identity == who:
                before = one
                if used and (request.node_key != one.node_key or one.removed):
                    raise JoinRefused(
                        f"the node key of {name} was shut out and cannot be used again: have its "
                        "site move node.key away and run `fedipfs-client init` again"
                    )
            elif used:
                raise JoinRefused(
                    f"{name} came with the node key of {one.organization}: have its site move "
                    "node.key away and run `fedipfs-client init` again"
                )
            elif not one.removed and one.organization.casefold() == name.casefold():
                raise JoinRefused(
                    f"{one.organization} is a member with other keys, {one.identity.fingerprint}: "
                    "if it lost them and this is no impostor, first `fedipfs-server remove "
                    f"{one.organization}`"
                )
        if before is None:
            if len(self.active) >= joining.MAX_MEMBERS:
                raise JoinRefused(f"there are {joining.MAX_MEMBERS} members, which is the limit")
            return Entry(len(self._members), who, request.node_key, None, at)
        if before.removed is None and before.node_key == request.node_key:
            return before
        return Entry(
            before.number,
            who,
            request.node_key,
            None,
            at if before.removed else before.admitted,
            retired=(*before.retired, before.node_key),
        )

    def _trusting(self, who: PublicIdentity) -> TrustList:
        """The trust list with an identity as participant, whose key counts again if it was
        removed."""
        trusted = TrustList.load(self.home.trust)
        known = [
            one for one in trusted.entries(who.organization, "participant") if one.identity == who
        ]
        if not known:
            return trusted.trust(Member(who, "participant"))
        if known[0].revoked and any(each.identity == who for each in self.active):
            raise JoinRefused(
                f"{who.organization} is a member, but revoked in {self.home.trust}: first "
                f"`fedipfs-server remove {who.organization}`"
            )
        return TrustList(
            replace(one, revoked=None) if one in known else one for one in trusted.members
        )

    def _put(self, entry: Entry, serial: int) -> None:
        others = [each for each in self._members if each.number != entry.number]
        members = sorted([*others, entry], key=lambda each: each.number)
        text = document.dumps(
            FORMAT, {"serial": serial, "members": [_fields(each) for each in members]}
        )
        files.write_whole(self.home.members, text, 0o600)
        self._refresh()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Keep every other process from changes meanwhile."""
        if self._held:
            yield
            return
        # The file itself is replaced, so the lock is on another.
        handle = os.open(
            self.home.path / "members.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._held = True
            self._refresh()
            yield
        finally:
            self._held = False
            os.close(handle)

    def _refresh(self) -> None:
        path = self.home.members
        try:
            found = os.stat(path)
        except FileNotFoundError:
            if self._version is None:
                return
            raise JoinError(f"{path} is gone: put back a copy") from None
        version = (found.st_mtime_ns, found.st_size, found.st_ino)
        if version != self._version:
            text = files.read(path, JoinError, limit=MAX_FILE, ours=True)
            self._serial, self._members = _parsed(text, os.fspath(path))
            self._version = version


def federation_of(registry: Registry, entry: Entry, coordinator: PublicIdentity) -> Federation:
    """What a member is told of the federation as it is now."""
    home = registry.home
    return Federation(
        host=home.host,
        port=home.fleet_port,
        ca_pem=files.read(home.ca, ConfigError, limit=MAX_FILE, ours=True),
        coordinator=coordinator,
        organization=entry.organization,
        number=entry.number,
        members=tuple((each.number, each.identity) for each in registry.active),
        peers=home.peers,
        serial=registry.serial,
        issued=joining.now(),
    )


class Node(Protocol):
    """A SuperNode as the SuperLink knows it; see `flower_deploy.NodeState`."""

    @property
    def node_id(self) -> int: ...

    @property
    def public_key(self) -> str: ...

    @property
    def status(self) -> str: ...


class Nodes(Protocol):
    """What is needed of `server.engine.control.Control`."""

    def nodes(self) -> Sequence[Node]: ...

    def register(self, node_key: str, name: str) -> int: ...

    def unregister(self, node_id: int) -> None: ...


def synchronise(registry: Registry, control: Nodes) -> list[str]:
    """Have the SuperLink know the nodes of the members, and no others.

    Returns what was done, a line each, and what could not be done.
    """
    with registry.changing():
        return _synchronised(registry, control, list(control.nodes()))


def _synchronised(registry: Registry, control: Nodes, nodes: list[Node]) -> list[str]:
    done: list[str] = []
    live = {each.public_key: each for each in nodes if each.status != "unregistered"}
    spent = {each.public_key for each in nodes} - live.keys()
    wanted = {each.node_key: each for each in registry.active}
    names = {
        key: each.organization
        for each in registry.members
        for key in (each.node_key, *each.retired)
    }
    for key, node in live.items():
        if key not in wanted:
            control.unregister(node.node_id)
            done.append(f"shut out a node of {names.get(key, 'nobody')}")
    for key, entry in wanted.items():
        node_id = live[key].node_id if key in live else None
        if key in spent:
            done.append(
                f"the node key of {entry.organization} was shut out and cannot be used again: "
                "have its site move node.key away, run `fedipfs-client init` and send the join file"
            )
        elif node_id is None:
            node_id = control.register(key, entry.organization)
            done.append(f"let the node of {entry.organization} in")
        registry.note_node(entry.number, node_id)
    for entry in registry.members:
        if entry.removed and entry.node_id is not None:
            registry.note_node(entry.number, None)
    return done


def _fields(entry: Entry) -> dict[str, Any]:
    removed = {"removed": document.moment(entry.removed)} if entry.removed else {}
    return {
        "number": entry.number,
        **document.keys(entry.identity),
        "node_key": entry.node_key,
        "retired": list(entry.retired),
        "admitted": document.moment(entry.admitted),
        **({} if entry.node_id is None else {"node_id": entry.node_id}),
        **removed,
    }


def _parsed(text: str, where: str) -> tuple[int, tuple[Entry, ...]]:
    found = document.loads(text, where, FORMAT)
    document.check(found, {"serial": int, "members": list}, where)
    try:
        members = tuple(_entry(each, where) for each in found["members"])
    except FormatError as error:
        raise JoinError(f"{where}: {error}") from None
    if [each.number for each in members] != list(range(len(members))):
        raise JoinError(f"{where}: a number is missing or there twice; put back a copy")
    return found["serial"], members


def _entry(found: Any, where: str) -> Entry:
    files.check(found, _REQUIRED, _OPTIONAL, where, JoinError)
    removed = found.get("removed")
    return Entry(
        found["number"],
        document.identity_of(found, where),
        nodekey.check(found["node_key"]),
        found.get("node_id"),
        document.moment_of(found["admitted"], f"{where}: admitted"),
        removed and document.moment_of(removed, f"{where}: removed"),
        tuple(nodekey.check(str(each)) for each in found["retired"]),
    )
