"""Updates and models in few bytes: what a server asks for, and what each side then stores.

The record "fedipfs" of a message to train says how to answer: `compress:<key>` holds the text of
a `Spec` for the array record `<key>` of the reply, which answers the one of that name that came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from fedipfs.errors import CompressionError, EdgeError
from fedipfs.exchange.arrays import (
    StoredArrays,
    as_numpy,
    from_numpy,
    put_arrays,
    specs_of,
    stored_cid,
)
from fedipfs.exchange.inspect import difference
from fedipfs.exchange.signing import KEY
from fedipfs.exchange.vault import Vault
from fedipfs.ipld import CID
from fedipfs.weights import TensorSpec
from fedipfs.weights.compression import Decoded, Spec, decode, encode

COMPRESS = "compress"  # kind of the fields that ask for it
RESIDUAL = "fedipfs.residual."  # keys of what a client keeps in its state
_KEPT = ("F32", "F64")


def asked_of(content: RecordDict) -> dict[str, Spec]:
    """How a message, as it crossed Flower, wants its array records answered, by key.

    Raises CompressionError for what this side does not know or cannot do.
    """
    found: dict[str, Spec] = {}
    record = content.get(KEY)
    for field, text in record.items() if isinstance(record, ConfigRecord) else ():
        kind, _, key = field.partition(":")
        if kind == COMPRESS:
            if not isinstance(text, str):
                raise EdgeError(f"{field[:80]!r} is a text, not {type(text).__name__}")
            found[key] = Spec.parse(text)
    return found


class Answers:
    """Puts the array records of one reply, compressed where that was asked for.

    `content` is the message's, arrays and all. With error feedback the client keeps in
    `context.state`, under "fedipfs.residual.<key>", what its updates so far have lost.
    """

    def __init__(self, asked: Mapping[str, Spec], content: RecordDict, context: Context) -> None:
        self._asked, self._context = asked, context
        self._bases = {key: content[key] for key in asked}

    def put(self, vault: Vault, key: str, record: ArrayRecord) -> tuple[CID, CID | None]:
        """The CID of what stands for `record`, and that of its order; see put_arrays.

        Raises CompressionError for values that are not finite, or another structure than came.
        """
        spec, base = self._asked.get(key), self._bases.get(key)
        if spec is None or not isinstance(base, StoredArrays):
            return put_arrays(vault, record)
        model = base.weights.specs
        if reason := difference(specs_of(record), model):
            raise CompressionError(f"array record {key!r:.80}: {reason}")
        encoded = encode(
            spec,
            model,
            lambda name: as_numpy(record[name]),
            base.weights,
            base.cid,
            self._residual(key, model) if spec.feedback else {},
        )
        cid = vault.put_file(encoded.file)
        if spec.feedback:
            self._context.state[RESIDUAL + key] = from_numpy(encoded.residual)
        return cid, None

    def _residual(self, key: str, model: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
        """What is owed; nothing if it is of another model."""
        kept = self._context.state.get(RESIDUAL + key)
        if not isinstance(kept, ArrayRecord):
            return {}
        for name, spec in specs_of(kept).items():
            if name not in model or spec.shape != model[name].shape or spec.dtype not in _KEPT:
                return {}
        return {name: as_numpy(array) for name, array in kept.items()}


def compress_model(model: StoredArrays, spec: Spec) -> StoredArrays:
    """`model` as clients get it: stored as a payload without a base, its values as they arrive."""
    weights, vault = model.weights, model.vault
    cid = vault.put_file(encode(spec, weights.specs, weights.tensor).file)
    decoded = decode(vault.weights(cid))
    return StoredArrays(vault, decoded, list(model), model.order, cid=cid)


def put_stored(vault: Vault, key: str, record: ArrayRecord) -> tuple[CID, CID | None]:
    """The CIDs of a record that is stored as it is to be sent."""
    assert isinstance(record, StoredArrays)
    return stored_cid(record), record.order


class Cost(NamedTuple):
    """What an update took: bytes before sealing, bytes as a plain file, relative L2 error.

    The error is what the client says it is.
    """

    stored: int
    dense: int
    error: float


def cost_of(update: StoredArrays) -> Cost:
    """Bytes and error of an update as it came in."""
    weights = update.weights
    if isinstance(weights, Decoded):
        return Cost(weights.payload.file.nbytes, weights.nbytes, weights.payload.error)
    return Cost(weights.nbytes, weights.nbytes, 0.0)
