"""The doctor's checks of an organization's keys and of its trust list."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedipfs.cli.keys import load_identity
from fedipfs.store.doctor import Check, Finding
from fedipfs.trust import Identity, Member, TrustList
from fedipfs.trust.identity import PASSPHRASE

SOON = timedelta(days=30)


def checks(identity: str | None, trust: str | None, *, alone: bool) -> Iterator[Check]:
    """Of a key file and a trust list, as far as they are named.

    `alone`: the environment is all there is, and then it has to name both or none.
    """
    if alone and bool(identity) != bool(trust):
        yield Check("keys", "settings", _half)
    own: list[Identity] = []
    if identity:
        path = Path(identity)
        yield Check("keys", "identity", lambda: _identity(path, own))
    if trust:
        yield Check("keys", "trust", lambda: _trust(Path(trust), own))


def _half() -> Iterator[Finding]:
    text = "of FEDIPFS_IDENTITY and FEDIPFS_TRUST only one is set"
    yield Finding("keys", "settings", "problem", text, "set both, or neither")


def _identity(path: Path, own: list[Identity]) -> Iterator[Finding]:
    """It is there, closed to others, and can be opened."""
    if Identity.is_encrypted(path) and not os.environ.get(PASSPHRASE):
        text = f"{path} is encrypted, and ${PASSPHRASE} is not set"
        yield Finding("keys", "identity", "warning", text, "set it where the run is started")
        return
    own.append(load_identity(path))
    public = own[0].public
    text = f"{path} holds the keys of {public.organization} ({public.fingerprint})"
    yield Finding("keys", "identity", "ok", text)


def _trust(path: Path, own: list[Identity]) -> Iterator[Finding]:
    """Whose keys count, and how long."""
    members, now = TrustList.load(path).members, datetime.now(UTC)
    valid = [member for member in members if member.state(now) == "valid"]
    for member in members:
        if told := _validity(member, members, now):
            remedy = "ask for the next key, compare its fingerprint, and `fedipfs keys trust` it"
            yield Finding("keys", "trust", "warning", f"{path}: {told}", remedy)
    ours = [identity.public for identity in own]
    if all(member.identity in ours for member in valid):
        text = f"{path}: there is nobody else in it whose keys count now"
        remedy = "add the other side's: `fedipfs keys trust`"
        yield Finding("keys", "trust", "problem", text, remedy)
        return
    roles = [sum(one.role == role for one in valid) for role in ("coordinator", "participant")]
    text = f"{path}: {roles[0]} coordinators and {roles[1]} participants are valid"
    yield Finding("keys", "trust", "ok", text)


def _validity(member: Member, members: tuple[Member, ...], now: datetime) -> str:
    """What is amiss with a member's dates, "" for nothing; an older key's do not matter."""
    who = f"{member.identity.organization}'s key as {member.role}"
    state, until = member.state(now), member.valid_to
    later = now + SOON
    if any(
        other.state(now) == other.state(later) == "valid"
        for other in members
        if (other.identity.organization, other.role) == (member.identity.organization, member.role)
    ):
        return ""
    if state == "expired":
        return f"{who} ended at {until:%Y-%m-%d %H:%M} UTC"
    if state == "early":
        return f"{who} counts only from {member.valid_from:%Y-%m-%d %H:%M} UTC on"
    if state == "valid" and until and until <= later:
        return f"{who} ends at {until:%Y-%m-%d %H:%M} UTC"
    return ""
