"""`fedipfs runs`: look at past runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedipfs.cli.base import Commands, json_option, print_json
from fedipfs.cli.blocks import DEFAULT, complete_store, open_blocks
from fedipfs.errors import FedIPFSError

if TYPE_CHECKING:
    from fedipfs.observe.runs import Run
    from fedipfs.trust.party import Party


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
@click.option(
    "--store",
    "spec",
    metavar="SPEC",
    shell_complete=complete_store,
    help="Instead of the run's own, as in `fedipfs store`.",
)
@json_option
def runs_show(run: str, runs_dir: Path, spec: str | None, as_json: bool) -> None:
    """Show one RUN (its id, the beginning of it, or its folder): results, rounds, records.

    The records come from the run's store, and are checked and opened with the run's keys.
    """
    from fedipfs.observe import runs as folders
    from fedipfs.observe import show

    found = folders.find(runs_dir, run)
    chain = _Chain()
    if found.head:
        chain.follow(found, found.head, spec)
    if as_json:
        from fedipfs.ipld import dagjson

        chained = [{"cid": cid, "record": dagjson.view(record)} for cid, record in chain.records]
        print_json(
            {
                **found.as_dict(),
                "rounds": found.lines,
                "records": chained,
                "broken": chain.broken,
                "signed_by": chain.signers,
                "signatures_checked": chain.checked,
            }
        )
    else:
        click.echo(show.details(found, chain.records, chain.broken, chain.notes()))


class _Chain:
    """The records of a run, from the last back to the first, as far as they can be had."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.broken = ""  # why the chain ends early
        self.key = ""  # what the signatures were checked with: whose keys, and their fingerprint
        self.unchecked = "the run's keys are not in its folder"  # why they were not

    def follow(self, run: Run, head: str, spec: str | None) -> None:
        """Read them from `head` on, from the store of `spec` or the run's own."""
        from fedipfs.exchange import Vault
        from fedipfs.ipld import CID
        from fedipfs.server.records import chain

        config = run.config
        try:
            blocks = open_blocks(spec or _store_of(config))
            engine = config.get("engine")
            deployed = isinstance(engine, dict) and engine.get("name") == "deploy"
            party = self._party(run.path, config.get("identity"), deployed)
            for cid, record in chain(Vault(blocks, party), CID.parse(head)):
                self.records.append((str(cid), record))
        except (FedIPFSError, OSError) as error:
            self.broken = str(error)

    def _party(self, folder: Path, identity: Any, deployed: bool) -> Party | None:
        from fedipfs.server import parties
        from fedipfs.server.home import Home

        try:
            if deployed:
                party: Party | None = parties.of_federation(Home.load())
            else:
                party = parties.reader(folder, None if identity is None else str(identity))
            if party is not None:
                public = party.identity.public
                self.key = f"{public.organization} ({public.fingerprint})"
            return party
        except (FedIPFSError, OSError) as error:
            self.unchecked = f"the run's keys cannot be used: {error}"
            return None

    @property
    def signers(self) -> list[str]:
        """Who the records say signed them."""
        return sorted({str(record["by"]) for _, record in self.records if "signature" in record})

    @property
    def checked(self) -> bool:
        """Whether the signatures of all these records were found to be good."""
        return bool(self.records) and bool(self.key)

    def notes(self) -> list[str]:
        """A line on the signatures, and one on what stayed sealed."""
        if not self.records:
            return []
        signed = sum("signature" in record for _, record in self.records)
        if self.checked:
            notes = [f"signed by {self.key}; all {signed} signatures are good"]
        elif signed:
            by = ", ".join(f"{name!r:.80}" for name in self.signers)
            count = "" if signed == len(self.records) else f"{signed} of {len(self.records)} are "
            notes = [f"{count}signed by {by}; not checked, as {self.unchecked}"]
        else:
            notes = ["not signed"]
        sealed = sum("details" in record and "updates" not in record for _, record in self.records)
        if sealed:
            notes.append(f"the details of {sealed} rounds are sealed and left out")
        return notes


def _store_of(config: dict[str, Any]) -> Any:
    """The store that a run's configuration names."""
    store = config.get("store")
    return store if isinstance(store, dict) and store else DEFAULT
