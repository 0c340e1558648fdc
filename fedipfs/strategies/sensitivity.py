"""How far one client can move what a strategy makes of updates: known where it takes their mean."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi, Strategy

from fedipfs.errors import ConfigError
from fedipfs.strategies.fedavg import Average, FedAvg, FedProx

# What they make of the mean alone costs no more privacy, whatever they remember of earlier ones.
_NEED_ONLY_THE_MEAN = (FedAvg, Average, FedProx, FedAdam, FedYogi, FedAdagrad, FedAvgM)

_CHOICE = "it chooses among the updates, and a single client can change the choice"
_ORDER = "how far one client can move it is not bounded by the clip norm over their number"
_PERSONAL = "only clients can tell how good its models are, and what they measure gets no noise"
_REFUSED = {
    "BestModel": "it hands out one client's model",
    "EnsembleStrategy": "it hands out every client's model",
    "FedSGD": "it is answered with gradients, and clipped are changes of the model",
    "Scaffold": "its control variates are a second answer of each client, without noise",
    "FedNova": "it weighs each update by the steps that its client reports",
    "QFedAvg": "it weighs each update by the loss that its client reports",
    "FedBuff": "it weighs updates by their examples and delays, and they answer unlike models",
    "FedPer": _PERSONAL,
    "FedBN": _PERSONAL,
    "Krum": _CHOICE,
    "MultiKrum": _CHOICE,
    "Bulyan": _CHOICE,
    "FedMedian": _ORDER,
    "FedTrimmedAvg": _ORDER,
    "RFA": _ORDER,
    "CenteredClipping": _ORDER,
    "NormClip": "privacy clips by itself: leave out strategy.clip_update_norm",
}


def check_needs_only_mean(strategy: Strategy, level: str = "central") -> None:
    """ConfigError unless noise on the mean of clipped updates makes `strategy` private."""
    name = type(strategy).__name__
    if type(strategy) not in _NEED_ONLY_THE_MEAN:
        why = _REFUSED.get(name, "it is not known whether it needs more than the mean of updates")
        usable = ", ".join(each.__name__ for each in _NEED_ONLY_THE_MEAN)
        raise ConfigError(f"privacy={level} cannot be had with {name}: {why}; use {usable}")
