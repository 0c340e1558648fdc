"""Malicious clients, for experiments: their updates are replaced before they are combined.

The adversary is omniscient: it knows the model, its clients' own honest updates and, for "alie",
those of all others. What it crafts goes through the checks that every update does. Simulation
only; "label_flip" happens at the simulated clients, in their own configuration (`node_config`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict

from fedipfs.errors import BadUpdate, FormatError, StoreError, one_line
from fedipfs.exchange import StoredArrays, check_update
from fedipfs.flower_compat import CLIENT_APP_RAISED_EXCEPTION, error_instead
from fedipfs.strategies import update_in
from fedipfs.strategies.delta import Derived, scaled
from fedipfs.weights import Tensors


def malicious(attack: Mapping[str, Any], clients: int) -> frozenset[int]:
    """The partitions, of `clients`, whose clients attack: round(fraction * clients), by seed."""
    if attack["name"] == "none":
        return frozenset()
    count = round(attack["fraction"] * clients)
    rng = np.random.default_rng(attack["seed"])
    return frozenset(int(number) for number in rng.choice(clients, count, replace=False))


def node_config(attack: Mapping[str, Any], partition: int, clients: int) -> dict[str, bool]:
    """What the attack adds to the node configuration of the simulated client of `partition`."""
    if attack["name"] == "label_flip" and partition in malicious(attack, clients):
        return {"label-flip": True}
    return {}


@dataclass(frozen=True)
class Adversary:
    """Replaces what malicious nodes answer; `attack` is that section of the configuration.

    With `read`, for strategies that take what they are given, what is crafted is looked at as the
    grid looks at updates: one with NaN becomes an error Message.
    """

    attack: Mapping[str, Any]
    nodes: Set[int]
    read: bool
    extra: Sequence[str] = ()  # keys of array records that are no models

    def __call__(self, server_round: int, replies: Iterable[Message]) -> list[Message]:
        """`replies` to training, those of malicious nodes with crafted updates, now stored.

        A crafted update that cannot be made, since what it is made of cannot be read, becomes an
        error Message, too.
        """
        replies = list(replies)
        if self.attack["name"] in ("none", "label_flip"):
            return replies
        updates = {
            each.metadata.src_node_id: update
            for each in replies
            if isinstance(update := update_in(each, self.extra), StoredArrays)
            if update.base is not None
        }
        honest = [each.weights for node, each in updates.items() if node not in self.nodes]
        attackers = len(updates) - len(honest)
        poisoned = []
        for reply in replies:
            node = reply.metadata.src_node_id
            if node in self.nodes and node in updates:
                seed = [self.attack["seed"], server_round, node]
                crafted = self._crafted(updates[node], seed, honest, attackers)
                reply = self._answer(reply, updates[node], crafted)
            poisoned.append(reply)
        return poisoned

    def _crafted(
        self, update: StoredArrays, seed: list[int], honest: list[Tensors], attackers: int
    ) -> Tensors:
        """What a malicious node sends instead of `update`, computed as it is read."""
        assert update.base is not None
        own, base, attack = update.weights, update.base.weights, self.attack
        match attack["name"]:
            case "nan":
                return Derived(own, lambda name, at: np.full(own.piece(name, at).shape, np.nan))
            case "gaussian":
                return Derived(own, lambda name, at: _noisy(base, name, at, attack["std"], seed))
            case "sign_flip":
                return scaled(own, base, -attack["factor"])
            case "scale":
                return scaled(own, base, attack["factor"])
            case "alie" if honest:
                z = attack["z"]
                z = alie_z(len(honest) + attackers, attackers) if z is None else z
                return Derived(own, lambda name, at: _hidden(honest, name, at, z))
        return own  # nobody to hide among

    def _answer(self, reply: Message, update: StoredArrays, crafted: Tensors) -> Message:
        """A message like `reply`, which stays as it was, with `crafted` instead of `update`."""
        try:
            stored = _stored(update, crafted)
            if self.read:
                check_update(stored, crafted.specs)
        except (BadUpdate, StoreError, FormatError) as error:
            return error_instead(reply, Error(CLIENT_APP_RAISED_EXCEPTION, one_line(error)))
        content = RecordDict()
        for key, record in reply.content.items():
            content[key] = stored if record is update else record
        answer = copy.copy(reply)
        answer.content = content
        return answer


def alie_z(clients: int, attackers: int) -> float:
    """The z of Baruch et al. 2019 ("A Little Is Enough", Algorithm 3), at least 0.

    So many deviations from the mean that with s = floor(n/2 + 1) - m honest clients further out
    the attackers are a majority: the z up to which Phi(z) < (n - m - s) / (n - m). A majority
    of attackers needs no more, and takes the z of one honest client further out.
    """
    honest = clients - attackers
    further = max(1, clients // 2 + 1 - attackers)
    share = (honest - further) / honest
    return max(0.0, NormalDist().inv_cdf(share)) if share > 0 else 0.0


def _noisy(base: Tensors, name: str, start: int, std: float, seed: list[int]) -> np.ndarray:
    piece = base.piece(name, start)
    rng = np.random.default_rng([*seed, base.names.index(name), start])
    return piece + std * rng.standard_normal(piece.shape)


def _hidden(honest: list[Tensors], name: str, start: int, z: float) -> np.ndarray:
    """mean - z * standard deviation of each value, in two passes and float64."""
    pieces = [tensors.piece(name, start) for tensors in honest]
    mean = sum(piece.astype(np.float64) for piece in pieces) / len(pieces)
    square = sum((piece - mean) ** 2 for piece in pieces) / len(pieces)
    return mean - z * np.sqrt(square)


def _stored(update: StoredArrays, crafted: Tensors) -> StoredArrays:
    """A record like `update` with other values, which are put into the store, for us alone."""
    vault = update.vault
    cid = vault.put_weights(crafted.specs.values(), crafted.tensor, private=True)
    stored = vault.weights(cid)
    return StoredArrays(
        vault, stored, list(update), update.order, base=update.base, asked=update.asked
    )
