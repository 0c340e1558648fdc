"""Where a daemon's RPC is, who may use it, and when it is refused."""

from __future__ import annotations

import base64
import ipaddress
import os
import stat
from dataclasses import dataclass, field, replace
from urllib.parse import unquote, urlsplit

from fedipfs.errors import ConfigError, one_line

VARIABLE = "FEDIPFS_KUBO_CREDENTIALS"
_MAX_FILE = 8192  # bytes
_HOW = "bearer:TOKEN or basic:USER:PASSWORD"
_LIKE = "/ip4/127.0.0.1/tcp/5001"


@dataclass(frozen=True)
class Address:
    """A daemon's RPC: `multiaddr` as ipfshttpclient takes it, `base` the path of the API."""

    text: str
    multiaddr: str
    base: str
    host: str
    secure: bool

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.multiaddr.startswith("/unix/") or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def parse(cls, text: str) -> Address:
        """From a multiaddr (/ip4/127.0.0.1/tcp/5001) or a URL (http://127.0.0.1:5001)."""
        if not isinstance(text, str):
            raise ConfigError(f"store.address={text!r:.80} is no text: use {_LIKE}")
        if text.startswith("/"):
            return _multiaddr(text)
        if "@" in text:  # before anything shows it
            raise ConfigError(
                f"credentials do not belong into an address: put {_HOW} into a file and name it "
                f"as store.credentials, or into ${VARIABLE}"
            )
        wrong = f"{text!r:.200} is no address of an IPFS RPC: use {_LIKE} or http://127.0.0.1:5001"
        try:
            url = urlsplit(text)
            port = url.port
        except ValueError:
            raise ConfigError(wrong) from None
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ConfigError(wrong)
        secure = url.scheme == "https"
        try:
            kind = f"ip{ipaddress.ip_address(url.hostname).version}"
        except ValueError:
            kind = "dns"
        port = port or (443 if secure else 80)
        base = url.path.strip("/") or "api/v0"
        parsed = _multiaddr(f"/{kind}/{url.hostname}/tcp/{port}/{url.scheme}")
        return replace(parsed, text=text, base=base)


def _multiaddr(text: str) -> Address:
    from multiaddr import Multiaddr
    from multiaddr.exceptions import Error

    try:
        parts = Multiaddr(text).items()
        (protocol, host), names = parts[0], [part[0].name for part in parts[1:]]
    except (Error, ValueError, IndexError) as error:
        problem = one_line(error, 120)
        raise ConfigError(f"{text!r:.200} is no multiaddr ({problem}): use {_LIKE}") from None
    unix = protocol.name == "unix" and not names
    http = protocol.name in ("ip4", "ip6", "dns", "dns4", "dns6") and names in (
        ["tcp"],
        ["tcp", "http"],
        ["tcp", "https"],
    )
    if not (unix or http):
        raise ConfigError(f"{text!r:.200} is no address of an RPC: use {_LIKE}")
    return Address(text, text, "api/v0", unquote(str(host)), "https" in names)


@dataclass(frozen=True)
class Credentials:
    """What goes into the Authorization header; not shown."""

    header: str = field(repr=False)

    @classmethod
    def find(cls, file: str | None) -> Credentials | None:
        """From a private file, else from $FEDIPFS_KUBO_CREDENTIALS, else None.

        The form is that of Kubo's API.Authorizations. Raises ConfigError.
        """
        if file is not None:
            if not isinstance(file, str):
                raise ConfigError(
                    f"store.credentials={file!r:.80} is no file: name one with {_HOW}"
                )
            return cls._parse(_read_private(file), file)
        if text := os.environ.get(VARIABLE):
            return cls._parse(text, f"${VARIABLE}")
        return None

    @classmethod
    def _parse(cls, text: str, where: str) -> Credentials:
        kind, _, secret = text.strip().partition(":")
        printable = secret.isascii() and secret.isprintable()
        if kind == "bearer" and secret and printable:
            return cls(f"Bearer {secret}")
        if kind == "basic" and secret.partition(":")[1] and printable:
            return cls("Basic " + base64.b64encode(secret.encode()).decode())
        raise ConfigError(f"{where} does not hold credentials: write {_HOW} into it")


def _read_private(path: str) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait
    except OSError as error:
        raise ConfigError(f"credentials {path}: {error.strerror}; name a readable file") from error
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"credentials {path} is not a file: name one with {_HOW} in it")
        if mode & 0o077:
            raise ConfigError(f"credentials {path} can be read by others: chmod 600 {path}")
        data = os.read(handle, _MAX_FILE + 1)
    finally:
        os.close(handle)
    if len(data) > _MAX_FILE:
        raise ConfigError(f"credentials {path} is larger than {_MAX_FILE} bytes: name another file")
    return data.decode("utf-8", "replace")


def permit(address: Address, credentials: Credentials | None, *, open_rpc: bool) -> None:
    """ConfigError for an RPC that others than its owner could use or overhear.

    Whoever reaches the RPC port controls the node. `open_rpc` is the user's word that the way
    there is safe by other means (a VPN, an SSH tunnel's far end).
    """
    if address.local or open_rpc:
        return
    if credentials is None:
        raise ConfigError(
            f"the RPC at {address.text} is not on this machine and no credentials are given: "
            "whoever reaches that port controls the node. Use an SSH tunnel to its loopback "
            f"address, set store.credentials or ${VARIABLE}, or, if the network itself is "
            "private, set store.open_rpc=true"
        )
    if not address.secure:
        raise ConfigError(
            f"the RPC at {address.text} would get its credentials unencrypted: use https, or an "
            "SSH tunnel, or, if the network itself is private, set store.open_rpc=true"
        )
