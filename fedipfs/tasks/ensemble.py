"""Several models that answer together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedipfs.errors import ConfigError

VOTING = ("soft", "hard")
_LEAST = 1e-6  # share of votes that a class without any counts as: its logarithm is finite


class Ensemble(nn.Module):
    """Members of any architecture vote on the class, each with its weight.

    soft: p(c | x) = sum_k a_k softmax(f_k(x))_c. hard: p(c | x) is the share of the weights a_k
    whose member ranks class c first, at least 1e-6 and normalised. The a_k are `weights`, which
    are at least 0, divided by their sum.

    Members take the same inputs and answer logits (B, C, ...); the ensemble answers log p, of the
    same shape, in float32 or wider. So a task's loss and metrics take it as they take a member's
    logits. `state_dict` has `members.<i>.<name>` and `weights`. Raises ConfigError.
    """

    weights: Tensor

    def __init__(
        self, members: Sequence[nn.Module], weights: Sequence[float], voting: str = "soft"
    ) -> None:
        super().__init__()
        total = math.fsum(weights)
        if not members or len(members) != len(weights):
            raise ConfigError(f"an ensemble of {len(members)} members has {len(weights)} weights")
        if not all(weight >= 0 for weight in weights) or not 0 < total < math.inf:
            raise ConfigError(f"weights {list(weights)!r:.80} are to be at least 0, not all 0")
        if voting not in VOTING:
            raise ConfigError(f"voting={voting} is unknown; choose {' or '.join(VOTING)}")
        self.members = nn.ModuleList(members)
        self.voting = voting
        self.register_buffer(
            "weights", torch.tensor([weight / total for weight in weights], dtype=torch.float32)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        vote = _log_softmax if self.voting == "soft" else _log_choice
        votes = [
            vote(member(inputs)) + weight.log()
            for member, weight in zip(self.members, self.weights, strict=True)
        ]
        shares = torch.logsumexp(torch.stack(votes), dim=0)
        if self.voting == "hard":
            shares = torch.log_softmax(shares.clamp(min=math.log(_LEAST)), dim=1)
        return shares


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(_checked(logits), dim=1)


def _log_choice(logits: Tensor) -> Tensor:
    """0 for the class ranked first (of equals the first), minus infinity for the others."""
    logits = _checked(logits)
    chosen = torch.full_like(logits, -math.inf)
    return chosen.scatter(1, logits.argmax(dim=1, keepdim=True), 0.0)


def _checked(logits: Tensor) -> Tensor:
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ConfigError(
            f"members vote on classes: their output is (B, C, ...), C above 1, "
            f"not {tuple(logits.shape)}"
        )
    return logits if logits.dtype == torch.float64 else logits.float()
