"""`fedipfs privacy plan`: what a run would cost, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedipfs.cli.base import json_option, print_json
from fedipfs.cli.privacy import accountant_option, finite, ledger_option

if TYPE_CHECKING:
    from fedipfs.privacy.ledger import Ledger
    from fedipfs.privacy.plan import Work

_POSITIVE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("fingerprint", required=False)
@click.option("--epsilon", type=_POSITIVE, help="What the run may cost.")
@click.option("--noise-multiplier", type=_POSITIVE, help="The noise, in clipping norms.")
@click.option("--rounds", type=_COUNT, help="The rounds of the run.")
@click.option("--examples", type=_COUNT, required=True, help="How many examples a client has.")
@click.option("--batch-size", type=_COUNT, required=True, help="The expected size of a batch.")
@click.option("--epochs", type=_COUNT, default=1, show_default=True, help="Epochs a round.")
@click.option("--steps", type=_COUNT, help="Steps a round, instead of epochs.")
@click.option("--delta", type=_POSITIVE, help="The cap's, else at most 1 / (10 examples).")
@accountant_option(None)
@ledger_option
@json_option
def plan(
    fingerprint: str | None,
    epsilon: float | None,
    noise_multiplier: float | None,
    rounds: int | None,
    examples: int,
    batch_size: int,
    epochs: int,
    steps: int | None,
    delta: float | None,
    accountant: str | None,
    folder: Path,
    as_json: bool,
) -> None:
    """Work out what a run would cost, before it begins.

    Two of --epsilon, --noise-multiplier and --rounds give the third. With a FINGERPRINT, also what
    its data set would have spent after the run; where the cap does not allow that, the exit code
    is 3.
    """
    from fedipfs.errors import BudgetSpent
    from fedipfs.privacy import plan as plans
    from fedipfs.privacy.ledger import Ledger

    if sum(value is not None for value in (epsilon, noise_multiplier, rounds)) != 2:
        raise click.UsageError("give two of --epsilon, --noise-multiplier and --rounds")
    ledger = None if fingerprint is None else Ledger.open(folder, fingerprint)
    delta = delta or (ledger.cap.delta if ledger else plans.default_delta(examples))
    accountant = accountant or (ledger.cap.accountant if ledger else "prv")
    train = {"batch_size": batch_size, "epochs": epochs, "steps": steps}
    work = plans.work(train, examples=examples)
    planned = plans.plan(
        work.cost(delta, accountant),
        rounds=rounds,
        epsilon_target=epsilon,
        noise_multiplier=noise_multiplier,
        delta=delta,
    )
    fields = {
        "epsilon": planned.epsilon,
        "delta": delta,
        "accountant": accountant,
        "noise_multiplier": planned.noise_multiplier,
        "rounds": planned.rounds,
        "steps_per_round": work.steps,
        "sample_rate": work.sample_rate,
    }
    if ledger:
        fields |= _after(ledger, planned.noise_multiplier, work, planned.rounds)
    if as_json:
        print_json(fields)
    else:
        click.echo("\n".join(_planned(fields)))
    if ledger and not fields["allowed"]:
        raise BudgetSpent(
            f"the cap, {ledger.cap}, allows {fields['rounds_allowed']} of these rounds: plan fewer "
            "of them or more noise"
        )


def _after(ledger: Ledger, noise: float, work: Work, rounds: int) -> dict[str, Any]:
    """What the data set would have spent in all after a run."""
    from fedipfs.privacy.accounting import epsilon, merged, most_steps

    cap, history = ledger.cap, ledger.history
    run = work.history(noise, rounds)
    total = epsilon(merged([*history, *run]), cap.delta, cap.accountant)
    steps = most_steps(
        history,
        noise,
        work.sample_rate,
        epsilon=cap.epsilon,
        delta=cap.delta,
        accountant=cap.accountant,
    )
    return {
        "total": finite(total),
        "cap": cap._asdict(),
        "allowed": total <= cap.epsilon,
        "rounds_allowed": steps // work.steps,
    }


def _planned(fields: dict[str, Any]) -> list[str]:
    from fedipfs.observe.summary import align, metric

    rows = [
        ["epsilon", f"{metric(fields['epsilon'])} at delta {fields['delta']:g}"],
        ["noise multiplier", metric(fields["noise_multiplier"])],
        ["rounds", str(fields["rounds"])],
        ["steps a round", str(fields["steps_per_round"])],
        ["sampling rate", metric(fields["sample_rate"])],
    ]
    if "cap" in fields:
        cap = fields["cap"]
        rows.append(["in all", f"{metric(fields['total'])} of {cap['epsilon']:g} that are allowed"])
    return align(rows)
