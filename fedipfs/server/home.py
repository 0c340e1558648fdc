"""The coordinator's folder: what `fedipfs-server init` makes, and where everything in it is."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedipfs.errors import ConfigError, FormatError, KeyFileError
from fedipfs.trust import Member, TrustList, files, joining, tls
from fedipfs.trust.identity import check_organization

FORMAT = "fedipfs-coordinator/v1"
_KEYS: dict[str, type] = {
    "organization": str,
    "host": str,
    "port": int,
    "bind": str,
    "http_port": int,
    "peers": list,
}
_MAX = 1 << 16  # bytes of a small file


@dataclass(frozen=True)
class Home:
    """A coordinator's folder, and what its coordinator.toml says.

    Partners dial `host`, a DNS name or an IP address, at `fleet_port`; the SuperLink listens for
    them on the address `bind`, and for this machine only on `http_port` of 127.0.0.1. `peers` are
    multiaddrs at which their IPFS nodes find the coordinator's.
    """

    path: Path
    organization: str
    host: str
    fleet_port: int = 9092
    http_port: int = 8000
    bind: str = "0.0.0.0"
    peers: tuple[str, ...] = ()

    @property
    def identity(self) -> Path:
        """The organization's private keys (trust.Identity)."""
        return self.path / "identity.key"

    @property
    def trust(self) -> Path:
        """The trust list: itself as coordinator, the members as participants."""
        return self.path / "trust.toml"

    @property
    def config(self) -> Path:
        """What is said of this folder: coordinator.toml."""
        return self.path / "coordinator.toml"

    @property
    def ca(self) -> Path:
        """The certificate of the authority, which partners get."""
        return self.path / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The authority's private key, needed to renew the server's certificate only."""
        return self.path / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.path / "server.pem"

    @property
    def certificate_key(self) -> Path:
        """The private key of the server's certificate."""
        return self.path / "server.key"

    @property
    def members(self) -> Path:
        """The members and their numbers."""
        return self.path / "members.json"

    @property
    def database(self) -> Path:
        """The SuperLink's database."""
        return self.path / "superlink.db"

    @property
    def secret(self) -> Path:
        """The secret by which the SuperExec shows the SuperLink that it is ours."""
        return self.path / "superexec.secret"

    @property
    def flower(self) -> Path:
        """FLWR_HOME of all that runs here."""
        return self.path / "flower"

    @property
    def address(self) -> str:
        """Where partners' SuperNodes dial, as host:port."""
        return joining.address(self.host, self.fleet_port)

    @property
    def fleet_address(self) -> str:
        """Where the SuperLink listens for them, as host:port."""
        return joining.address(self.bind, self.fleet_port)

    @classmethod
    def load(cls, path: Path | None = None) -> Home:
        """The folder at `path`, else $FEDIPFS_HOME, else ~/.fedipfs. Raises ConfigError."""
        path = files.home() if path is None else path
        file = path / "coordinator.toml"
        if not file.exists():
            raise ConfigError(
                f"{path} is no coordinator's folder (no coordinator.toml): make one with "
                "fedipfs-server init --host NAME, or say where it is with FEDIPFS_HOME"
            )
        text = files.read(file, ConfigError, limit=_MAX, ours=True)
        found = files.table(text, file, ConfigError, FORMAT)
        files.check(found, _KEYS, {}, file, ConfigError)
        found["fleet_port"] = found.pop("port")
        try:
            return cls._checked(path, **found)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    @classmethod
    def create(
        cls,
        path: Path | None = None,
        *,
        host: str,
        organization: str | None = None,
        fleet_port: int = 9092,
        http_port: int = 8000,
        bind: str = "0.0.0.0",
        peers: Sequence[str] = (),
        ask: Callable[[], bytes] | None = None,
    ) -> Home:
        """Make a coordinator's folder; keys of the same organization in identity.key are kept.

        `organization` is `host` unless given. New keys are encrypted if $FEDIPFS_PASSPHRASE is
        set; `ask` gives the passphrase of those that are there. Nothing is overwritten. Raises
        ConfigError, and KeyFileError for keys of another organization.
        """
        path = files.home() if path is None else path
        name = tls.host(host) if organization is None else organization
        home = cls._checked(path, name, host, fleet_port, http_port, bind, list(peers))
        made = (
            *(home.config, home.trust, home.ca, home.ca_key, home.certificate),
            *(home.certificate_key, home.members, home.secret, home.database),
        )
        if there := [file.name for file in made if os.path.lexists(file)]:
            raise ConfigError(
                f"{path} has {', '.join(there)} already, and nothing is overwritten: choose "
                "another folder with --home, or move them away"
            )
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            raise ConfigError(
                f"{path} is open to other users: chmod 700 {path}, or choose another folder with "
                "--home"
            )
        home.flower.mkdir(mode=0o700, exist_ok=True)
        keys = joining.own_identity(home.identity, name, ask)
        at = joining.now()
        authority = tls.new_authority(name, at)
        server = tls.new_certificate(authority, [home.host], at)
        files.write_new(home.ca_key, authority.key)
        files.write_new(home.ca, authority.certificate)
        files.write_new(home.certificate_key, server.key)
        files.write_new(home.certificate, server.certificate)
        files.write_new(home.secret, secrets.token_hex(32))
        files.write_new(home.trust, TrustList([Member(keys.public, "coordinator")]).dumps())
        files.write_new(home.config, home._dumps())  # the last: with it the folder is complete
        return home

    @classmethod
    def _checked(
        cls,
        path: Path,
        organization: str,
        host: str,
        fleet_port: int,
        http_port: int,
        bind: str,
        peers: list[Any],
    ) -> Home:
        try:
            check_organization(organization)
        except FormatError as error:
            raise ConfigError(f"{error} (--org says it)") from None
        for name, port in (("port", fleet_port), ("http_port", http_port)):
            if not 0 < port < 1 << 16:
                raise ConfigError(f"{name} {port}: expected 1 to 65535")
        if fleet_port == http_port:
            raise ConfigError(f"port and http_port are both {fleet_port}: they must differ")
        bind = bind if bind in ("0.0.0.0", "::") else tls.host(bind, "bind")
        for peer in peers:
            if type(peer) is not str:
                raise ConfigError(f"peers: {peer!r:.80} is no text")
            try:
                joining.check_peer(peer)
            except FormatError as error:
                raise ConfigError(str(error)) from None
        return cls(path, organization, tls.host(host), fleet_port, http_port, bind, tuple(peers))

    def _dumps(self) -> str:
        # A JSON text or list of texts is one of TOML, too.
        return (
            "# Written by `fedipfs-server init`; partners got host and port, and the certificate\n"
            "# names host: after a change, run `fedipfs-server renew` and `members --write`.\n"
            f'format = "{FORMAT}"\n'
            f"organization = {json.dumps(self.organization)}\n"
            f"host = {json.dumps(self.host)}  # what partners dial\n"
            f"port = {self.fleet_port}  # of the SuperLink's Fleet API\n"
            f"bind = {json.dumps(self.bind)}  # the address on which it listens for them\n"
            f"http_port = {self.http_port}  # of its other APIs, on 127.0.0.1 only\n"
            f"peers = {json.dumps(list(self.peers))}  # of the coordinator's IPFS node\n"
        )

    def renew(self, days: int) -> None:
        """Put a new certificate of the same authority in the place of the server's.

        Its private key is kept (and made if the file is gone). Raises ConfigError, KeyFileError.
        """
        pems = [_read(file) for file in (self.ca, self.ca_key)]
        key = _read(self.certificate_key) if self.certificate_key.exists() else None
        pair = tls.new_certificate(tls.Pair(*pems), [self.host], joining.now(), days, key)
        if key is None:
            files.write_new(self.certificate_key, pair.key)
        files.write_whole(self.certificate, pair.certificate)


def _read(path: Path) -> str:
    return files.read(path, KeyFileError, limit=_MAX, ours=True)
