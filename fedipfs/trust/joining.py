"""The two files by which an organization joins a federation (docs/partners.md).

The site asks with a join file of its public keys, signed with the identity in it; the coordinator
answers with a federation file, signed whole. Neither holds a secret, and neither is believed for
its signature alone: people compare the fingerprint of the identity over another channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedipfs.errors import ConfigError, FormatError, JoinError, JoinRefused, KeyFileError, one_line
from fedipfs.trust import document, files, nodekey, tls
from fedipfs.trust.files import Path_
from fedipfs.trust.identity import PASSPHRASE, Identity, PublicIdentity

JOIN_FORMAT, FEDERATION_FORMAT = "fedipfs-join/v1", "fedipfs-federation/v1"
MAX_JOIN, MAX_FEDERATION = 1 << 14, 4 << 20  # bytes
MAX_MEMBERS = 4096
MAX_AGE = timedelta(days=30)  # of a join file
_AHEAD = timedelta(days=1)  # by which another's clock may be before ours

_JOIN: dict[str, type] = {**document.KEYS, "node_key": str, "created": str, "signature": str}
_FEDERATION: dict[str, type] = {
    "organization": str,
    "number": int,
    "serial": int,
    "issued": str,
    "host": str,
    "port": int,
    "ca": str,
    "coordinator": dict,
    "peers": list,
    "members": list,
    "signature": str,
}


@dataclass(frozen=True)
class JoinRequest:
    """What a site asks to be admitted with.

    `node_key` is the public key of its SuperNode, "ecdsa-sha2-nistp384 AAAA..."; `created` is by
    the site's own clock.
    """

    identity: PublicIdentity
    node_key: str
    created: datetime

    def dumps(self, identity: Identity) -> str:
        """The join file, signed with the keys whose public half it names."""
        content = {
            **document.keys(self.identity),
            "node_key": self.node_key,
            "created": document.moment(self.created),
        }
        return document.sign(JOIN_FORMAT, content, identity)

    @classmethod
    def loads(cls, text: str, where: Path_ = "join file") -> JoinRequest:
        """What `dumps` wrote. Raises JoinError, and SignatureWrong for what is forged."""
        found = document.loads(text, where, JOIN_FORMAT)
        document.check(found, _JOIN, where)
        public = document.identity_of(found, where)
        document.verify(found, where, JOIN_FORMAT, public)
        created = document.moment_of(found["created"], f"{where}: created")
        try:
            return cls(public, nodekey.check(found["node_key"]), created)
        except FormatError as failure:
            raise JoinError(f"{where}: {failure}") from None

    @classmethod
    def load(cls, path: Path_) -> JoinRequest:
        """The request in a file. Raises JoinError and SignatureWrong."""
        return cls.loads(files.read(path, JoinError, limit=MAX_JOIN), path)

    def check_age(self, now: datetime) -> None:
        """Refuse a file of more than 30 days, or of the future. Raises JoinRefused."""
        if now - self.created > MAX_AGE or self.created - now > _AHEAD:
            raise JoinRefused(
                f"the join file of {self.identity.organization} is dated {self.created:%Y-%m-%d}, "
                f"and today is {now:%Y-%m-%d}: have its site run `fedipfs-client init` again"
                + (" (or set its clock)" if self.created > now else "")
            )


@dataclass(frozen=True)
class Federation:
    """What the coordinator tells one organization of the federation that it has joined.

    `number` is the organization's own, `members` are all that are admitted with theirs, itself
    among them, in the order of numbers. `peers` are multiaddrs of the coordinator's IPFS node.
    `serial` grows with every change of the members. Raises FormatError.
    """

    host: str
    port: int
    ca_pem: str
    coordinator: PublicIdentity
    organization: str
    number: int
    members: tuple[tuple[int, PublicIdentity], ...]
    peers: tuple[str, ...]
    serial: int
    issued: datetime

    def __post_init__(self) -> None:
        numbers = [number for number, _ in self.members]
        names = [public.organization for _, public in self.members]
        if not 0 < self.port < 1 << 16:
            raise FormatError(f"port {self.port}: expected 1 to 65535")
        if not (0 <= self.serial < 1 << 63 and all(0 <= each < 1 << 31 for each in numbers)):
            raise FormatError("a number or serial that is out of range")
        if numbers != sorted(set(numbers)) or len(set(names)) != len(names):
            raise FormatError("members that are not in order, or there twice")
        if len(names) > MAX_MEMBERS:
            raise FormatError(f"{len(names)} members: the limit is {MAX_MEMBERS}")
        if (self.number, self.organization) not in zip(numbers, names, strict=True):
            raise FormatError(f"{self.organization} is not member {self.number} of it")
        try:
            if tls.host(self.host) != self.host:
                raise FormatError(f"host {self.host!r:.80} is not as certificates hold it")
        except ConfigError as failure:
            raise FormatError(str(failure)) from None
        tls.check_authority(self.ca_pem)
        for peer in self.peers:
            check_peer(peer)

    @property
    def address(self) -> str:
        """Where SuperNodes dial, as host:port."""
        return address(self.host, self.port)

    @property
    def own(self) -> PublicIdentity:
        """The public identity of the organization that the file is for."""
        return dict(self.members)[self.number]

    def dumps(self, identity: Identity) -> str:
        """The federation file, signed by the coordinator."""
        content = {
            "organization": self.organization,
            "number": self.number,
            "serial": self.serial,
            "issued": document.moment(self.issued),
            "host": self.host,
            "port": self.port,
            "ca": self.ca_pem,
            "coordinator": document.keys(self.coordinator),
            "peers": list(self.peers),
            "members": [{"number": each, **document.keys(who)} for each, who in self.members],
        }
        return document.sign(FEDERATION_FORMAT, content, identity)

    @classmethod
    def loads(cls, text: str, where: Path_ = "federation file") -> Federation:
        """What `dumps` wrote, as the coordinator that it names has signed it.

        Whether that is the right coordinator is for the caller to find out. Raises JoinError, and
        SignatureWrong for what is forged.
        """
        found = document.loads(text, where, FEDERATION_FORMAT)
        document.check(found, _FEDERATION, where)
        document.check(found["coordinator"], document.KEYS, f"{where}, coordinator")
        coordinator = document.identity_of(found["coordinator"], f"{where}, coordinator")
        document.verify(found, where, FEDERATION_FORMAT, coordinator)
        if any(type(peer) is not str for peer in found["peers"]):
            raise JoinError(f"{where}: peers are not all texts")
        if len(found["members"]) > MAX_MEMBERS:
            raise JoinError(f"{where} has more than {MAX_MEMBERS} members")
        try:
            return cls(
                host=found["host"],
                port=found["port"],
                ca_pem=found["ca"],
                coordinator=coordinator,
                organization=found["organization"],
                number=found["number"],
                members=tuple(_member(each, where) for each in found["members"]),
                peers=tuple(found["peers"]),
                serial=found["serial"],
                issued=document.moment_of(found["issued"], f"{where}: issued"),
            )
        except FormatError as failure:
            raise JoinError(f"{where}: {failure}") from None

    @classmethod
    def load(cls, path: Path_) -> Federation:
        """The federation in a file. Raises JoinError and SignatureWrong."""
        return cls.loads(files.read(path, JoinError, limit=MAX_FEDERATION), path)


def address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_peer(peer: str) -> None:
    """Refuse what is not the multiaddr of an IPFS node, with its id. Raises FormatError."""
    from multiaddr import Multiaddr
    from multiaddr.exceptions import Error

    try:
        names = [part[0].name for part in Multiaddr(peer).items()] if len(peer) <= 512 else []
    except (Error, ValueError, IndexError) as failure:
        raise FormatError(f"peer {peer!r:.200} is no multiaddr: {one_line(failure, 120)}") from None
    if names[-1:] != ["p2p"] or len(names) < 2:
        raise FormatError(
            f"peer {peer!r:.200}: give the address and the id, as `ipfs id` shows them: "
            "/dns4/fl.example.org/tcp/4001/p2p/12D3..."
        )


def own_identity(path: Path, organization: str, ask: Callable[[], bytes] | None = None) -> Identity:
    """The organization's keys in a file, made if there is none. Raises KeyFileError."""
    if not path.exists():
        keys = Identity.new(organization)
        secret = os.environ.get(PASSPHRASE)
        keys.save(path, os.fsencode(secret) if secret else None)
        return keys
    keys = Identity.unlock(path, ask)
    if keys.public.organization != organization:
        raise KeyFileError(
            f"{path} holds the keys of {keys.public.organization}, not of {organization}: use "
            "that name, or another folder"
        )
    return keys


def now() -> datetime:
    """The time, in whole seconds: what is signed, shown and compared as text."""
    return datetime.now(UTC).replace(microsecond=0)


def _member(found: Any, where: Path_) -> tuple[int, PublicIdentity]:
    document.check(found, {"number": int, **document.KEYS}, f"{where}, a member")
    return found["number"], document.identity_of(found, f"{where}, a member")
