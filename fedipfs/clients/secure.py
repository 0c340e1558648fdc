"""Secure aggregation at a client: a message a stage, and what it learnt leaves masked only.

The record "config" of each message names the stage and, by CIDs, the session and what this stage
answers to; the reply names its answer. Everything is in the store, and nothing but these CIDs
crosses Flower. Node configuration: `secagg-journal`, the folder of the client's journal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedipfs.errors import ConfigError
from fedipfs.exchange import StoredArrays, Vault, as_numpy, default_vault, flatten
from fedipfs.ipld import CID
from fedipfs.privacy import masked as noised
from fedipfs.secagg import Client, Delivery, Floors, Journal, Request, Roster, Session, Survivors
from fedipfs.secagg.messages import Signed
from fedipfs.secagg.quantize import encode
from fedipfs.weights import TensorSpec

RECORD, STAGE, SESSION, ASKED, ANSWER = "secagg", "stage", "session", "asked", "answer"
VECTOR = "masked"  # the name of the only tensor in a masked vector's file


def answer(message: Message, context: Context) -> Message:
    """The answer to a stage at which nothing is trained."""
    vault, member, asked = _member(message, context)
    match message.content["config"][STAGE]:
        case "advertise":
            said: Signed = member.advertise()
        case "share":
            said = member.share(Roster.from_bytes(asked))
        case "confirm":
            said = member.confirm(Survivors.from_bytes(asked))
        case "unmask":
            said = member.unmask(Request.from_bytes(asked))
        case other:
            raise ConfigError(f"there is no stage {other!r:.80} of secure aggregation")
    return Message(_content(vault, said), reply_to=message)


def masked(message: Message, context: Context, trained: RecordDict) -> RecordDict:
    """What is answered instead of `trained`: where the masked vector is, and no metrics."""
    vault, member, asked = _member(message, context)
    parameters = member.session.parameters
    base = message.content["arrays"]
    arrays, metrics = trained["arrays"], trained["metrics"]
    assert isinstance(base, StoredArrays)
    assert isinstance(arrays, ArrayRecord) and isinstance(metrics, MetricRecord)
    details = dict(parameters.details)

    def change(name: str, spec: TensorSpec) -> np.ndarray:
        values = as_numpy(arrays[name])
        if not details["relative"]:
            return values
        return np.subtract(values, base.weights.tensor(name), dtype=np.result_type(values, "f4"))

    vector = _encoded(member, flatten(base, change), metrics)

    def put(found: np.ndarray) -> str:
        spec = TensorSpec(VECTOR, "U32", found.shape)
        return str(vault.put_weights([spec], lambda name: found))

    content = _content(vault, member.mask(Delivery.from_bytes(asked), vector, put))
    for key, record in trained.items():
        if isinstance(record, ConfigRecord):  # what it cost in privacy
            content[key] = record
    return content


def _encoded(member: Client, values: np.ndarray, metrics: Mapping[str, Any]) -> np.ndarray:
    parameters = member.session.parameters
    if parameters.encoding == noised.ENCODING:
        return noised.encode(parameters, values)
    details = dict(parameters.details)
    most = float(details["examples"])  # type: ignore[arg-type]
    weight = min(1.0, float(metrics["num-examples"]) / most) if most else 1.0
    told = {name: weight * float(metrics[name]) for name in _told(parameters.numbers)}
    return encode(parameters, values, {"weight": weight, **told}, weight).vector


def _told(numbers: tuple[str, ...]) -> list[str]:
    return [name for name in numbers if name != "weight" and not name.startswith("clipped/")]


def _content(vault: Vault, said: Signed) -> RecordDict:
    cid = vault.put_record({"message": said.to_bytes()})
    return RecordDict({RECORD: ConfigRecord({ANSWER: str(cid)})})


def _member(message: Message, context: Context) -> tuple[Vault, Client, bytes]:
    """The store, this client in the session of `message`, and what it is to answer to."""
    vault, ask = default_vault("participant"), message.content["config"]
    assert isinstance(ask, ConfigRecord)
    if vault.party is None:
        raise ConfigError(
            "secure aggregation needs this client's keys: set FEDIPFS_IDENTITY and FEDIPFS_TRUST"
        )
    session = Session.from_bytes(_read(vault, ask[SESSION]))
    node = context.node_config
    journal = Journal(
        Path(str(node.get("secagg-journal") or _journals())) / vault.party.name,
        session,
        durable=not node.get("simulated"),
    )
    floors = Floors()
    party = vault.party
    member = Client(session, party.name, party.sign, party.verify_own, floors, journal)
    return vault, member, _read(vault, ask[ASKED]) if ASKED in ask else b""


def _read(vault: Vault, cid: object) -> bytes:
    found = vault.get_record(CID.parse(str(cid)))
    if not isinstance(found, dict) or type(found.get("message")) is not bytes:
        raise ConfigError(f"{cid} is no message of secure aggregation")
    data: bytes = found["message"]
    return data


def _journals() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "fedipfs" / "secagg"
