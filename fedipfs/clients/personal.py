"""Layers that stay at the client: put on before a model is used, taken off what is answered."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, RecordDict

from fedipfs.errors import ConfigError
from fedipfs.exchange import from_torch, to_torch
from fedipfs.tasks.names import matching, split_by

_KEY = "personal"  # of the array record in the client's state


def put_on(
    model: torch.nn.Module, patterns: Iterable[str], state: RecordDict
) -> dict[str, torch.Tensor]:
    """Give `model` the client's own tensors, if it has some yet; returns those that came in.

    Raises ConfigError where a tensor has another name, too, under which it would leave.
    """
    if tied := split_by(model, patterns := list(patterns)):
        raise ConfigError(
            f"{tied[0]!r} is to stay here, and would leave as {tied[1]!r}: the weights are tied; "
            "the coordinator is to name both as personal, or neither"
        )
    current = model.state_dict()
    came = {name: current[name].clone() for name in matching(current, patterns)}
    kept = state.get(_KEY)
    if isinstance(kept, ArrayRecord):
        own = to_torch(kept)
        model.load_state_dict({name: own[name] for name in came if name in own}, strict=False)
    return came


def keep(model: torch.nn.Module, names: Iterable[str], state: RecordDict) -> None:
    """Remember the tensors `names` of `model` in the client's state."""
    current = model.state_dict()
    state.pop(_KEY, None)  # Flower warns where a record takes the place of one of another type
    state[_KEY] = from_torch({name: current[name].clone() for name in names})
