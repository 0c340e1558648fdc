"""Arrays to a payload: what changed, in few bytes, and what got lost on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from typing_extensions import Buffer

from fedipfs.errors import CompressionError
from fedipfs.ipld import CID
from fedipfs.weights.base import Tensors
from fedipfs.weights.compression import sparse
from fedipfs.weights.compression.decoded import wide_dtype
from fedipfs.weights.compression.dense import CODEC
from fedipfs.weights.compression.parts import FORMAT, NO_BASE, described, floats, pack
from fedipfs.weights.compression.spec import SPARSE, Spec
from fedipfs.weights.layout import TensorSpec, canonical, is_float


class Encoded(NamedTuple):
    """A payload's leaves, what the next update has to make up for, and the relative L2 error."""

    file: list[Buffer]
    residual: dict[str, np.ndarray]
    error: float


def encode(
    spec: Spec,
    model: Mapping[str, TensorSpec],
    tensor: Callable[[str], np.ndarray],
    base: Tensors | None = None,
    base_cid: CID | None = None,
    residual: Mapping[str, np.ndarray] | None = None,
) -> Encoded:
    """The payload for tensors as `model` describes them, relative to `base`, stored as `base_cid`.

    What is compressed is v = new - base + residual, for each tensor of floats; others travel as
    they are. What is lost, v less what the reader sees of it, is the new residual (Karimireddy et
    al. 2019, "Error Feedback Fixes SignSGD", algorithm 2); empty unless `spec.feedback`. The error
    is ||lost|| / ||v|| over all tensors. Without a base v is the tensors themselves.

    Raises CompressionError for values that are NaN, infinite, or out of the codec's range.
    """
    if base is None and spec.codec in SPARSE:
        raise CompressionError(f"{spec.codec} has to be relative to a base")
    job = _Job(spec, tensor, base, residual or {})
    for each in canonical(model.values()):
        if not is_float(each):
            job.add_raw(each)
        elif spec.codec in CODEC:
            job.add_dense(each)
    if spec.codec in SPARSE:
        job.add_sparse(floats(model.values()))
    job.metadata |= {
        "format": FORMAT,
        "compression": str(spec),
        "base": NO_BASE if base is None else str(base_cid),
        "error": f"{job.error:.6g}",
        **(described(model.values()) if base is None else {}),
    }
    return Encoded(pack(spec, model, job.parts, job.metadata), job.residual, job.error)


class _Job:
    """What `encode` gathers, tensor by tensor."""

    def __init__(
        self,
        spec: Spec,
        tensor: Callable[[str], np.ndarray],
        base: Tensors | None,
        owed: Mapping[str, np.ndarray],
    ) -> None:
        self._spec, self._tensor, self._base, self._owed = spec, tensor, base, owed
        self.parts: dict[str, np.ndarray] = {}
        self.metadata: dict[str, str] = {}
        self.residual: dict[str, np.ndarray] = {}
        self._size = self._lost = 0.0
        if spec.codec in ("int8", "int4"):
            self.metadata["block"] = str(CODEC[spec.codec].block)

    @property
    def error(self) -> float:
        return self._lost / self._size if self._size else 0.0

    def add_raw(self, each: TensorSpec) -> None:
        values = self._tensor(each.name)
        if self._base is None or not np.array_equal(values, self._base.tensor(each.name)):
            self.parts[f"raw/{each.name}"] = values

    def add_dense(self, each: TensorSpec) -> None:
        codec, change = CODEC[self._spec.codec], self._change(each)
        if self._base is not None and not change.any():
            self._note(each, change, None)
            return
        try:
            parts = codec.encode(change)
        except CompressionError as error:
            raise CompressionError(f"tensor {each.name!r}: {error}") from None
        self.parts |= {f"{kind}/{each.name}": array for kind, array in parts.items()}

        def read(kind: str, start: int, stop: int) -> np.ndarray:
            return parts[kind][start:stop]

        self._note(each, change, codec.decode(read, 0, change.size, change.dtype))

    def add_sparse(self, tensors: list[TensorSpec]) -> None:
        changes = [self._change(each) for each in tensors]
        flat = np.concatenate(changes) if changes else np.zeros(0, np.float32)
        parts, self.metadata = sparse.encode(self._spec, flat)
        if parts["values"].size:
            self.parts |= parts
        gaps = parts.get("gaps", np.zeros(0, np.uint8))
        seed = int(self.metadata.get("seed", 0))
        sent = np.zeros(flat.size, flat.dtype)
        chosen = sparse.Sent(self._spec, flat.size, seed, gaps, parts["values"])
        indices, values = chosen.between(0, flat.size)
        sent[indices] = values
        start = 0
        for each, change in zip(tensors, changes, strict=True):
            self._note(each, change, sent[start : start + each.elements])
            start += each.elements

    def _change(self, each: TensorSpec) -> np.ndarray:
        """v, flat."""
        wide = wide_dtype(each.numpy_dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            change = self._tensor(each.name).astype(wide).reshape(-1)
            if self._base is not None:
                change -= self._base.tensor(each.name).reshape(-1)
            if each.name in self._owed:
                change += self._owed[each.name].reshape(-1)
        if not np.isfinite(change).all():
            raise CompressionError(f"tensor {each.name!r} has changed to NaN or infinite values")
        return change

    def _note(self, each: TensorSpec, change: np.ndarray, sent: np.ndarray | None) -> None:
        """What a reader, who adds `sent` to the base, does not get of `change`."""
        lost = change if sent is None else change - self._seen(each, sent)
        self._size = math.hypot(self._size, _norm(change))
        self._lost = math.hypot(self._lost, _norm(lost))
        if self._spec.feedback:
            self.residual[each.name] = lost.reshape(each.shape)

    def _seen(self, each: TensorSpec, sent: np.ndarray) -> np.ndarray:
        """`sent` as it is after the sum with the base was rounded to a narrow dtype."""
        wide, narrow = sent.dtype, each.numpy_dtype
        if wide == narrow:
            return sent
        before = np.zeros(1, wide)
        if self._base is not None:
            before = self._base.tensor(each.name).reshape(-1).astype(wide)
        with np.errstate(over="ignore"):
            seen = (before + sent).astype(narrow).astype(wide) - before
        if not np.isfinite(seen).all():
            raise CompressionError(f"tensor {each.name!r} is beyond the range of {each.dtype}")
        return seen


def _norm(values: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        norm = math.sqrt(float(np.square(values, dtype=np.float64).sum()))
    if not math.isfinite(norm):
        raise CompressionError(f"a value of {np.abs(values).max():.3g} is beyond every codec")
    return norm
