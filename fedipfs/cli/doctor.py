"""`fedipfs doctor`: is what a run would use fit for it?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fedipfs.cli.base import json_option, print_json
from fedipfs.cli.blocks import DEFAULT, complete_store
from fedipfs.errors import ConfigError

if TYPE_CHECKING:
    from fedipfs.store.doctor import Check, Finding

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
_MEANS = {
    "none": "nothing is sealed: whoever reaches the store can read updates and models",
    "updates": "updates are sealed, models are not: whoever reaches the store can read those",
    "all": "updates, models and the details of rounds are sealed to their recipients",
}


@click.command()
@click.argument("words", nargs=-1)
@click.option(
    "--store", "spec", metavar="SPEC", shell_complete=complete_store, help="As in `fedipfs store`."
)
@json_option
@click.pass_context
def doctor(ctx: click.Context, words: tuple[str, ...], spec: str | None, as_json: bool) -> None:
    """Examine what a run would use, and say how to mend it.

    That is its store and its keys. WORDS are the run's: fedipfs doctor +experiment=mnist
    store=kubo. Without any it is the store of --store, else of $FEDIPFS_STORE, else runs/store.
    What is written to try a store is taken away again. Exits with 2 if there is a problem.
    """
    if words and spec:
        raise click.UsageError("give the words of a run or --store, not both")
    from fedipfs.store.doctor import examine

    findings: list[Finding] = []
    for finding in examine(_checks(words, spec)):
        findings.append(finding)
        if not as_json:
            click.echo(_line(finding))
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    if as_json:
        found = [asdict(finding) for finding in findings]
        print_json({"problems": problems, "warnings": warnings, "findings": found})
    else:
        click.echo(f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}")
    ctx.exit(2 if problems else 0)


def _checks(words: Sequence[str], spec: str | None) -> Iterator[Check]:
    """Those of the settings, then of the store, then of the keys."""
    from fedipfs.cli import doctor_keys
    from fedipfs.store.doctor import Check, checks

    identity = os.environ.get("FEDIPFS_IDENTITY")
    if words:
        values = composed(words)
        yield Check("run", "settings", lambda: _settings(values))
        identity = values.get("identity") or identity
        yield from checks(values.get("store") or {})
    else:
        store = spec or os.environ.get("FEDIPFS_STORE") or DEFAULT
        yield Check("run", "sealing", lambda: _sealing(store))
        yield from checks(store)
    trust = os.environ.get("FEDIPFS_TRUST")
    yield from doctor_keys.checks(identity and str(identity), trust, alone=not words)


def composed(words: Sequence[str]) -> dict[str, Any]:
    """The unchecked configuration of a run with these words. Raises ConfigError."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from fedipfs.server.words import problem_of, resolved

    try:
        with initialize_config_module("fedipfs.conf", version_base="1.3"):
            return resolved(compose("config", list(words)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(problem_of(error)) from None


def _settings(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Would the run start with these settings, and what would it seal?"""
    from fedipfs.server import settings
    from fedipfs.store.doctor import Finding

    checked = settings.check(values)
    yield Finding("run", "settings", "ok", "its settings are complete and fit together")
    yield _means(checked["seal"])


def _sealing(spec: str) -> Iterator[Finding]:
    """What an app with this environment would seal."""
    from fedipfs.exchange import choose_seal
    from fedipfs.store import is_shared
    from fedipfs.store.doctor import Finding

    try:
        shared = is_shared(spec)
    except ConfigError:  # said of the store
        return
    asked, because = map(os.environ.get, ("FEDIPFS_SEAL", "FEDIPFS_UNSEALED_BECAUSE"))
    seal = choose_seal(asked, shared=shared, because=because)
    if seal != "none" and not all(map(os.environ.get, ("FEDIPFS_IDENTITY", "FEDIPFS_TRUST"))):
        text = f"seal={seal}, and no keys are named: a Flower app would refuse to start"
        remedy = "set FEDIPFS_IDENTITY and FEDIPFS_TRUST where it runs (docs/trust.md)"
        yield Finding("run", "sealing", "warning", text, remedy)
        return
    yield _means(seal)


def _means(seal: str) -> Finding:
    from fedipfs.store.doctor import Finding

    return Finding("run", "sealing", "ok", f"seal={seal}: {_MEANS[seal]}")


def _line(finding: Finding) -> str:
    level = click.style(f"{finding.level:<8}", fg=_COLOURS[finding.level])
    text = " ".join(f"{finding.text}; {finding.remedy}".removesuffix("; ").split())
    return f"{level} {f'{finding.part} {finding.check}':<16} {text}"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
