"""`fedipfs privacy`: what the records at this site may spend, and what they have spent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedipfs.cli.base import Commands, json_option, print_json

if TYPE_CHECKING:
    from fedipfs.privacy.ledger import Ledger, Spend

EXPORT_FORMAT = "fedipfs-ledger-export/v1"
HOW_TO_CHECK = [
    "Write `lines` to a file, each with a newline after it.",
    "SHA-256 of a line with its newline is what the next line has as `previous` (the first has 64 "
    "zeros), and that of the last line is `head`.",
    "A receipt in the record of a run is SHA-256 of one of the lines: all lines up to it were "
    "there then.",
    "Each event is [noise multiplier, sampling rate, steps] of the Poisson-subsampled Gaussian "
    "mechanism. All events of kind `spend`, composed by an accountant at the delta of the last "
    "cap, give the epsilon that was spent.",
]


@click.group("privacy", cls=Commands)
def commands() -> None:
    """Say what the records at this site may spend, and see what they have spent.

    Each data set has a ledger under the FINGERPRINT of its content, which the site's client names
    when there is no ledger yet. Ledgers are in --ledger DIR, else $FEDIPFS_LEDGER, else in
    fedipfs/ledger in the state folder ($XDG_STATE_HOME, else ~/.local/state).
    """


def ledger_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The --ledger option; the command gets it as `folder`."""

    def default() -> Path:
        from fedipfs.privacy.ledger import default_folder

        return default_folder()

    return click.option(
        "--ledger",
        "folder",
        type=click.Path(path_type=Path),
        metavar="DIR",
        default=default,
        show_default="$FEDIPFS_LEDGER, else ~/.local/state/fedipfs/ledger",
        help="The folder of ledgers.",
    )(command)


