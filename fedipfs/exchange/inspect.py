"""Is an update fit to be combined with others? The questions, apart from who asks them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedipfs.errors import (
    BadPayload,
    BadUpdate,
    CompressionError,
    EnvelopeError,
    FormatError,
    StoreError,
)
from fedipfs.exchange.arrays import StoredArrays
from fedipfs.exchange.vault import Vault
from fedipfs.ipld import CID
from fedipfs.trust import PublicIdentity
from fedipfs.weights import Tensors, TensorSpec
from fedipfs.weights.compression import Spec, decode, is_payload, most_bytes

NOT_FINITE = "NaN or infinite values"
_SLACK = 64 << 10  # bytes an update's file may be larger than the model's: another header


def difference(update: Mapping[str, TensorSpec], model: Mapping[str, TensorSpec]) -> str:
    """Where an update's tensors, shapes and dtypes differ from the model's; "" if nowhere."""
    missing = sorted(model.keys() - update.keys())
    extra = sorted(update.keys() - model.keys())
    if missing:
        return f"tensor {missing[0]!r} is missing ({len(missing)} in all)"
    if extra:
        return f"tensor {extra[0]!r} is not in the model ({len(extra)} in all)"
    for name, spec in update.items():
        if spec != model[name]:
            return (
                f"tensor {name!r} is {spec.dtype}{list(spec.shape)}, "
                f"the model's is {model[name].dtype}{list(model[name].shape)}"
            )
    return ""


def check_structure(update: Tensors, model: Mapping[str, TensorSpec]) -> None:
    """BadUpdate unless `update` has exactly the model's tensors, shapes and dtypes."""
    if reason := difference(update.specs, model):
        raise BadUpdate(reason)


def check_finite(piece: np.ndarray, name: str) -> None:
    """BadUpdate if `piece` of tensor `name` holds a NaN or an infinity."""
    if piece.dtype.kind in "fcV" and not np.isfinite(piece).all():
        raise BadUpdate(f"tensor {name!r} holds {NOT_FINITE}")


def check_update(arrays: StoredArrays, model: dict[str, TensorSpec], *, read: bool = True) -> None:
    """BadUpdate if an update cannot be fetched, verified or combined.

    With `read`, every value is fetched and looked at once, without keeping it.
    """
    try:
        check_structure(arrays.weights, model)
        for name in arrays.weights.names if read else ():
            for piece in arrays.weights.pieces(name):
                check_finite(piece, name)
    except (StoreError, FormatError) as error:
        raise BadUpdate(_reason(error)) from error


def open_update(
    vault: Vault,
    cid: CID,
    model: StoredArrays,
    sender: PublicIdentity | None,
    *,
    read: bool,
    asked: int | None = None,
    compression: Spec | None = None,
) -> StoredArrays:
    """The update `cid` to `model`, asked for in round `asked`, with the model's tensor order.

    It must be compressed just as `compression` says. BadUpdate if it cannot be fetched, verified,
    opened or combined; see check_update for `read` and Vault.leaves for `sender`.
    """
    try:
        weights = _open(vault, cid, model, sender, compression)
        check_structure(weights, model.weights.specs)
        vault.store.fetch(cid)
    except (StoreError, FormatError) as error:
        raise BadUpdate(_reason(error)) from error
    names, order = list(model), model.order
    update = StoredArrays(vault, weights, names, order, sender, cid=cid, base=model, asked=asked)
    check_update(update, model.weights.specs, read=read)
    return update


def _open(
    vault: Vault,
    cid: CID,
    model: StoredArrays,
    sender: PublicIdentity | None,
    compression: Spec | None,
) -> Tensors:
    specs = model.weights.specs
    if compression is None:
        file = vault.weights(cid, max_bytes=model.weights.nbytes + _SLACK, sender=sender)
        if is_payload(file):
            raise BadPayload(f"{cid} is compressed, which was not asked for")
        return file
    file = vault.weights(cid, max_bytes=most_bytes(compression, specs), sender=sender)
    if not is_payload(file):
        raise BadPayload(f"{cid} is not compressed, asked for was {compression}")
    return decode(file, model.weights, model.cid, asked=compression)


def _reason(error: Exception) -> str:
    named = isinstance(error, EnvelopeError | CompressionError)
    return f"{type(error).__name__}: {error}" if named else str(error)


def check_examples(value: object) -> float:
    """The weight a client claims, as a float; BadUpdate unless it is a positive, finite number."""
    number = value if isinstance(value, int | float) else float("nan")
    if not np.isfinite(number) or not 0 < number < 2**53:
        raise BadUpdate(f"its number of examples is {value!r}, not a positive number")
    return float(number)
