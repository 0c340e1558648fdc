"""Whose keys count: a list that every partner keeps for itself, never sent by a server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from fedipfs.errors import (
    SignatureRefused,
    SignerExpired,
    SignerRevoked,
    SignerUnknown,
    TrustListError,
)
from fedipfs.trust import files, identity
from fedipfs.trust.files import Path_
from fedipfs.trust.identity import PublicIdentity, same_fingerprint

Role = Literal["coordinator", "participant"]

FORMAT = "fedipfs-trust/v1"
MAX_FILE = 4 << 20  # bytes

_ROLES = " or ".join(get_args(Role))
_DATES = ("valid_from", "valid_to", "revoked")
_OPTIONAL: dict[str, type] = {"fingerprint": str, **dict.fromkeys(_DATES, datetime)}


@dataclass(frozen=True, slots=True)
class Member:
    """One key of one organization in one role.

    It counts from `valid_from` until just before `valid_to`, and no longer from `revoked` on.
    Raises TrustListError for an unknown role, dates without an offset, and an empty span.
    """

    identity: PublicIdentity
    role: Role
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    revoked: datetime | None = None

    def __post_init__(self) -> None:
        who = self.identity.organization
        if self.role not in get_args(Role):
            raise TrustListError(f"{who}: role {self.role!r:.80} must be {_ROLES}")
        for name in _DATES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _utc(value, f"{who}: {name}"))
        if self.valid_from and self.valid_to and self.valid_to <= self.valid_from:
            raise TrustListError(f"{who}: valid_to {self.valid_to} is not after valid_from")

    def state(self, at: datetime) -> Literal["valid", "early", "expired", "revoked"]:
        """Whether the key counts at a moment (an aware datetime), or why not."""
        if self.revoked and at >= self.revoked:
            return "revoked"
        if self.valid_from and at < self.valid_from:
            return "early"
        if self.valid_to and at >= self.valid_to:
            return "expired"
        return "valid"

    def refusal(self, at: datetime) -> SignatureRefused:
        """The error that says why this key, which is not valid at a moment, may not sign."""
        who, state = f"{self.identity.organization}'s key as {self.role}", self.state(at)
        if state == "revoked":
            return SignerRevoked(f"{who} is revoked since {self.revoked}")
        if state == "early":
            return SignerExpired(f"{who} counts only from {self.valid_from} on")
        return SignerExpired(f"{who} ended at {self.valid_to}: ask for the next one and trust it")


@dataclass(frozen=True, slots=True)
class TrustList:
    """Members in the order given. Raises TrustListError for entries that contradict each other.

    An organization may have several keys, so that it can change them without a gap; a key
    belongs to one identity only.
    """

    members: tuple[Member, ...]

    def __init__(self, members: Iterable[Member] = ()) -> None:
        object.__setattr__(self, "members", tuple(members))
        owners: dict[bytes, PublicIdentity] = {}
        ids: dict[bytes, PublicIdentity] = {}
        seen: set[tuple[PublicIdentity, Role]] = set()
        for member in self.members:
            who = member.identity
            for key in (who.signing, who.sealing):
                owner = owners.setdefault(key, who)
                if owner != who:
                    raise TrustListError(
                        f"{owner.organization} ({owner.fingerprint}) and {who.organization} "
                        f"({who.fingerprint}) share a key: keep one of them"
                    )
            for id in (who.key_id, who.sender_id):  # envelopes name keys by them
                named = ids.setdefault(id, who)
                if named != who:
                    raise TrustListError(
                        f"{named.organization} and {who.organization} have the same key id: one "
                        "of them must make new keys"
                    )
            if (who, member.role) in seen:
                raise TrustListError(f"{who.organization} is listed twice as {member.role}")
            seen.add((who, member.role))

    @classmethod
    def load(cls, path: Path_) -> TrustList:
        """The list in a TOML file that no other user can change. Raises TrustListError."""
        text = files.read(path, TrustListError, limit=MAX_FILE, ours=True)
        found = files.table(text, path, TrustListError, FORMAT)
        files.check(found, {}, {"member": list}, path, TrustListError)
        members = [
            _member(entry, f"{path}, member {number}")
            for number, entry in enumerate(found.get("member", ()), 1)
        ]
        try:
            return cls(members)
        except TrustListError as error:
            raise TrustListError(f"{path}: {error}") from None

    def dumps(self) -> str:
        """The list as TOML, dates in UTC."""
        parts = [f'format = "{FORMAT}"\n']
        for member in self.members:
            part = f'\n[[member]]\nrole = "{member.role}"\n{member.identity.fields()}'
            for name in _DATES:
                value = getattr(member, name)
                part += f"{name} = {value.isoformat()}\n" if value else ""
            parts.append(part)
        return "".join(parts)

    def save(self, path: Path_) -> None:
        """Put the list in the place of the file's content, all or nothing. Raises OSError."""
        files.write_whole(path, self.dumps())

    def trust(self, member: Member) -> TrustList:
        """The list with one member more. Raises TrustListError if that contradicts it."""
        return TrustList((*self.members, member))

    def revoke(self, name: str, at: datetime) -> TrustList:
        """The list in which the keys of an organization, or of one fingerprint, do not count
        from `at` on; an earlier revocation stays. Raises TrustListError if there are none."""
        at = _utc(at, "revoked")
        chosen = [one for one in self.members if one.identity.organization == name] or [
            one for one in self.members if same_fingerprint(one.identity.fingerprint, name)
        ]
        if not chosen:
            raise TrustListError(f"{name!r:.80} is not in the trust list: no organization, no key")
        return TrustList(
            replace(one, revoked=min(at, one.revoked or at)) if one in chosen else one
            for one in self.members
        )

    def current(self, role: Role, at: datetime) -> list[Member]:
        """The members whose keys count in a role at a moment, sorted by organization."""
        at = _utc(at, "at")
        found = [one for one in self.members if one.role == role and one.state(at) == "valid"]
        return sorted(found, key=lambda one: (one.identity.organization, one.identity.fingerprint))

    def signer(self, organization: str, role: Role, at: datetime) -> list[Member]:
        """The entries of an organization that may sign in a role at a moment: at least one.

        Raises SignerUnknown, SignerExpired (also before the first day) and SignerRevoked.
        """
        at = _utc(at, "at")
        listed = self.entries(organization, role)
        found = [one for one in listed if one.state(at) == "valid"]
        if found:
            return found
        if not listed:
            raise SignerUnknown(f"{organization!r:.80} is not in the trust list as {role}")
        # A key that ran out is the better news: its owner has only to send the next one.
        raise min(listed, key=lambda one: one.state(at) == "revoked").refusal(at)

    def entries(self, organization: str, role: Role) -> list[Member]:
        """All entries of an organization in a role, whatever their dates."""
        mine = [one for one in self.members if one.identity.organization == organization]
        return [one for one in mine if one.role == role]


def _utc(value: datetime, what: str) -> datetime:
    try:
        if value.utcoffset() is not None:
            return value.astimezone(UTC)
    except OverflowError:
        pass
    raise TrustListError(f"{what} {value}: give a date and time with an offset, or Z for UTC")


def _member(entry: Any, where: str) -> Member:
    required: dict[str, type] = {**identity.REQUIRED, "role": str}
    files.check(entry, required, _OPTIONAL, where, TrustListError)
    who = identity.from_fields(entry, where)
    try:
        return Member(who, entry["role"], **{name: entry.get(name) for name in _DATES})
    except TrustListError as error:
        raise TrustListError(f"{where}: {error}") from None
