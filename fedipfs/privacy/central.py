"""Client-level differential privacy: how noise is divided, and what a run will cost."""

from __future__ import annotations

import math
from typing import NamedTuple

from fedipfs.privacy.accounting import Event, epsilon

_WEAK = 10.0  # an epsilon beyond says next to nothing: odds may change by e^10, 22 000 times
# Noise of all rounds over all that updates can be together. On digits (10 and 100 clients, 20
# rounds) accuracy is 0.03 to 0.13 lower at 1 than at 0.1, 0.13 to 0.47 at 2, 0.43 to 0.71 at 4.
_DROWNED = 2.0


def event(noise_multiplier: float, rounds: int) -> Event:
    """What `rounds` rounds of the Gaussian mechanism spend, each on all clients.

    Sampling does not amplify: cohorts have a fixed size, and who is in one is no secret.
    """
    return Event(noise_multiplier, 1.0, rounds)


def update_multiplier(noise_multiplier: float, count_stddev: float) -> float:
    """z_u = (z^-2 - (2 s)^-2)^(-1/2): the noise on the updates where their count has N(0, s^2).

    Together both cost what one Gaussian mechanism of multiplier z does. Andrew et al. 2021,
    "Differentially Private Learning with Adaptive Clipping", Theorem 1. It needs z < 2 s.
    """
    return (noise_multiplier**-2 - (2 * count_stddev) ** -2) ** -0.5


def adapted(clip_norm: float, fraction: float, quantile: float, rate: float) -> float:
    """C exp(-rate (fraction - quantile)): shorter if more than `quantile` of the updates fit in C.

    `fraction` is the noised share of updates not longer than C. Andrew et al. 2021, section 2.
    """
    fraction = min(max(fraction, 0.0), 1.0)  # noise may take it anywhere, and costs nothing here
    return clip_norm * math.exp(-rate * (fraction - quantile))


class Forecast(NamedTuple):
    """What a run will cost: `text` in one line, and one line for each of its `warnings`."""

    epsilon_prv: float
    epsilon_rdp: float
    text: str
    warnings: tuple[str, ...]

    @property
    def meaningless(self) -> bool:
        """Whether such a run protects nobody, or learns nothing."""
        return bool(self.warnings)


def forecast(
    noise_multiplier: float,
    rounds: int,
    delta: float,
    clients: int,
    *,
    per_round: int | None = None,
    values: int | None = None,
    count_stddev: float | None = None,
) -> Forecast:
    """The privacy that `clients` clients have after `rounds` rounds, before there is any.

    With the number of `values` in an update, and `per_round` updates a round (None: of all
    clients), also whether the noise drowns them. Noise of multiplier z on each of d values of a
    mean of n is z sqrt(d) / n times as long as the longest update; as it is another in each of T
    rounds, all of it is sqrt(T) times as long as that, against T updates at most that agree.
    `count_stddev` is that of adaptive clipping.
    """
    history = [event(noise_multiplier, rounds)]
    prv, rdp = (epsilon(history, delta, accountant) for accountant in ("prv", "rdp"))
    text = (
        f"client-level: after {rounds} rounds epsilon = {prv:.3g} at delta = {delta:g} "
        f"(prv; rdp {rdp:.3g})"
    )
    warnings = []
    if prv > _WEAK:
        warnings.append(
            f"epsilon = {prv:.3g} says next to nothing; raise privacy.noise_multiplier or "
            "lower rounds"
        )
    if delta * clients >= 1:
        warnings.append(
            f"privacy.delta={delta:g} is not below 1/{clients}: handing out all that one of "
            f"{clients} clients has would do; set it well below {1 / clients:g}"
        )
    if values is not None:
        updates = clients if per_round is None else per_round
        multiplier = noise_multiplier
        if count_stddev is not None:
            multiplier = update_multiplier(noise_multiplier, count_stddev)
        longer = multiplier * math.sqrt(values) / updates
        text += f"; a round's noise is {longer:.3g} times as long as the longest update"
        warnings += drowned(multiplier, rounds, updates, values)
    return Forecast(prv, rdp, text, tuple(warnings))


def drowned(noise_multiplier: float, rounds: int, updates: int, values: int) -> list[str]:
    """A warning where the noise on the mean of so many updates leaves nothing to be learnt."""
    in_all = noise_multiplier * math.sqrt(values) / updates / math.sqrt(rounds)
    if in_all <= _DROWNED:
        return []
    return [
        f"with {updates} clients a round and {values} values the noise of {rounds} rounds is "
        f"{in_all:.3g} times as long as all updates together can be; take more clients, a smaller "
        "or partly frozen model, or privacy at the clients"
    ]
