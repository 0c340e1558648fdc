"""Whether private training keeps to its epsilon: canaries, and what a model tells of them.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run" (arXiv:2305.08846).
A coin for each of many canaries says whether it is among the examples; whoever sees the model
guesses the coins, only those that the model tells most of if he likes. Under (epsilon, delta)-
differential privacy hardly more guesses are right than randomized response would make so. More of
them give a lower bound of epsilon, with some confidence.

The canaries are gradients, each along an axis of its own and longer than any clipping norm ("Dirac
canaries": Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning"). That
finds gross faults: clipping that does not clip, noise that is missing or far too small, batches
that are not drawn as claimed. It proves nothing right, and looks at no layer but a linear one.

    def train(task, model, inputs, targets):
        trainer.train(task, model, inputs, targets, config=..., private=..., ...)

    found = audit(train, delta=1e-6)
    if found.contradicts(claimed_epsilon): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn

from fedipfs.privacy import noise
from fedipfs.tasks import Task

#: Trains a task's model in place on inputs (N, canaries) and targets (N,).
Train = Callable[[Task, nn.Module, NDArray[np.float32], NDArray[np.int64]], object]

_LENGTH = 1e6  # of a canary's gradient
_SHARES = (1.0, 0.3, 0.1)  # of the canaries that are guessed; the best counts, and pays for three


class Finding(NamedTuple):
    """With `confidence`, training is not private with less than `epsilon`.

    For of `canaries` coins `guesses` were guessed, and of these `right` were.
    """

    epsilon: float
    confidence: float
    canaries: int
    guesses: int
    right: int

    def contradicts(self, claimed: float) -> bool:
        """Whether training cannot be as private as `claimed`, an epsilon at the audit's delta."""
        return self.epsilon > claimed


def audit(train: Train, *, delta: float, canaries: int = 2000, confidence: float = 0.99) -> Finding:
    """What one training tells of `canaries` examples, about half of which it is given.

    `train` is to do what is claimed to be (epsilon, delta)-private when an example is added or
    removed; no step need be made of SGD, but the larger a gradient, the smaller the weight after.
    """
    present = noise.generator().random(canaries) < 0.5
    task = _Canaries(canaries)
    model = task.model()
    inputs = _LENGTH * np.eye(canaries, dtype=np.float32)[present]
    train(task, model, inputs, np.zeros(len(inputs), np.int64))
    (weights,) = model.parameters()
    return judge(-weights.detach().cpu().double().numpy().ravel(), present, delta, confidence)


def judge(
    scores: NDArray[np.float64], present: NDArray[np.bool_], delta: float, confidence: float = 0.99
) -> Finding:
    """What `scores` (canaries,) tell of the coins: those with the highest are guessed `present`.

    As many as are guessed to be absent have the lowest; those between are not guessed.
    """
    order, count = np.argsort(scores), len(scores)
    level = (1 - confidence) / len(_SHARES)
    found = []
    for share in _SHARES:
        half = round(share * count / 2)
        right = int((~present[order[:half]]).sum() + present[order[count - half :]].sum())
        least = least_epsilon(right, 2 * half, count, delta, 1 - level)
        found.append(Finding(least, confidence, count, 2 * half, right))
    return max(found, key=lambda finding: finding.epsilon)


def least_epsilon(
    right: int, guesses: int, canaries: int, delta: float, confidence: float
) -> float:
    """The largest epsilon that `right` of `guesses` guesses refute with `confidence`; 0 if none."""
    low, high = 0.0, 1.0
    while p_value(high, right, guesses, canaries, delta) < 1 - confidence:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        refuted = p_value(middle, right, guesses, canaries, delta) < 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def p_value(epsilon: float, right: int, guesses: int, canaries: int, delta: float) -> float:
    """How likely so many right guesses are, at most, under (epsilon, delta)-differential privacy.

    Steinke et al., corollary 5.4 and appendix D.
    """
    chance, i = 1 / (1 + np.exp(-epsilon)), np.arange(1, right + 1)
    just_missed = np.cumsum(binom.pmf(right - i, guesses, chance)) / i
    slack = 2 * canaries * delta * just_missed.max(initial=0.0)
    return float(min(binom.sf(right - 1, guesses, chance) + slack, 1.0))


class _Canaries(Task):
    """The loss of example i is weight i times its length, so that is its gradient."""

    def __init__(self, count: int) -> None:
        self.count = count

    def model(self) -> nn.Module:
        model = nn.Linear(self.count, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def data(self, *, root: str | None, fallback: str) -> Any:
        raise NotImplementedError("an audit makes its own")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output.mean()

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"output": output.mean()}
