"""Is an update fit to be combined with others? The questions, apart from who asks them."""

from __future__ import annotations

import numpy as np

from fedipfs.errors import BadUpdate, EnvelopeError, FormatError, StoreError
from fedipfs.exchange.arrays import StoredArrays
from fedipfs.exchange.vault import Vault
from fedipfs.ipld import CID
from fedipfs.trust import PublicIdentity
from fedipfs.weights import Tensors, TensorSpec

_SLACK = 64 << 10  # bytes an update's file may be larger than the model's: another header


def check_structure(update: Tensors, model: dict[str, TensorSpec]) -> None:
    """BadUpdate unless `update` has exactly the model's tensors, shapes and dtypes."""
    missing = sorted(model.keys() - update.specs.keys())
    extra = sorted(update.specs.keys() - model.keys())
    if missing:
        raise BadUpdate(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra:
        raise BadUpdate(f"tensor {extra[0]!r} is not in the model ({len(extra)} in all)")
    for name, spec in update.specs.items():
        if spec != model[name]:
            raise BadUpdate(
                f"tensor {name!r} is {spec.dtype}{list(spec.shape)}, "
                f"the model's is {model[name].dtype}{list(model[name].shape)}"
            )


def check_finite(piece: np.ndarray, name: str) -> None:
    """BadUpdate if `piece` of tensor `name` holds a NaN or an infinity."""
    if piece.dtype.kind in "fcV" and not np.isfinite(piece).all():
        raise BadUpdate(f"tensor {name!r} holds NaN or infinite values")


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
        raise BadUpdate(str(error)) from error


def open_update(
    vault: Vault, cid: CID, model: StoredArrays, sender: PublicIdentity | None, *, read: bool
) -> StoredArrays:
    """The update `cid` to `model`, with the tensors in the model's order.

    BadUpdate if it cannot be fetched, verified, opened or combined; see check_update for `read`
    and Vault.leaves for `sender`.
    """
    try:
        weights = vault.weights(cid, max_bytes=model.weights.nbytes + _SLACK, sender=sender)
        check_structure(weights, model.weights.specs)
        vault.store.fetch(cid)
    except EnvelopeError as error:
        raise BadUpdate(f"{type(error).__name__}: {error}") from error
    except (StoreError, FormatError) as error:
        raise BadUpdate(str(error)) from error
    update = StoredArrays(vault, weights, list(model), model.order, sender)
    check_update(update, model.weights.specs, read=read)
    return update


def check_examples(value: object) -> float:
    """The weight a client claims, as a float; BadUpdate unless it is a positive, finite number."""
    number = value if isinstance(value, int | float) else float("nan")
    if not np.isfinite(number) or not 0 < number < 2**53:
        raise BadUpdate(f"its number of examples is {value!r}, not a positive number")
    return float(number)
