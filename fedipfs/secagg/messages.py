"""What clients and server say to each other, stage by stage, as DAG-CBOR.

    stage      the server says    a client answers
    ADVERTISE  Session            Advertise   its two public keys
    SHARE      Roster             Share       its secrets in sealed shares, one a neighbour
    MASKED     Delivery           Masked      where its masked vector is
    CONFIRM    Survivors          Confirm     that it has seen these survivors
    UNMASK     Request            Unmask      one share for every neighbour

`Roster`, `Survivors` and `Request` are the same for all. Every answer is signed. Whatever comes in
has the types and sizes said here, or is refused with BadMessage; what it means is checked by who
takes it. The masked vectors themselves travel apart, and are named by a CID or another text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from fedipfs.errors import BadMessage, DagCborError, SignatureMissing
from fedipfs.ipld import dagcbor
from fedipfs.secagg import keys, shamir
from fedipfs.secagg.session import Session, Sign, Verify
from fedipfs.trust import Statement

HASH, SIGNATURE = 32, 64  # bytes
SEALED = 2 * shamir.SHARE + keys.TAG  # bytes: a share of the seed and one of the mask key
MAX_REFERENCE = 256  # characters

Keys = tuple[bytes, bytes]  # a client's public keys: for masks, for sealing


class Message:
    """A frozen dataclass whose fields are text, bytes, and tuples of these or of messages."""

    parts: ClassVar[dict[str, type[Message]]] = {}  # fields that are tuples of messages

    def plain(self) -> dict[str, Any]:
        """The fields as DAG-CBOR holds them."""
        found: dict[str, Any] = {}
        for name in _names(type(self)):
            value = getattr(self, name)
            found[name] = [each.plain() for each in value] if name in self.parts else value
        return found

    def to_bytes(self) -> bytes:
        """As a DAG-CBOR block."""
        return dagcbor.encode({**self.plain(), "kind": type(self).__name__})

    @classmethod
    def from_bytes(cls, block: bytes) -> Self:
        """What `to_bytes` gave. Raises BadMessage for anything else."""
        try:
            found = dagcbor.decode(block)
        except DagCborError as error:
            raise BadMessage(f"{cls.__name__}: {error}") from None
        if type(found) is not dict or found.pop("kind", None) != cls.__name__:
            raise BadMessage(f"expected a message of the kind {cls.__name__}")
        return cls.of(found)

    @classmethod
    def of(cls, found: Any) -> Self:
        """What `plain` gave. Raises BadMessage for anything else."""
        names = _names(cls)
        if type(found) is not dict or found.keys() != set(names):
            raise BadMessage(f"{cls.__name__}: expected a map with {', '.join(sorted(names))}")
        for name, value in found.items():
            if type(value) is list:
                part = cls.parts.get(name)
                found[name] = tuple([part.of(each) for each in value] if part else value)
        return cls(**found)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of `to_bytes`."""
        return hashlib.sha256(self.to_bytes()).digest()


class Signed(Message):
    """A client's answer: `by` whom, and its signature."""

    stage: ClassVar[str]
    by: str
    signature: bytes

    def signed(self, session: Session, keys: Keys, sign: Sign) -> Self:
        """The same with its signature; `keys` are the client's two public keys."""
        return dataclasses.replace(self, signature=sign(self._statement(session, keys)))  # type: ignore[type-var]

    def check(self, session: Session, keys: Keys, verify: Verify) -> None:
        """Raises the SignatureRefused that fits unless `by` signed it with these public keys."""
        if not self.signature:
            raise SignatureMissing(f"{self.by} did not sign what it says at {self.stage}")
        verify(self.by, self._statement(session, keys), self.signature)

    def _statement(self, session: Session, keys: Keys) -> Statement:
        return session.statement(self.stage, self.by, keys, self.payload())

    def payload(self) -> bytes:
        """What is signed, besides all that a session's statement holds."""
        return dagcbor.encode(
            {name: v for name, v in self.plain().items() if name not in ("by", "signature")}
        )


@dataclass(frozen=True)
class Advertise(Signed):
    """Two fresh public keys (X25519): one to agree on masks with, one to be sealed to."""

    stage = "advertise"
    by: str
    mask_key: bytes
    seal_key: bytes
    signature: bytes = b""

    def __post_init__(self) -> None:
        check_fields(self, mask_key=keys.KEY, seal_key=keys.KEY)

    @property
    def keys(self) -> Keys:
        """Both keys, as every statement of this client holds them."""
        return self.mask_key, self.seal_key


@dataclass(frozen=True)
class Roster(Message):
    """Everyone who advertised, sorted by name. Its digest binds all that follows."""

    parts: ClassVar[dict[str, type[Message]]] = {"clients": Advertise}
    clients: tuple[Advertise, ...]

    def __post_init__(self) -> None:
        check_parts(self.clients, Advertise)


@dataclass(frozen=True)
class Share(Signed):
    """A share of both secrets for each neighbour on the roster, in the order of their names.

    `commitment` fixes the seed of the self-mask; `roster` is the digest of the roster.
    """

    stage = "share"
    by: str
    roster: bytes
    commitment: bytes
    sealed: tuple[bytes, ...]
    signature: bytes = b""

    def __post_init__(self) -> None:
        check_fields(self, roster=HASH, commitment=HASH)
        check_list(self.sealed, SEALED)

    @property
    def sealed_hash(self) -> bytes:
        """SHA-256 of all sealed shares: what a record keeps of them."""
        return hashlib.sha256(b"".join(self.sealed)).digest()

    def payload(self) -> bytes:
        """The sealed shares count by their hash, so that a record can do without them."""
        return share_payload(self.roster, self.commitment, self.sealed_hash)


