"""Ensemble records: several stored models that answer together, under one CID.

A record ("fedipfs/ensemble/v1") is DAG-CBOR: {type, members, details}. `members` are links to
the models' files, so a pin of the record keeps them. `details` is {task, options, weights, voting}
(see `Recipe`), or, where the vault seals, a link to them in sealed form. `tensors_of` gives an
ensemble's tensors as those of one safetensors file, whose metadata carry the same details.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import Buffer

from fedipfs.errors import WeightsError
from fedipfs.exchange.vault import Vault, vault_of
from fedipfs.ipld import CID, DAG_CBOR
from fedipfs.store import Store, dag
from fedipfs.trust import PublicIdentity
from fedipfs.weights import Tensors, TensorSpec, Weights, chunks
from fedipfs.weights.compression import decode, is_payload

ENSEMBLE = "fedipfs/ensemble/v1"
MAX_MEMBERS = 1024
MAX_BYTES = 64 << 30  # of all members together
_METADATA = "fedipfs.ensemble"  # key in the header of an ensemble's safetensors file
_WEIGHTS = "weights"  # the tensor that stands beside the members'
_Where = Store | Vault


@dataclass(frozen=True)
class Recipe:
    """How an ensemble's members become modules, and their answers one.

    `task` is a target as in `task.target`; `options` are that task's for each member; `weights`
    are at least 0 and not all 0; `voting` is soft or hard.
    """

    task: str
    options: tuple[Mapping[str, Any], ...]
    weights: tuple[float, ...]
    voting: str = "soft"

    def plain(self) -> dict[str, Any]:
        """As DAG-CBOR and JSON hold it."""
        options = [dict(each) for each in self.options]
        return {
            "task": self.task,
            "options": options,
            "weights": list(self.weights),
            "voting": self.voting,
        }

    @classmethod
    def parse(cls, value: Any, source: object) -> Recipe:
        """Inverse of `plain`, for what strangers wrote; WeightsError, naming `source`."""
        match value:
            case {
                "task": str(task),
                "options": [*options],
                "weights": [*weights],
                "voting": str(voting),
            } if (
                0 < len(options) == len(weights) <= MAX_MEMBERS
                and all(isinstance(each, dict) for each in options)
                and all(map(_is_weight, weights))
                and 0 < math.fsum(weights) < math.inf
            ):
                return cls(task, tuple(options), tuple(map(float, weights)), voting)
        raise WeightsError(
            f"{source}: the details of an ensemble are to be its task, a list of options and one "
            f"of weights for 1 to {MAX_MEMBERS} members, and its voting"
        )


def put_ensemble(where: _Where, members: Sequence[CID], recipe: Recipe) -> CID:
    """Store the record of an ensemble of stored models; returns its CID."""
    vault = vault_of(where)
    details: Any = Recipe.parse(recipe.plain(), "this ensemble").plain()
    if len(members) != len(recipe.options):
        raise WeightsError(f"{len(members)} members, options for {len(recipe.options)}")
    if vault.seal != "none":
        details = vault.sealing_all().put_record(details)
    return dag.put_record(
        vault.store, {"type": ENSEMBLE, "members": list(members), "details": details}
    )


def get_ensemble(where: _Where, cid: CID) -> tuple[list[CID], Recipe]:
    """The members and recipe of a record.

    Raises WeightsError for what is no such record, EnvelopeError for details that are sealed to
    others, and what reading a block raises.
    """
    vault = vault_of(where)
    record = dag.get_record(vault.store, cid)
    if not isinstance(record, dict) or record.get("type") != ENSEMBLE:
        raise WeightsError(f"{cid} is no ensemble: its type is not {ENSEMBLE}")
    members, details = record.get("members"), record.get("details")
    if not isinstance(members, list) or not all(type(member) is CID for member in members):
        raise WeightsError(f"{cid}: the members of an ensemble are to be links")
    if type(details) is CID:
        details = vault.get_record(details)
    recipe = Recipe.parse(details, cid)
    if len(members) != len(recipe.options):
        raise WeightsError(f"{cid} has {len(members)} members, details of {len(recipe.options)}")
    return members, recipe


def tensors_of(
    where: _Where,
    cid: CID,
    *,
    max_bytes: int = MAX_BYTES,
    sender: PublicIdentity | None = None,
) -> Tensors:
    """The tensors of a stored model, or of an ensemble as of one file: members' and `weights`.

    Those of an ensemble are named as in tasks.ensemble.Ensemble: `members.<i>.<name>`. Headers
    are read here, values when they are asked for; `file()` streams. `max_bytes` bounds the
    files together; with `sender`, each must be sealed by it as Vault.leaves has it. Raises what
    `get_ensemble` and Vault.weights raise.
    """
    vault = vault_of(where)
    if cid.codec != DAG_CBOR:
        return _model(vault, cid, max_bytes, sender)
    members, recipe = get_ensemble(vault, cid)
    opened = []
    for member in members:
        opened.append(_model(vault, member, max_bytes, sender))
        max_bytes -= opened[-1].nbytes
    return Members(opened, recipe)


def _model(vault: Vault, cid: CID, max_bytes: int, sender: PublicIdentity | None) -> Tensors:
    weights = vault.weights(cid, max_bytes=max_bytes, sender=sender)
    vault.store.fetch(cid)
    return decode(weights) if is_payload(weights) else weights


def recipe_in(tensors: Tensors) -> Recipe | None:
    """The recipe that a safetensors file made by `Members.file` carries; None for other files.

    Raises WeightsError for one that is malformed.
    """
    if isinstance(tensors, Members):
        return tensors.recipe
    text = tensors.metadata.get(_METADATA) if isinstance(tensors, Weights) else None
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise WeightsError("the metadata of an ensemble's file are not JSON") from None
    return Recipe.parse(value, "the metadata of an ensemble's file")


class Members(Tensors):
    """The tensors of several models and their `weights`, (K,) float32, under names of their own."""

    def __init__(self, members: Sequence[Tensors], recipe: Recipe) -> None:
        self.recipe = recipe
        self._weights = (np.array(recipe.weights) / math.fsum(recipe.weights)).astype(np.float32)
        self._weights.flags.writeable = False
        self._at: dict[str, tuple[Tensors, str]] = {}
        self.specs = {_WEIGHTS: TensorSpec(_WEIGHTS, "F32", (len(members),))}
        for index, member in enumerate(members):
            for name, spec in member.specs.items():
                own = f"members.{index}.{name}"
                self.specs[own] = spec._replace(name=own)
                self._at[own] = (member, name)

    def piece(self, name: str, start: int) -> np.ndarray:
        if name == _WEIGHTS:
            return self._weights[start:]
        member, inner = self._at[name]
        return member.piece(inner, start)

    def file(self) -> Iterator[Buffer]:
        """The bytes of one safetensors file, in pieces, with the recipe in its metadata."""
        metadata = {_METADATA: json.dumps(self.recipe.plain(), sort_keys=True)}
        return chunks(self.specs.values(), self.tensor, metadata)


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63
