"""The real ClientApp, whose clients fail or lie where `node_config["faults"]` says.

Words "ROUND/STAGE/FAULT": in round ROUND (or `*`) at a stage of secure aggregation, or `train`.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedipfs import cid_mod
from fedipfs.clients import app as real
from fedipfs.clients import secure
from fedipfs.exchange import Vault
from fedipfs.exchange.stages import ANSWER, RECORD
from fedipfs.secagg import Parameters
from fedipfs.weights import TensorSpec

MISSING = "bafyreigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"


def _fault(message: Message, context: Context) -> str:
    ask = message.content["config"]
    here = str(ask.get("stage", message.metadata.message_type))
    for word in str(context.node_config.get("faults", "")).split():
        number, stage, fault = word.split("/")
        if number in ("*", str(ask["server-round"])) and stage == here:
            return fault
    return ""


def fails(message: Message, context: Context, call_next) -> Message:
    """Faults of whoever carries the messages, and of the process."""
    fault = _fault(message, context)
    if fault == "raise":
        raise OSError("disk gone")
    if fault == "silent":
        time.sleep(3600)
    if fault == "exit":
        os._exit(7)
    reply = call_next(message, context)
    if fault == "forge":  # after it was signed
        reply.content[RECORD][ANSWER] = MISSING
    if fault == "replay":  # what the client has signed at the stage before
        reply.content = _signed[context.node_id]
    _signed[context.node_id] = reply.content
    return reply


def lies(message: Message, context: Context, call_next) -> Message:
    """Lies of the client itself, which it signs."""
    fault = _fault(message, context)
    before = context.state.get("before")
    with _other_vector(fault):
        reply = call_next(message, context)
    answer = reply.content.get(RECORD)
    if not isinstance(answer, ConfigRecord):
        return reply
    said = {
        "earlier": before and before["answer"],  # at an earlier stage
        "others": _answers[-1] if _answers else "",
        "number": 7,
        "garbage": "bafynonsense",
        "missing": MISSING,
    }
    answer[ANSWER] = said.get(fault, answer[ANSWER])
    context.state["before"] = ConfigRecord({"answer": str(answer[ANSWER])})
    _answers.append(str(answer[ANSWER]))
    if fault == "nothing":
        del reply.content[RECORD]
    return reply


_signed: dict[int, RecordDict] = {}  # node -> the content of its last reply
_answers: list[str] = []  # of all clients in this process
_honest = secure.put_vector
_vectors: list[str] = []  # of all clients in this process


@contextmanager
def _other_vector(fault: str):
    """What is stored in a masked vector's place, named and signed; all are noted, to be copied."""

    def put_vector(vault: Vault, parameters: Parameters, vector: np.ndarray) -> str:
        if fault == "copied":
            return _vectors[-1]
        if fault == "unsealed":
            return _honest(Vault(vault.store), parameters, vector)
        if fault in ("short", "huge", "floats"):
            size = {"short": 5, "huge": 1_000_000}.get(fault, len(vector))
            spec = TensorSpec("masked", "F32" if fault == "floats" else "U32", (size,))
            return str(vault.put_weights([spec], lambda name: np.zeros(size, spec.numpy_dtype)))
        _vectors.append(_honest(vault, parameters, vector))
        return _vectors[-1]

    secure.put_vector = put_vector
    try:
        yield
    finally:
        secure.put_vector = _honest


app = ClientApp(mods=[fails, cid_mod, lies])
app.train()(real.train)
app.train("secagg")(real.train_masked)
app.query("secagg")(real.secagg)
app.query("capabilities")(real.capabilities)
app.evaluate()(real.evaluate)