def share_payload(roster: bytes, commitment: bytes, sealed_hash: bytes) -> bytes:
    """What is signed at SHARE."""
    return dagcbor.encode({"roster": roster, "commitment": commitment, "sealed": sealed_hash})


@dataclass(frozen=True)
class Delivery(Message):
    """To one client: who has shared, sorted, and what its neighbours among them sealed to it.

    `sealed` is in the order of these neighbours' names.
    """

    to: str
    sharers: tuple[str, ...]
    sealed: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check_name(self.to)
        _check_names(self.sharers)
        check_list(self.sealed, SEALED)

    @property
    def sharers_hash(self) -> bytes:
        """SHA-256 of the sharers' names."""
        return names_hash(self.sharers)


@dataclass(frozen=True)
class Masked(Signed):
    """Where the masked vector is (`vector`: a CID or another text), masked among which sharers."""

    stage = "masked"
    by: str
    sharers: bytes
    vector: str
    signature: bytes = b""

    def __post_init__(self) -> None:
        check_fields(self, sharers=HASH)
        if type(self.vector) is not str or not 0 < len(self.vector) <= MAX_REFERENCE:
            raise BadMessage(f"Masked: a vector is named by 1 to {MAX_REFERENCE} characters")


@dataclass(frozen=True)
class Survivors(Message):
    """Everyone whose masked vector came in time, by its signed answer, sorted by name."""

    parts: ClassVar[dict[str, type[Message]]] = {"clients": Masked}
    clients: tuple[Masked, ...]

    def __post_init__(self) -> None:
        check_parts(self.clients, Masked)


@dataclass(frozen=True)
class Confirm(Signed):
    """That the client has seen these survivors and their vectors: their digest."""

    stage = "confirm"
    by: str
    survivors: bytes
    signature: bytes = b""

    def __post_init__(self) -> None:
        check_fields(self, survivors=HASH)


@dataclass(frozen=True)
class Request(Message):
    """To unmask the sum of the survivors; the others who shared have dropped out. Sorted names.

    With the confirmations, by name.
    """

    parts: ClassVar[dict[str, type[Message]]] = {"confirmations": Confirm}
    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    confirmations: tuple[Confirm, ...]

    def __post_init__(self) -> None:
        _check_names(self.survivors)
        _check_names(self.dropped)
        check_parts(self.confirmations, Confirm)


@dataclass(frozen=True)
class Unmask(Signed):
    """One share for each sharer whose share the client holds, in the order of their names.

    Of the seed for survivors, itself among them; of the mask key for those who dropped out.
    """

    stage = "unmask"
    by: str
    request: bytes
    shares: tuple[bytes, ...] = field(repr=False)
    signature: bytes = b""

    def __post_init__(self) -> None:
        check_fields(self, request=HASH)
        check_list(self.shares, shamir.SHARE)


def _names(kind: type[Message]) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(kind))  # type: ignore[arg-type]


def names_hash(names: tuple[str, ...]) -> bytes:
    """SHA-256 of a list of names."""
    return hashlib.sha256(dagcbor.encode(list(names))).digest()


def check_fields(message: Signed, **sizes: int) -> None:
    """Raises BadMessage unless an answer's name, signature and these byte strings are sound."""
    kind = type(message).__name__
    _check_name(message.by)
    for name, size in sizes.items():
        value = getattr(message, name)
        if type(value) is not bytes or len(value) != size:
            raise BadMessage(f"{kind}: {name} has {size} bytes")
    if type(message.signature) is not bytes or len(message.signature) not in (0, SIGNATURE):
        raise BadMessage(f"{kind}: a signature has {SIGNATURE} bytes")


def _check_name(name: Any) -> None:
    if type(name) is not str or not 0 < len(name) <= 64:
        raise BadMessage(f"name {name!r:.80}: expected 1 to 64 characters")


def _check_names(names: Any) -> None:
    if type(names) is not tuple:
        raise BadMessage("expected a list of names")
    for name in names:
        _check_name(name)
    _check_order(names)


def check_list(items: Any, size: int, count: int | None = None) -> None:
    """Raises BadMessage unless these are `count` byte strings of `size` bytes."""
    if type(items) is not tuple or any(type(x) is not bytes or len(x) != size for x in items):
        raise BadMessage(f"expected a list of byte strings of {size} bytes")
    if count is not None and len(items) != count:
        raise BadMessage(f"expected {count} byte strings of {size} bytes, not {len(items)}")


def check_parts(items: Any, kind: type[Message]) -> None:
    """Raises BadMessage unless these are messages of a kind, sorted by name."""
    if type(items) is not tuple or any(type(each) is not kind for each in items):
        raise BadMessage(f"expected a list of messages of the kind {kind.__name__}")
    _check_order([each.by for each in items])


def _check_order(names: Any) -> None:
    if any(one >= other for one, other in itertools.pairwise(names)):
        raise BadMessage("expected sorted names, each once")
