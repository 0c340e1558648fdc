"""The parties of a run on this machine: the coordinator's keys, and simulated organizations'.

They live in the run's folder, `keys/`, readable only by its owner: whoever holds
`coordinator.key` can open what the run sealed. Real organizations make their keys at home
(`fedipfs keys new`), and so does the coordinator of a federation of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedipfs.errors import KeyFileError, TrustListError
from fedipfs.trust import Identity, Member, TrustList
from fedipfs.trust.party import Party

if TYPE_CHECKING:
    from fedipfs.server.home import Home

FOLDER = "keys"
_COORDINATOR, _LIST = "coordinator.key", "trust.toml"


def coordinator(run: Path, identity: str | None, participants: Iterable[str]) -> Party:
    """The coordinator of the run in the folder `run`; what keys are missing are made.

    `identity` names the coordinator's own key file (its passphrase is $FEDIPFS_PASSPHRASE); None
    makes one for the run. Raises TrustListError, and KeyFileError also for a key that the run did
    not begin with.
    """
    folder = run / FOLDER
    path = folder / _COORDINATOR if identity is None else Path(identity)
    begun = (folder / _LIST).exists() or (run / "head").exists()
    if begun and not path.exists():
        raise KeyFileError(
            f"{path} is gone, and without it what the run sealed cannot be opened: put back a "
            "copy, or start a new run"
        )
    if (run / "head").exists() and not (folder / _LIST).exists():
        raise TrustListError(
            f"{folder / _LIST} is gone, and with it what was revoked: put back a copy, or start a "
            "new run"
        )
    # Before the folder: a run without it leaves no trace.
    own = None if identity is None else Identity.unlock(identity)
    folder.mkdir(mode=0o700, exist_ok=True)
    keys = own or _made(path, "coordinator")
    if not (folder / _LIST).exists():
        members = [Member(keys.public, "coordinator", None, None, None)]
        for name in participants:
            public = _made(folder / f"{name}.key", name).public
            members.append(Member(public, "participant", None, None, None))
        TrustList(members).save(folder / _LIST)  # the last: with it the set is complete
    return _listed(keys, folder, path)


def reader(run: Path, identity: str | None = None) -> Party | None:
    """The coordinator of a run that is over; None if it had no keys, or they are gone.

    Raises KeyFileError for a key that the run did not begin with.
    """
    folder = run / FOLDER
    path = Path(identity) if identity is not None else folder / _COORDINATOR
    if not (folder / _LIST).exists() or not path.exists():
        return None
    return _listed(Identity.unlock(path), folder, path)


def of_federation(home: Home) -> Party:
    """The coordinator of a federation, whose trust list has the members as they are now."""
    return Party(Identity.unlock(home.identity), "coordinator", home.trust)


def _listed(keys: Identity, folder: Path, path: Path) -> Party:
    """The coordinator with these keys, from `path`, if the run's own trust list names them."""
    party = Party(keys, "coordinator", folder / _LIST)
    if keys.public not in [one.identity for one in party.trusted.entries(party.name, party.role)]:
        raise KeyFileError(
            f"{path} holds another key than the run began with: put that one back, or start a "
            "new run"
        )
    return party


def _made(path: Path, organization: str) -> Identity:
    if path.exists():
        return Identity.load(path)
    identity = Identity.new(organization)
    identity.save(path)
    return identity
