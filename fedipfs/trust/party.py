"""One party to a run: its own keys, and whom it trusts."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from fedipfs.errors import TrustListError
from fedipfs.trust.identity import Identity, PublicIdentity
from fedipfs.trust.statement import Statement, sign, verify
from fedipfs.trust.trustlist import Member, Role, TrustList


class Party:
    """Signs what it makes and checks what the other side made, against a list of its own.

    Coordinators deal with participants and participants with coordinators. Given a file, the
    trust list is read again whenever that changes, so that a revocation counts at once.
    """

    def __init__(
        self, identity: Identity, role: Role, trusted: TrustList | str | os.PathLike[str]
    ) -> None:
        self.identity, self.role = identity, role
        self._path = None if isinstance(trusted, TrustList) else os.fspath(trusted)
        self._list = trusted if isinstance(trusted, TrustList) else TrustList()
        self._version: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """Its organization."""
        return self.identity.public.organization

    @property
    def others(self) -> Role:
        """The role of those on the other side."""
        return "participant" if self.role == "coordinator" else "coordinator"

    @property
    def trusted(self) -> TrustList:
        """The trust list as it is now. Raises TrustListError."""
        if self._path is not None:
            try:
                found = os.stat(self._path)
            except OSError as error:
                raise TrustListError(
                    f"trust list {self._path}: {error.strerror}; `fedipfs keys trust` makes one"
                ) from error
            version = (found.st_mtime_ns, found.st_size, found.st_ino)
            if version != self._version:
                self._list, self._version = TrustList.load(self._path), version
        return self._list

    def audience(self, only: str | None = None) -> list[PublicIdentity]:
        """Whom what it shares is sealed to: the other side's valid members; and a coordinator.

        With `only`, the name of an organization, no other of the other side's.
        """
        members = self.trusted.current(self.others, datetime.now(UTC))
        listed = [member.identity for member in members]
        own = [self.identity.public] if self.role == "coordinator" else []
        return own + [one for one in listed if only is None or one.organization == only]

    def sign(self, statement: Statement) -> bytes:
        """Its signature, 64 bytes."""
        return sign(self.identity, statement)

    def verify(self, organization: str, statement: Statement, signature: bytes | None) -> Member:
        """The member of the other side that signed; raises the SignatureRefused that fits."""
        now = datetime.now(UTC)
        return verify(self.trusted, organization, self.others, statement, signature, now)

    def verify_own(self, organization: str, statement: Statement, signature: bytes | None) -> None:
        """As `verify`, for what a party of its own role signed: itself, or one it trusts.

        It trusts itself unless its list says otherwise.
        """
        public, trusted = self.identity.public, self.trusted
        if public not in [one.identity for one in trusted.entries(self.name, self.role)]:
            trusted = trusted.trust(Member(public, self.role))
        verify(trusted, organization, self.role, statement, signature, datetime.now(UTC))
