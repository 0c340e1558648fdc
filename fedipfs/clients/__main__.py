"""The `fedipfs-client` command: join a federation, look at one's own data, take part.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedipfs.clients.ending import Stopped, on_leash, stop_on_signals
from fedipfs.clients.home import LOOPBACK, VARIABLE, Home
from fedipfs.errors import FedIPFSError

if TYPE_CHECKING:
    from fedipfs.clients.site import SiteFile

PROGRAM = "fedipfs-client"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default); returns the exit code."""
    try:
        code = app.main(args=argv, prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Stopped as stopped:
        return stopped.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FedIPFSError as error:
        return _complain(str(error), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 2)


def _complain(text: str, code: int) -> int:
    print(f"{PROGRAM}: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _site(config: Path | None, overrides: Sequence[str]) -> SiteFile:
    from fedipfs.clients.site import SiteFile

    return SiteFile.load(config, None, overrides)


def _logging() -> None:
    logging.basicConfig(
        level=os.environ.get("FEDIPFS_LOG", "INFO"), format="%(message)s", stream=sys.stdout
    )
    for name in ("httpx", "httpcore", "urllib3", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _use_home(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        os.environ[VARIABLE] = str(value.expanduser().absolute())


home_option = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    callback=_use_home,
    expose_value=False,
    is_eager=True,
    help="The site's folder.  [default: $FEDIPFS_HOME, else ~/.fedipfs]",
)
config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The site's configuration.  [default: site.yaml in the site's folder]",
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
port_option = click.option("--port", type=int, required=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedipfs", message="fedipfs %(version)s")
def app() -> None:
    """Take part in a federation with data that stay here.

    init, join, edit site.yaml, check, run: in this order.
    """


@app.command()
@click.option("--org", "organization", required=True, help="The organization's name.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="The folder for the join file.",
)
@home_option
def init(organization: str, out: Path) -> None:
    """Make this site's keys and configuration, and the file to join with."""
    from fedipfs.clients import joining

    joining.init(Home.default().path, organization, out, say=click.echo, ask=_passphrase)


@app.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--fingerprint", help="The coordinator's, as you got it over another channel.")
@home_option
def join(file: Path, fingerprint: str | None) -> None:
    """Take the coordinator's answer, a federation FILE."""
    from fedipfs.clients import joining

    def confirm(question: str) -> bool:
        return click.confirm(question, default=False)

    joining.join(
        Home.default().path,
        file,
        fingerprint=fingerprint,
        confirm=confirm if sys.stdin.isatty() else None,
        say=click.echo,
        ask=_passphrase,
    )


@app.command()
@overrides_argument
@config_option
@home_option
def check(overrides: tuple[str, ...], config: Path | None) -> None:
    """Show what training would see of the data; nothing leaves."""
    from fedipfs.clients import checking

    site = _site(config, overrides)
    with _in_its_folder(site):
        click.echo(str(checking.check(site)))


@app.command()
@overrides_argument
@config_option
@home_option
def run(overrides: tuple[str, ...], config: Path | None) -> None:
    """Take part: keep worker, SuperNode and stub up until Ctrl-C."""
    from fedipfs.clients.running import run_site
    from fedipfs.trust import Identity

    stop_on_signals()
    site = _site(config, overrides)
    _checked(site)
    secret = None
    if Identity.is_encrypted(site.home.identity) and "FEDIPFS_PASSPHRASE" not in os.environ:
        secret = _passphrase().decode() if sys.stdin.isatty() else None
    words = _words(overrides, config)
    with _in_its_folder(site):
        run_site(site, _say, words=words, passphrase=secret)


@app.command()
@overrides_argument
@config_option
@home_option
def node(overrides: tuple[str, ...], config: Path | None) -> None:
    """Keep SuperNode and stub up, beside a worker that runs as another user."""
    from fedipfs.clients.running import run_node

    stop_on_signals()
    site, words = _site(config, overrides), _words(overrides, config)
    with _in_its_folder(site):
        run_node(site, _say, words=words)


@app.command()
@overrides_argument
@config_option
@home_option
def worker(overrides: tuple[str, ...], config: Path | None) -> None:
    """Be the worker: the only process that has the keys and reads the data."""
    stop_on_signals()
    on_leash()
    _logging()
    site = _site(config, overrides)
    _checked(site)
    from fedipfs.clients.resident import serve  # it takes torch along

    with _in_its_folder(site):
        serve(site)


@app.command()
@click.option("--verify", is_flag=True, help="Only say whether all lines are as they were written.")
@home_option
def log(verify: bool) -> None:
    """Print what was asked of this site and what it did, checking every line."""
    from fedipfs.clients import activity

    path = Home.default().activity
    if verify:
        click.echo(f"{path}: {activity.verify(path)} lines, all as they were written")
        return
    for entry in activity.entries(path):
        click.echo(f"{entry.time.astimezone():%Y-%m-%d %H:%M:%S} {entry.event} {entry.told()}")


@app.command(hidden=True)
@overrides_argument
@config_option
@port_option
@home_option
def supernode(overrides: tuple[str, ...], config: Path | None, port: int) -> None:
    """Be the SuperNode."""
    on_leash(signal.SIGTERM)  # it then says good-bye to the SuperLink
    from fedipfs.clients.node import supernode as be_supernode

    site = _site(config, overrides)
    be_supernode(site.home, site.federation(), port, site.node.poll_s)


@app.command(hidden=True)
@overrides_argument
@config_option
@port_option
@home_option
def stub(overrides: tuple[str, ...], config: Path | None, port: int) -> None:
    """Be the stub."""
    stop_on_signals()
    on_leash()
    _logging()
    from fedipfs.clients.node import Stub

    Stub(Home.default(), f"{LOOPBACK}:{port}").run()


def _checked(site: SiteFile) -> None:
    """Raise what is wrong with a site's configuration before anything is started."""
    _ = site.data, site.policy, site.federation()


@contextlib.contextmanager
def _in_its_folder(site: SiteFile) -> Iterator[None]:
    """Work where site.yaml is, wherever one was: there begin the names of tasks' files.

    What the environment names is still what it was, for children too.
    """
    if os.environ.get(VARIABLE):
        os.environ[VARIABLE] = str(site.home.path)
    for name in ("FEDIPFS_LEDGER", "FEDIPFS_DATA"):
        if found := os.environ.get(name):
            os.environ[name] = os.path.abspath(found)
    if found := os.environ.get("PYTHONPATH"):
        paths = [os.path.abspath(each) for each in found.split(os.pathsep) if each]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    with contextlib.chdir(site.path.parent):
        yield


def _words(overrides: Sequence[str], config: Path | None) -> list[str]:
    """The options that give a child the same site; its folder is in the environment."""
    return [*(["--config", str(config.absolute())] if config else []), "--", *overrides]


def _passphrase() -> bytes:
    return os.fsencode(click.prompt("passphrase of identity.key", hide_input=True, err=True))


if __name__ == "__main__":
    sys.exit(main())
