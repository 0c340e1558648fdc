"""`fedipfs keys`: an organization's own keys, and the list of those it trusts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedipfs.cli.base import Commands, json_option, print_json

if TYPE_CHECKING:
    from fedipfs.trust import Identity, Member, PublicIdentity


@click.group("keys", cls=Commands)
def commands() -> None:
    """Make and show keys, and say whose keys to trust.

    Files are in $FEDIPFS_HOME, else ~/.fedipfs: identity.key and trust.toml. The passphrase of
    a key file is asked for, or taken from $FEDIPFS_PASSPHRASE.
    """


class DateType(click.ParamType):
    """A day (its first moment in UTC), or a date and time with an offset."""

    name = "date"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """The moment that `value` is the ISO 8601 text of."""
        try:
            day = date.fromisoformat(value)
            return datetime(day.year, day.month, day.day, tzinfo=UTC)
        except ValueError:
            pass
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a date such as 2027-12-31", param, ctx)
        if found.utcoffset() is None:
            self.fail(f"{value!r} has no offset: add Z for UTC", param, ctx)
        return found


def home() -> Path:
    """The folder of keys and trust list."""
    from fedipfs.trust import files  # it takes cryptography along

    return files.home()


def list_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The --list option; the command gets it as `path`."""
    return click.option(
        "--list",
        "path",
        type=click.Path(path_type=Path),
        default=lambda: home() / "trust.toml",
        show_default="trust.toml",
        help="The trust list.",
    )(command)


def _file_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument(
        "file", type=click.Path(path_type=Path), default=lambda: home() / "identity.key"
    )(command)


@commands.command()
@click.argument("organization")
@click.option("--out", type=click.Path(path_type=Path), help="The key file to write.")
@click.option("--passphrase", is_flag=True, help="Encrypt it (so does $FEDIPFS_PASSPHRASE).")
def new(organization: str, out: Path | None, passphrase: bool) -> None:
    """Make the keys of an ORGANIZATION and print their fingerprint; nothing is overwritten."""
    from fedipfs.trust import Identity
    from fedipfs.trust.identity import PASSPHRASE

    identity = Identity.new(organization)
    path = out or home() / "identity.key"
    if out is None:
        _make_home()
    if secret := os.environ.get(PASSPHRASE):
        identity.save(path, os.fsencode(secret))
    else:
        identity.save(path, _ask("Passphrase", confirm=True) if passphrase else None)
    click.echo(f"{path}\n{identity.public.fingerprint}")


@commands.command()
@_file_argument
def show(file: Path) -> None:
    """Print the public part of a key FILE, to hand to others. The keys themselves stay in it."""
    click.echo(_public(file).dumps(), nl=False)


@commands.command()
@_file_argument
def fingerprint(file: Path) -> None:
    """Print the fingerprint of a key FILE or a public file, to read out to others."""
    click.echo(_public(file).fingerprint)


@commands.command()
@click.argument("publicfile", type=click.Path(path_type=Path))
@click.option("--role", required=True, type=click.Choice(["coordinator", "participant"]))
@click.option("--from", "start", type=DateType(), help="The first day that the key counts.")
@click.option("--until", "end", type=DateType(), help="The day from which it does not any more.")
@click.option("--fingerprint", "expected", help="What the owner read out; nothing is asked then.")
@click.option("--yes", is_flag=True, help="Do not ask whether the fingerprint was compared.")
@list_option
def trust(
    publicfile: Path,
    role: Any,
    start: datetime | None,
    end: datetime | None,
    expected: str | None,
    yes: bool,
    path: Path,
) -> None:
    """Add the keys in PUBLICFILE, which its owner's `fedipfs keys show` printed, to the list.

    Have the owner read the fingerprint out by telephone or in person first: who could change
    the file on its way would have changed the fingerprint in it, too.
    """
    from fedipfs.errors import TrustListError
    from fedipfs.trust import Member, PublicIdentity, TrustList
    from fedipfs.trust.identity import same_fingerprint

    public = PublicIdentity.load(publicfile)
    known = TrustList.load(path) if path.exists() else TrustList()
    longer = known.trust(Member(public, role, start, end))
    click.echo(f"{public.organization} as {role}: {public.fingerprint}")
    if expected is not None and not same_fingerprint(expected, public.fingerprint):
        raise TrustListError(
            f"{publicfile} has another fingerprint than {expected!r:.80}: do not trust it, "
            "and ask its owner how it could be changed on its way"
        )
    if expected is None and not yes:
        _need_terminal("give --fingerprint TEXT")
        if not click.confirm("Did its owner read this out over another channel?", err=True):
            raise TrustListError(
                "nothing was changed: compare the fingerprint with its owner first"
            )
    if path.parent == home():
        _make_home()
    longer.save(path)


