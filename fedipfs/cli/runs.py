"""`fedipfs runs`: look at past runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

from fedipfs.cli.base import Commands, json_option, print_json
from fedipfs.cli.store import open_folder
from fedipfs.errors import FedIPFSError


def _complete_run(ctx: click.Context, param: click.Parameter, start: str) -> list[str]:
    from fedipfs.observe import runs as folders

    found = folders.listing(Path(ctx.params.get("runs_dir") or "runs"))
    return [run.id for run in found if run.id.startswith(start)]


runs_dir_option = click.option(
    "--runs-dir",
    default="runs",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The folder that holds the run folders.",
)


@click.group("runs", cls=Commands)
def commands() -> None:
    """Look at past runs."""


@commands.command(name="ls")
@runs_dir_option
@json_option
def runs_ls(runs_dir: Path, as_json: bool) -> None:
    """List runs, the oldest first."""
    from fedipfs.observe import runs as folders
    from fedipfs.observe import show

    found = folders.listing(runs_dir)
    if as_json:
        print_json([run.as_dict() for run in found])
    elif found:
        click.echo(show.listing(found))
    else:
        click.echo(f"no runs in {runs_dir}", err=True)


@commands.command(name="show")
@click.argument("run", shell_complete=_complete_run)
@runs_dir_option
@click.option("--store", "path", type=click.Path(path_type=Path), help="Instead of the run's own.")
@json_option
def runs_show(run: str, runs_dir: Path, path: Path | None, as_json: bool) -> None:
    """Show one RUN (its id, the beginning of it, or its folder): results, rounds, records."""
    from fedipfs.observe import runs as folders
    from fedipfs.observe import show

    found = folders.find(runs_dir, run)
    records: list[tuple[str, dict[str, Any]]] = []
    broken = ""
    if found.head:
        from fedipfs.ipld import CID
        from fedipfs.server.records import chain

        try:
            own = cast("dict[str, Any]", found.config.get("store") or {})
            blocks = open_folder(path or Path(own.get("path") or "runs/store"))
            for cid, record in chain(blocks, CID.parse(found.head)):
                records.append((str(cid), record))
        except FedIPFSError as error:
            broken = str(error)
    if as_json:
        from fedipfs.ipld import dagjson

        chained = [{"cid": cid, "record": dagjson.view(record)} for cid, record in records]
        print_json({**found.as_dict(), "rounds": found.lines, "records": chained, "broken": broken})
    else:
        click.echo(show.details(found, records, broken))
