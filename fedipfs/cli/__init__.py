"""The `fedipfs` command: look into stores and past runs, examine them, keep keys, start a run.

Nothing heavy is imported before a command needs it, so that `--help` and completion are quick.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import click

from fedipfs.cli import doctor, keys, planning, privacy, runs, store
from fedipfs.cli.base import Commands
from fedipfs.errors import FedIPFSError

_PATIENCE_S = 1.0  # after an interrupt, for threads that wait for a service


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default); returns the exit code."""
    if ours := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        code = app.main(args=argv, prog_name="fedipfs", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except FedIPFSError as error:
        return _complain(str(error), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 2)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Stop in good order, but soon: Python would wait for threads for as long as a timeout."""
    end = threading.Timer(_PATIENCE_S, _exit_at_once)
    end.daemon = True
    end.start()
    raise KeyboardInterrupt


def _exit_at_once() -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a progress bar may have hidden the cursor
    os._exit(130)


def _complain(text: str, code: int) -> int:
    print(f"fedipfs: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedipfs", message="fedipfs %(version)s")
def app() -> None:
    """Federated learning on Flower in which only content identifiers travel.

    Start a run with `fedipfs server +experiment=mnist`.
    """


@app.command(
    short_help="Run a federation (python -m fedipfs.server).",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def server(arguments: tuple[str, ...]) -> None:
    """Run a federation: all ARGUMENTS go to `python -m fedipfs.server`.

    Its own help: fedipfs server --help
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "fedipfs.server", *arguments])


@app.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a SHELL.

    bash: eval "$(fedipfs completion bash)"
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(app, {}, "fedipfs", "_FEDIPFS_COMPLETE").source())


app.add_command(doctor.doctor)
app.add_command(keys.commands)
app.add_command(privacy.commands)
privacy.commands.add_command(planning.plan)
app.add_command(runs.commands)
app.add_command(store.commands)
