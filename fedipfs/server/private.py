"""What a run's privacy comes to before its first round: planned, checked, and told to the user."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.serverapp.strategy import Strategy

from fedipfs import tasks
from fedipfs.data import Dataset
from fedipfs.errors import ConfigError, RunFailed
from fedipfs.exchange import from_torch
from fedipfs.server.spending import Price, by_accountants
from fedipfs.store import is_shared
from fedipfs.strategies import Brief

if TYPE_CHECKING:
    from fedipfs.privacy.plan import Plan
    from fedipfs.secagg import Parameters as Masks

Masking = Callable[[int, int], "Masks"]

_WEAK = 10.0  # an epsilon beyond says next to nothing: odds may change by e^10, 22 000 times


@dataclass
class Privacy:
    """The section `privacy`, complete, the rounds that it allows, and what the user is told.

    `strategy` is the run's as this level of privacy needs it; where clients pay, `price` is as
    OfClients takes it, and `masks` gives the parameters of a session of secure aggregation with
    noise, by the sizes of cohort and model.
    """

    section: dict[str, Any]
    rounds: int
    strategy: Strategy
    told: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    price: Price | None = None
    masks: Masking | None = None


def task_for(section: Mapping[str, Any], task: tasks.Task) -> tasks.Task:
    """The task as it is trained: with other layers, where that is asked for."""
    if not section.get("replace_layers"):
        return task
    from fedipfs.privacy.models import WithPrivateLayers

    return WithPrivateLayers(task)


def prepare(
    config: Mapping[str, Any],
    dataset: Dataset,
    task: tasks.Task,
    strategy: Strategy,
    brief: Brief,
) -> Privacy:
    """Complete the section `privacy` of a checked `config`. Raises ConfigError."""
    match config["privacy"]["name"]:
        case "dp_sgd":
            return _dp_sgd(config, dataset, task, strategy, brief)
        case "central":
            return _central(config, task, strategy, brief)
        case "distributed":
            return _distributed(config, task, strategy, brief)
    return Privacy(dict(config["privacy"]), config["rounds"], strategy)


def _dp_sgd(
    config: Mapping[str, Any],
    dataset: Dataset,
    task: tasks.Task,
    strategy: Strategy,
    brief: Brief,
) -> Privacy:
    from fedipfs.privacy import plan
    from fedipfs.privacy.models import fitting_mode

    section, name = dict(config["privacy"]), config["strategy"]["name"]
    releases = _releases(strategy, brief)
    if releases and section["metrics"] != "noise":
        raise ConfigError(
            f"strategy={name} goes by what clients measure, or clients are to evaluate, and "
            "privacy.metrics=withhold keeps that at home; set privacy.metrics=noise, or choose "
            "another strategy and evaluate.federated=false"
        )
    if name == "fedbn":
        raise ConfigError(
            "privacy=dp_sgd cannot train BatchNorm, and strategy=fedbn is for nothing else; choose "
            "strategy=fedper or fedavg"
        )
    if section["replace_layers"] and name == "ensemble":
        raise ConfigError(
            "privacy.replace_layers=true with strategy=ensemble: an ensemble's models are rebuilt "
            "from the task, which has the other layers; choose layers that DP-SGD can train"
        )
    count = len(dataset.train)
    share = config["data"]["validation"] or 0.0
    if section["examples"] is None:
        section["examples"] = max(1, int(count * (1 - share)) // config["clients"]["total"])
    if section["delta"] is None:
        section["delta"] = plan.default_delta(count)
    warnings = []
    if section["delta"] * section["examples"] > 0.2:  # a little over the default is no matter
        warnings.append(
            f"privacy.delta={section['delta']:g} is more than 1/(10 N) for N={section['examples']} "
            "records a client: with a chance of delta nothing is promised"
        )
    work = plan.work(
        config["train"],
        examples=section["examples"],
        sample_rate=section["sample_rate"],
        whole=name == "fedsgd",
        releases=releases,
        metrics_noise_multiplier=section["metrics_noise_multiplier"],
    )
    planned = _planned(
        section, config["rounds"], work.cost(section["delta"], section["accountant"])
    )
    section["sample_rate"] = work.sample_rate
    test = dataset.test
    wanted = None if section["clipping"] == "auto" else section["clipping"]
    mode = fitting_mode(task, task.model(), test.inputs, test.targets, mode=wanted)
    told = [
        f"privacy: each client's records, epsilon = {planned.epsilon:.3g} at delta = "
        f"{section['delta']:g} after {planned.rounds} rounds ({section['accountant']}); noise "
        f"multiplier {planned.noise_multiplier:.4g}, sampling rate {work.sample_rate:.4g}, "
        f"{work.steps} steps a round, {mode} clipping to {section['clip_norm']:g}"
    ]
    if section["reproducible"]:
        warnings.append(
            "privacy.reproducible=true: the noise follows from the seed, and whoever knows that "
            "can take it off; these updates are not private"
        )
    if planned.epsilon > _WEAK:
        warnings.append(f"epsilon = {planned.epsilon:.3g} promises next to nothing")
    return Privacy(section, planned.rounds, strategy, told, warnings)


def _releases(strategy: Strategy, brief: Brief) -> int:
    """How often a client tells in a round what it measured, at most."""
    own = int(getattr(strategy, "measurements", 0))
    return own + int(brief.evaluates) + int(reports_loss(strategy))


def reports_loss(strategy: Strategy) -> bool:
    """Whether the strategy weighs clients by the loss of the model that they were sent."""
    return hasattr(strategy, "train_loss_key")


def _planned(
    section: dict[str, Any], rounds: int | None, cost: Callable[[float, int], float]
) -> Plan:
    """What the section and the rounds come to, filled in."""
    from fedipfs.privacy import plan

    planned = plan.plan(
        cost,
        rounds=rounds,
        epsilon_target=section["epsilon"],
        noise_multiplier=section["noise_multiplier"],
        delta=section["delta"],
    )
    section |= {"epsilon": planned.epsilon, "noise_multiplier": planned.noise_multiplier}
    return planned


def _central(
    config: Mapping[str, Any], task: tasks.Task, strategy: Strategy, brief: Brief
) -> Privacy:
    from fedipfs.privacy import plan
    from fedipfs.strategies.central import central

    section = dict(config["privacy"])
    if config["seal"] == "none" and is_shared(config["store"]):
        raise ConfigError(
            "privacy=central puts noise on the mean of the updates, and with seal=none the store "
            "shows each update as it is to everybody; leave seal out"
        )
    cost = plan.Work(1.0, 1).cost(section["delta"], section["accountant"])
    planned = _planned(section, config["rounds"], cost)
    own = ("name", "epsilon", "accountant")
    noised = central(strategy, {k: v for k, v in section.items() if k not in own}, brief)
    seen = noised.forecast(
        from_torch(task.model().state_dict()),
        rounds=planned.rounds,
        delta=section["delta"],
        clients=brief.clients,
        per_round=brief.per_round,
    )

    def price(survivors: list[int]) -> dict[str, float]:
        spent = [(section["noise_multiplier"], 1.0, len(survivors))]
        return by_accountants(spent, section["delta"], section["accountant"])

    told, warnings = [f"privacy: {seen.text}"], list(seen.warnings)
    return Privacy(section, planned.rounds, noised, told, warnings, price)


def _distributed(
    config: Mapping[str, Any], task: tasks.Task, strategy: Strategy, brief: Brief
) -> Privacy:
    from fedipfs.privacy import masked
    from fedipfs.privacy.central import drowned
    from fedipfs.strategies.sensitivity import check_needs_only_mean

    section, delta = dict(config["privacy"]), config["privacy"]["delta"]
    if config["secagg"]["name"] == "off":
        raise ConfigError(
            "privacy=distributed hides each client's update behind the noise of all the others, "
            "which takes secagg=on; add it, or choose privacy=central"
        )
    check_needs_only_mean(strategy, "distributed")
    values = float_values(task)

    def masks(noise: float) -> Masks:
        told = {**section, "noise_multiplier": noise}
        return masked.masks_for(config["secagg"], told, clients=brief.per_round, values=values)

    def cost(noise: float, rounds: int) -> float:
        agreed = masks(noise)
        return masked.epsilon(agreed, [agreed.quorum] * rounds, delta)

    planned = _planned(section, config["rounds"], cost)
    agreed = masks(planned.noise_multiplier)
    noise, _ = masked.agreed(agreed)
    section["scale"] = noise.scale
    alone = planned.noise_multiplier * math.sqrt(brief.per_round / noise.survivors)
    told = (
        f"privacy: client-level, epsilon = {planned.epsilon:.3g} at delta = {delta:g} after "
        f"{planned.rounds} rounds with {agreed.quorum} survivors each (rdp), whatever the "
        f"coordinator and {agreed.quorum - noise.survivors} clients together see; noise "
        f"multiplier {planned.noise_multiplier:.4g} from {noise.survivors} clients, "
        f"{alone:.4g} if all {brief.per_round} are left"
    )
    weak = [f"epsilon = {planned.epsilon:.3g} says next to nothing"] * (planned.epsilon > _WEAK)
    lost = drowned(alone, planned.rounds, brief.per_round, values)

    def price(survivors: list[int]) -> dict[str, float]:
        found = masked.epsilon(agreed, [each or agreed.quorum for each in survivors], delta)
        return {"epsilon": found, "epsilon_rdp": found}

    def session(clients: int, values: int) -> Masks:
        if clients != brief.per_round:
            raise RunFailed(
                f"privacy=distributed was planned for {brief.per_round} clients a round, and "
                f"{clients} are there: with fewer, each would have to add more noise"
            )
        seed = secrets.token_bytes(32)
        return masked.masks_for(
            config["secagg"], section, clients=clients, values=values, seed=seed
        )

    return Privacy(section, planned.rounds, strategy, [told], weak + lost, price, session)


def float_values(task: tasks.Task) -> int:
    """Values of an update under masks: of all floating-point tensors."""
    tensors = task.model().state_dict().values()
    return sum(each.numel() for each in tensors if each.is_floating_point())