@commands.command()
@click.argument("name", metavar="ORGANIZATION")
@list_option
def revoke(name: str, path: Path) -> None:
    """Let the keys of an ORGANIZATION, or those of one fingerprint, count no more from now on."""
    from fedipfs.trust import TrustList

    before = TrustList.load(path)
    after = before.revoke(name, datetime.now(UTC))
    after.save(path)
    for old, one in zip(before.members, after.members, strict=True):
        if old != one:
            click.echo(f"revoked {one.identity.organization}: {one.identity.fingerprint}")


@commands.command(name="list")
@list_option
@json_option
def list_(path: Path, as_json: bool) -> None:
    """List whose keys are trusted, as what, and until when."""
    from fedipfs.observe.summary import align
    from fedipfs.trust import TrustList

    now = datetime.now(UTC)
    members = TrustList.load(path).members
    if as_json:
        print_json([_entry(member, now) for member in members])
    elif members:
        click.echo("\n".join(align([_row(member, now) for member in members])))


def _entry(member: Member, now: datetime) -> dict[str, str | None]:
    dates = {name: getattr(member, name) for name in ("valid_from", "valid_to", "revoked")}
    return {
        "organization": member.identity.organization,
        "role": member.role,
        "state": member.state(now),
        "fingerprint": member.identity.fingerprint,
        **{name: moment and moment.isoformat() for name, moment in dates.items()},
    }


def _row(member: Member, now: datetime) -> list[str]:
    state = member.state(now)
    word, moment = {
        "revoked": ("revoked", member.revoked),
        "early": ("valid from", member.valid_from),
        "expired": ("expired", member.valid_to),
        "valid": ("valid until" if member.valid_to else "valid", member.valid_to),
    }[state]
    when = f" {moment:%Y-%m-%d %H:%M} UTC" if moment else ""
    who = member.identity
    return [who.organization, member.role, f"{word}{when}", who.fingerprint]


@commands.command()
@click.option("--out", type=click.Path(path_type=Path), help="The file to write, for you alone.")
def swarm(out: Path | None) -> None:
    """Make the key of a private IPFS network: `swarm.key`, the same on every node of it."""
    from fedipfs.errors import KeyFileError
    from fedipfs.trust import files, new_swarm_key

    if out is None:
        click.echo(new_swarm_key(), nl=False)
        return
    try:
        files.write_new(out, new_swarm_key())
    except FileExistsError:
        raise KeyFileError(f"{out} exists and keys are never overwritten: choose another") from None


def _public(path: Path) -> PublicIdentity:
    """The public part of a key file or a public file."""
    from fedipfs.errors import KeyFileError
    from fedipfs.trust import PublicIdentity, files
    from fedipfs.trust.identity import MAX_FILE, PUBLIC_FORMAT

    if PUBLIC_FORMAT in files.read(path, KeyFileError, limit=MAX_FILE):
        return PublicIdentity.load(path)
    return load_identity(path).public


def load_identity(path: Path) -> Identity:
    """The keys in a file, its passphrase from $FEDIPFS_PASSPHRASE or asked for."""
    from fedipfs.trust import Identity

    return Identity.unlock(path, lambda: _ask(f"Passphrase of {path}", confirm=False))


def _ask(prompt: str, confirm: bool) -> bytes:
    """A passphrase that is typed."""
    from fedipfs.trust.identity import PASSPHRASE

    _need_terminal(f"set {PASSPHRASE}")
    secret = click.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)
    return os.fsencode(secret)


def _make_home() -> None:
    home().mkdir(mode=0o700, parents=True, exist_ok=True)


def _need_terminal(instead: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(f"there is no terminal to ask on: {instead}")
