"""A partner's folder: its keys, what it was told of the federation, and what it remembers."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedipfs.errors import RunError

VARIABLE = "FEDIPFS_HOME"
LOOPBACK = "127.0.0.1"  # where SuperNode and stub meet


@dataclass(frozen=True)
class Home:
    """Where things are; nothing is made or read here."""

    path: Path

    @classmethod
    def default(cls) -> Home:
        """$FEDIPFS_HOME, or .fedipfs in the user's own folder."""
        return cls(Path(os.environ.get(VARIABLE) or "~/.fedipfs").expanduser().absolute())

    @property
    def site(self) -> Path:
        """The site's configuration."""
        return self.path / "site.yaml"

    @property
    def identity(self) -> Path:
        """The organization's private keys: for the worker alone."""
        return self.path / "identity.key"

    @property
    def trust(self) -> Path:
        """Whom the organization trusts."""
        return self.path / "trust.toml"

    @property
    def node_key(self) -> Path:
        """The private key with which the SuperNode shows who it is."""
        return self.path / "node.key"

    @property
    def federation(self) -> Path:
        """What the coordinator signed when it let this organization in."""
        return self.path / "federation.json"

    @property
    def ca(self) -> Path:
        """The certificate that vouches for the SuperLink's."""
        return self.path / "ca.pem"

    @property
    def socket(self) -> Path:
        """Where the worker listens."""
        return self.path / "worker.sock"

    @property
    def activity(self) -> Path:
        """The log of what was asked and answered."""
        return self.path / "activity.log"

    @property
    def state(self) -> Path:
        """What is remembered between messages."""
        return self.path / "state"

    @property
    def ledger(self) -> Path:
        """The folder of privacy ledgers: $FEDIPFS_LEDGER, or one in here."""
        return Path(os.environ.get("FEDIPFS_LEDGER") or self.path / "ledger")

    @property
    def logs(self) -> Path:
        """What the processes say."""
        return self.path / "logs"

    @property
    def flower(self) -> Path:
        """Flower's own folder, and what SuperNode and stub share."""
        return self.path / "flower"

    @property
    def secret(self) -> Path:
        """By which the SuperNode knows the stub."""
        return self.flower / "superexec.secret"

    @property
    def node_id(self) -> Path:
        """The id that the SuperLink gave the SuperNode that runs, or was killed."""
        return self.flower / "node.id"

    @property
    def claim(self) -> Path:
        """The task that the stub is at."""
        return self.flower / "claim.json"


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at `path`, which is made. Raises RunError where `what` runs already."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{what} runs already ({path} is in use): stop that one, or choose another folder "
                f"with {VARIABLE}"
            ) from None
        yield
    finally:
        os.close(file)