def cap_options(required: bool) -> Callable[..., Any]:
    """--epsilon, --delta and --accountant."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            accountant_option("prv" if required else None),
            click.option("--delta", type=float, required=required, help="Far below 1 / records."),
            click.option("--epsilon", type=float, required=required, help="What may be spent."),
        ):
            command = option(command)
        return command

    return add


def accountant_option(default: str | None) -> Callable[..., Any]:
    """The --accountant option."""
    return click.option(
        "--accountant",
        type=click.Choice(["prv", "rdp"]),
        default=default,
        show_default=default is not None,
        help="What computes epsilon: prv is tight, rdp is an older and higher bound.",
    )


fingerprint_argument = click.argument("fingerprint")


@commands.command()
@fingerprint_argument
@cap_options(required=True)
@click.option("--unrelated", is_flag=True, help="No record is in a data set that has a ledger.")
@ledger_option
def init(
    fingerprint: str, epsilon: float, delta: float, accountant: str, unrelated: bool, folder: Path
) -> None:
    """Begin a ledger: say what records may spend.

    The cap is for the records of a data set, whoever asks and however often.
    """
    from fedipfs.errors import LedgerError
    from fedipfs.privacy.ledger import Cap, Ledger, ledgers

    others = [each for each in ledgers(folder) if each.fingerprint != fingerprint]
    for other in others:
        if fingerprint in other.fingerprints:
            raise LedgerError(
                f"{fingerprint} is a version of {other.fingerprint}, which has a ledger: change "
                "its cap with `fedipfs privacy cap`"
            )
    if others and not unrelated:
        raise LedgerError(
            f"{folder} has ledgers of other data sets, such as {others[0].fingerprint}: if this is "
            "another version of one of them, use `fedipfs privacy adopt`, or records that are in "
            "both get a second budget; if it shares no record with them, add --unrelated"
        )
    ledger = Ledger.create(folder, fingerprint, Cap(epsilon, delta, accountant))
    click.echo(f"{ledger.fingerprint}: {ledger.cap}")


@commands.command()
@fingerprint_argument
@cap_options(required=False)
@ledger_option
def cap(
    fingerprint: str,
    epsilon: float | None,
    delta: float | None,
    accountant: str | None,
    folder: Path,
) -> None:
    """Change the cap; what was spent stays spent."""
    from fedipfs.privacy.ledger import Cap, Ledger

    if epsilon is None and delta is None and accountant is None:
        raise click.UsageError(
            "there is nothing to change: give --epsilon, --delta or --accountant"
        )
    ledger = Ledger.open(folder, fingerprint)
    old = ledger.cap
    ledger.set_cap(
        Cap(
            old.epsilon if epsilon is None else epsilon,
            old.delta if delta is None else delta,
            accountant or old.accountant,
        )
    )
    click.echo(f"{ledger.fingerprint}: {ledger.cap} (before: {old})")


@commands.command()
@fingerprint_argument
@click.argument("version")
@ledger_option
def adopt(fingerprint: str, version: str, folder: Path) -> None:
    """Let a VERSION of a data set spend from its ledger.

    VERSION is the fingerprint of a data set that has records in common with the one that has the
    ledger, under FINGERPRINT.
    """
    from fedipfs.privacy.ledger import Ledger

    ledger = Ledger.open(folder, fingerprint)
    ledger.adopt(version)
    click.echo(f"{version} spends from the ledger of {ledger.fingerprint}")


@commands.command()
@click.argument("fingerprint", required=False)
@ledger_option
@json_option
def show(fingerprint: str | None, folder: Path, as_json: bool) -> None:
    """Show what was spent, and by which runs.

    Of the data set with this FINGERPRINT, or of all. The epsilon of a run is what it would have
    cost alone; together they cost less than the sum.
    """
    from fedipfs.privacy.ledger import Ledger, ledgers

    found = ledgers(folder) if fingerprint is None else [Ledger.open(folder, fingerprint)]
    accounts = [_account(ledger) for ledger in found]
    if as_json:
        print_json(accounts)
    elif accounts:
        click.echo("\n\n".join(map(_text, accounts)))
    else:
        click.echo(f"{folder} has no ledgers: see `fedipfs privacy init --help`")


def _account(ledger: Ledger) -> dict[str, Any]:
    from fedipfs.privacy.accounting import ACCOUNTANTS

    runs: dict[tuple[str, str], list[Spend]] = {}
    for spend in ledger.spends:
        runs.setdefault((spend.run, spend.coordinator), []).append(spend)
    return {
        "fingerprint": ledger.fingerprint,
        "versions": list(ledger.fingerprints[1:]),
        "cap": ledger.cap._asdict(),
        "spent": {name: finite(ledger.epsilon(name)) for name in ACCOUNTANTS},
        "remaining": ledger.remaining(),
        "runs": [_run(ledger, spends) for spends in runs.values()],
    }


def _run(ledger: Ledger, spends: list[Spend]) -> dict[str, Any]:
    from fedipfs.privacy.accounting import epsilon, merged

    cap = ledger.cap
    history = merged(event for spend in spends for event in spend.events)
    return {
        "run": spends[0].run,
        "coordinator": spends[0].coordinator,
        "rounds": len({spend.round for spend in spends}),
        "epsilon": finite(epsilon(history, cap.delta, cap.accountant)),
        "last": spends[-1].time,
    }


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if value < float("inf") else None


def _text(account: dict[str, Any]) -> str:
    from fedipfs.observe.summary import align, metric

    cap, spent = account["cap"], account["spent"]
    other = "rdp" if cap["accountant"] == "prv" else "prv"
    rows = [
        ["cap", f"epsilon {cap['epsilon']:g} at delta {cap['delta']:g}, by {cap['accountant']}"],
        ["spent", f"{metric(spent[cap['accountant']])} ({other}: {metric(spent[other])})"],
        ["left", metric(account["remaining"])],
        *(["also for", version] for version in account["versions"]),
    ]
    lines = [account["fingerprint"], *align(rows)]
    if runs := account["runs"]:
        headings = ["run", "coordinator", "rounds", "epsilon alone", "last (UTC)"]
        table = [
            [
                run["run"],
                run["coordinator"],
                str(run["rounds"]),
                metric(run["epsilon"]),
                run["last"][:16].replace("T", " "),
            ]
            for run in runs
        ]
        lines += ["", *align([headings, *table])]
    return "\n  ".join(lines).replace("\n  \n", "\n\n")


@commands.command()
@fingerprint_argument
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The file to write, a new one.")
@ledger_option
def export(fingerprint: str, out: Path | None, folder: Path) -> None:
    """Print a ledger for an auditor, and how to check it."""
    import hashlib
    import json

    from fedipfs.errors import LedgerError
    from fedipfs.privacy.ledger import Ledger
    from fedipfs.trust import files

    ledger = Ledger.open(folder, fingerprint)
    lines = ledger.lines
    fields = {
        "format": EXPORT_FORMAT,
        "how_to_check": HOW_TO_CHECK,
        **_account(ledger),
        "head": hashlib.sha256(f"{lines[-1]}\n".encode()).hexdigest(),
        "lines": lines,
    }
    if out is None:
        print_json(fields)
        return
    try:
        files.write_new(out, json.dumps(fields, indent=2) + "\n")
    except FileExistsError:
        raise LedgerError(f"{out} exists and is not overwritten: choose another name") from None
