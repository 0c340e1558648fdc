"""Secure aggregation over Flower: what its two sides call things, and what a session binds.

A message a stage. Its record "config" names the stage and, by CIDs, the session and what the stage
answers to; the record "secagg" of the reply names the answer. All of that is in the store.

A session's parameters say besides how the sum is made (see secagg/parameters.py) what it is made
of: `model` is the CID of the model that everybody trains, `terms` a hash of everything that the
message to train says. So nobody can be given a model, or a task, of its own that would set its
update apart in the sum (Pasquini et al. 2022, "Eluding Secure Aggregation in Federated Learning
via Model Inconsistency"): those who have other parameters share no masks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedipfs.errors import BadMessage, WrongSession
from fedipfs.exchange.signing import signed_bytes
from fedipfs.exchange.vault import Vault
from fedipfs.ipld import CID
from fedipfs.secagg import Parameters
from fedipfs.weights import TensorSpec

QUERY, TRAIN = "query.secagg", "train.secagg"  # types of messages: what is trained, is in MASKED
RECORD, STAGE, SESSION, ASKED, ANSWER = "secagg", "stage", "session", "asked", "answer"
EXAMPLES, RELATIVE, MODEL, TERMS = "examples", "relative", "model", "terms"  # of the details
STEPS, LOSS = "steps", "train_loss"  # numbers beside the update: a plain sum, a weighted one

_CHANGING = (MODEL, TERMS, "seed")  # from round to round
_PROCESS = re.compile(r"\+([1-9][0-9]{0,8})")


def vector_spec(parameters: Parameters) -> TensorSpec:
    """The only tensor in a masked vector's file."""
    return TensorSpec("masked", "U32", (parameters.dimension,))


def put_message(vault: Vault, block: bytes, *, private: bool = False) -> CID:
    """Store what one side says."""
    return vault.put_record({"message": block}, private=private)


def get_message(vault: Vault, reference: object) -> bytes:
    """What `put_message` stored, by the text of its CID. Raises BadMessage, and as a store does."""
    if not isinstance(reference, str):
        raise BadMessage("a message of secure aggregation is named by its CID")
    found = vault.get_record(CID.parse(reference))
    if not isinstance(found, dict) or type(found.get("message")) is not bytes:
        raise BadMessage(f"{reference} is no message of secure aggregation")
    data: bytes = found["message"]
    return data


def bound(parameters: Parameters, model: CID, ask: Mapping[str, Any]) -> Parameters:
    """Parameters that are good for a round only: of what is trained, and how. See `terms`."""
    details = {**dict(parameters.details), MODEL: str(model), TERMS: terms(ask)}
    return dataclasses.replace(parameters, details=tuple(sorted(details.items())))


def lasting(parameters: Parameters) -> Parameters:
    """What of parameters is the same in every round, and what sites may pin by its hash."""
    kept = tuple(detail for detail in parameters.details if detail[0] not in _CHANGING)
    return dataclasses.replace(parameters, details=kept)


def terms(ask: Mapping[str, Any]) -> bytes:
    """SHA-256 of what a message to train says in its record "config", but for the stage itself."""
    said = {key: value for key, value in ask.items() if key not in (STAGE, SESSION, ASKED)}
    return hashlib.sha256(signed_bytes(RecordDict({"config": ConfigRecord(said)}))).digest()


def session_name(run: str, process: int) -> str:
    """What a session calls the run in the process that is the `process`-th to coordinate it."""
    return f"{run}+{process}" if process else run


def process_of(name: str, run: str) -> int:
    """Inverse of `session_name`. Raises WrongSession where it is a name of another run."""
    found = _PROCESS.fullmatch(name[len(run) :])
    if name == run:
        return 0
    if not name.startswith(run) or found is None:
        raise WrongSession(f"the session is of the run {name!r:.160}, the message of {run!r:.160}")
    return int(found[1])
