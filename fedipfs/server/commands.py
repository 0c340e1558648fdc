"""`fedipfs-server init`, `admit`, `members`, `remove`, `renew`, `up`, `app`: a federation's own.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedipfs.errors import ConfigError, FedIPFSError, JoinRefused, RunFailed

if TYPE_CHECKING:
    from fedipfs.server.membership import Entry, Home, Registry

PROGRAM = "fedipfs-server"
_SITES = "a folder for each member's federation file"


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv`, whose first word is a command's name; returns the exit code."""
    try:
        code = app.main(args=list(argv), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except FedIPFSError as error:
        return _complain(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 2)


def _complain(text: str, code: int = 0) -> int:
    print(f"{PROGRAM}: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def app() -> None:
    """The coordinator of a federation of real partners.

    Files are in $FEDIPFS_HOME, else ~/.fedipfs. A passphrase of identity.key is asked for, or
    taken from $FEDIPFS_PASSPHRASE.
    """


def home_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The --home option; the command gets a Path, or None for the usual place."""
    return click.option(
        "--home",
        "folder",
        type=click.Path(path_type=Path),
        help="The coordinator's folder.  [default: $FEDIPFS_HOME, else ~/.fedipfs]",
    )(command)


def _out_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        default=Path(),
        help="The folder for the federation file.  [default: this one]",
    )(command)


@app.command()
@click.option("--host", required=True, help="The name or address at which partners dial.")
@click.option("--org", "organization", help="The organization's name.  [default: the host]")
@click.option("--port", type=int, default=9092, show_default=True, help="... and the port.")
@click.option("--http-port", type=int, default=8000, show_default=True, help="On loopback only.")
@click.option("--bind", default="0.0.0.0", show_default=True, help="Where to listen for partners.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="MULTIADDR",
    help="Where partners' IPFS nodes find the coordinator's, with its id; repeat it for more.",
)
@home_option
def init(
    host: str,
    organization: str | None,
    port: int,
    http_port: int,
    bind: str,
    peers: tuple[str, ...],
    folder: Path | None,
) -> None:
    """Make the coordinator's folder: keys, certificates, trust list. Nothing is overwritten."""
    from fedipfs.server.membership import Home
    from fedipfs.trust import TrustList, tls

    home = Home.create(
        folder,
        host=host,
        organization=organization,
        fleet_port=port,
        http_port=http_port,
        bind=bind,
        peers=peers,
        ask=_passphrase,
    )
    (own,) = TrustList.load(home.trust).members
    click.echo(f"{home.path}: keys and certificates of {home.organization}; keep a copy of it")
    click.echo(f"partners dial {home.address}; the certificate ends {_when(_ends(home))}")
    if tls.LOOPBACK.count(home.host):
        click.echo("(only this machine can dial that)")
    click.echo("read this fingerprint out to every partner, by telephone or in person:")
    click.echo(f"  {own.identity.fingerprint}")
    click.echo(f"next: {PROGRAM} admit FILE, with the join file that a partner sends")


@app.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--fingerprint", "expected", help="What the partner read out; nothing is asked then.")
@click.option("--yes", is_flag=True, help="Do not ask whether the fingerprint was compared.")
@_out_option
@home_option
def admit(file: Path, expected: str | None, yes: bool, out: Path, folder: Path | None) -> None:
    """Let the organization in that sent the join FILE, and write its federation file.

    Have it read its fingerprint out by telephone or in person first: who could change the file
    on its way would have changed the fingerprint in it, too.
    """
    from fedipfs.server.membership import Home, Registry, federation_of
    from fedipfs.trust import Identity, joining
    from fedipfs.trust.identity import same_fingerprint
    from fedipfs.trust.joining import JoinRequest

    registry = Registry.open(Home.load(folder))
    request = JoinRequest.load(file)
    request.check_age(joining.now())
    before = {each.number: each for each in registry.members}
    entry = registry.consider(request)
    who = request.identity
    click.echo(f"{who.organization}{_as_what(entry, before.get(entry.number))}:")
    click.echo(f"  {who.fingerprint}")
    if expected is not None and not same_fingerprint(expected, who.fingerprint):
        raise JoinRefused(
            f"{file} has another fingerprint than {expected!r:.80}: do not admit it, and ask "
            f"{who.organization} how it could be changed on its way"
        )
    if expected is None and not yes:
        _ask("Did the partner read this out over another channel?", "give --fingerprint TEXT")
    keys = Identity.unlock(registry.home.identity, _passphrase)
    entry = registry.admit(request)
    try:
        _synchronise(registry)
    except RunFailed as error:
        _complain(f"warning: {error}; it hears of this when it starts again")
    federation = federation_of(registry, entry, keys.public)
    path = _write(out, federation.organization, federation.dumps(keys))
    click.echo(f"{entry.organization} is member {entry.number}")
    click.echo(f"wrote {path}: send it to {entry.organization}, and read this fingerprint out:")
    click.echo(f"  {keys.public.fingerprint}")
    if len(registry.active) > 1:
        _say_others()


@app.command()
@click.option("--write", type=click.Path(path_type=Path), metavar="DIR", help=f"Write {_SITES}.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
@home_option
def members(write: Path | None, as_json: bool, folder: Path | None) -> None:
    """List the members, and who of them is connected."""
    from fedipfs.observe.summary import align
    from fedipfs.server.membership import Home, Registry

    registry = Registry.open(Home.load(folder))
    states = _states(registry)
    ends = _ends(registry.home)
    if as_json:
        import json

        listed = [_entry(each, states) for each in registry.members]
        found = {"certificate_ends": ends.isoformat(), "members": listed}
        click.echo(json.dumps(found, indent=2))
    else:
        head = ["number", "organization", "state", "node", "fingerprint"]
        rows = [_row(each, states) for each in registry.members]
        if rows:
            click.echo("\n".join(align([head, *rows])))
        else:
            click.echo(f"no members yet; admit them with {PROGRAM} admit FILE")
        click.echo(f"the server's certificate ends {_when(ends)}")
    _warn(ends)
    if write is not None:
        _write_all(registry, write, quiet=as_json)


@app.command()
@click.option(
    "--flwr-run",
    "others",
    is_flag=True,
    help="Do what `flwr run` submits, too. Its settings can name any file and any task of this "
    "machine, and whoever reaches the Control API can submit them.",
)
@home_option
def up(others: bool, folder: Path | None) -> None:
    """Keep the SuperLink up, so that partners stay connected between runs; until Ctrl-C."""
    import signal

    from fedipfs.server.engine.control import Control
    from fedipfs.server.engine.superlink import Supervisor
    from fedipfs.server.membership import Home, Registry, synchronise

    home = Home.load(folder)
    # Also while it starts: its processes are not to outlive this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Supervisor(home, others=others) as supervisor:
        with Control.reach(home) as control:
            for line in synchronise(Registry.open(home), control) if control else ():
                click.echo(line)
        click.echo(f"up: partners dial {home.address}; logs are in {home.path / 'logs'}")
        _warn(_ends(home))
        supervisor.wait()


@app.command(name="app")
@click.argument("directory", type=click.Path(path_type=Path))
def app_(directory: Path) -> None:
    """Write the Flower app that stands for FedIPFS to a DIRECTORY, for `flwr run`."""
    from fedipfs.server.submission import app_files

    directory.mkdir(parents=True)
    for name, content in app_files().items():
        (directory / name).write_bytes(content)
    click.echo(f"wrote {directory}; see docs/partners.md for `flwr run {directory}`")


@app.command()
@click.argument("name", metavar="ORGANIZATION")
@click.option("--yes", is_flag=True, help="Do not ask.")
@home_option
def remove(name: str, yes: bool, folder: Path | None) -> None:
    """End the membership of an ORGANIZATION: revoke its keys and shut its node out, at once."""
    from fedipfs.server.membership import Home, Registry

    registry = Registry.open(Home.load(folder))
    entry = registry.find(name)
    click.echo(f"{name}, member {entry.number}: {entry.identity.fingerprint}")
    if not yes and not entry.removed:
        _ask(f"Remove {name}?", "give --yes")
    if not entry.removed:  # else the SuperLink may not have heard of it
        entry = registry.remove(name)
    click.echo(f"{name} is removed, and its keys are revoked, since {_when(entry.removed)}")
    try:
        _synchronise(registry)
    except RunFailed as error:
        raise RunFailed(f"{error}; then run this again, to shut its node out, too") from error
    if registry.active:
        _say_others()


@app.command()
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True)
@home_option
def renew(days: int, folder: Path | None) -> None:
    """Make a new server certificate, of the same authority: partners need nothing new."""
    from fedipfs.server.membership import Home

    home = Home.load(folder)
    before = _ends(home) if home.certificate.exists() else None
    home.renew(days)
    ends = _ends(home)
    if before is not None:
        click.echo(f"the last certificate ends {_when(before)}")
    click.echo(f"wrote {home.certificate}, for {home.host}: it ends {_when(ends)}")
    click.echo("a SuperLink that is running goes on with the last one: restart it")
    _warn(ends)


def _as_what(entry: Entry, before: Entry | None) -> str:
    if before is None:
        return f" would be member {entry.number}, with the fingerprint"
    if before.removed:
        return f", removed {_when(before.removed)}, would be member {entry.number} again"
    if before.node_key == entry.node_key:
        return f" is member {entry.number} already"
    return f" is member {entry.number} already; its SuperNode has a new key, the old is shut out"


def _ask(question: str, instead: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(f"there is no terminal to ask on: {instead}")
    if not click.confirm(question, err=True):
        raise JoinRefused("nothing was changed")


def _passphrase() -> bytes:
    from fedipfs.trust.identity import PASSPHRASE

    if not sys.stdin.isatty():
        raise click.UsageError(f"there is no terminal to ask on: set {PASSPHRASE}")
    return os.fsencode(click.prompt("Passphrase of identity.key", hide_input=True, err=True))


def _synchronise(registry: Registry) -> None:
    """Tell the SuperLink, if it is up, who is a member."""
    from fedipfs.server.engine.control import Control
    from fedipfs.server.membership import synchronise

    with Control.reach(registry.home) as control:
        if control is None:
            click.echo("(no SuperLink is running: it hears of this when it starts)")
            return
        for line in synchronise(registry, control):
            click.echo(line)


def _states(registry: Registry) -> dict[str, str] | None:
    """How the SuperLink finds each node, by its key; None where none is running."""
    from fedipfs.server.engine.control import Control

    try:
        with Control.reach(registry.home) as control:
            found = control.nodes() if control is not None else None
    except RunFailed as error:
        _complain(f"warning: {error}")
        found = None
    return None if found is None else {node.public_key: node.status for node in found}


def _entry(entry: Entry, states: dict[str, str] | None) -> dict[str, Any]:
    node = None if states is None else states.get(entry.node_key)
    return {
        "number": entry.number,
        "organization": entry.organization,
        "fingerprint": entry.identity.fingerprint,
        "admitted": entry.admitted.isoformat(),
        "removed": entry.removed and entry.removed.isoformat(),
        "node_id": entry.node_id,
        "connected": None if states is None else node == "online",
    }


def _row(entry: Entry, states: dict[str, str] | None) -> list[str]:
    state = f"since {_when(entry.admitted)}"
    if entry.removed:
        state = f"removed {_when(entry.removed)}"
    node = "no SuperLink" if states is None else states.get(entry.node_key, "not registered")
    if entry.removed and node != "online":
        node = "-"
    return [str(entry.number), entry.organization, state, node, entry.identity.fingerprint]


def _write_all(registry: Registry, folder: Path, quiet: bool) -> None:
    from fedipfs.server.membership import federation_of
    from fedipfs.trust import Identity

    keys = Identity.unlock(registry.home.identity, _passphrase)
    folder.mkdir(parents=True, exist_ok=True)
    for entry in registry.active:
        text = federation_of(registry, entry, keys.public).dumps(keys)
        path = _write(folder, entry.organization, text)
        if not quiet:
            click.echo(f"wrote {path}")


def _write(folder: Path, organization: str, text: str) -> Path:
    from fedipfs.trust import files

    path = folder / f"{organization}.federation.json"
    if path.is_symlink():  # in a folder of others it could lead anywhere
        path.unlink()
    files.write_whole(path, text)
    return path


def _say_others() -> None:
    click.echo(f"the others' federation files changed, too: {PROGRAM} members --write DIR")


def _ends(home: Home) -> datetime:
    from fedipfs.trust import files, tls

    text = files.read(home.certificate, ConfigError, limit=1 << 16, ours=True)
    return tls.ends(text, str(home.certificate))


def _warn(ends: datetime) -> None:
    from fedipfs.trust import tls

    if words := tls.warning(ends, datetime.now(UTC)):
        _complain(f"warning: {words}")


def _when(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "-"
