"""What a payload stands for, decoded piece by piece as it is read."""

from __future__ import annotations

from functools import cached_property, partial

import numpy as np

from fedipfs.errors import BadPayload
from fedipfs.ipld import CID
from fedipfs.weights.base import Tensors
from fedipfs.weights.codec import Weights
from fedipfs.weights.compression import sparse
from fedipfs.weights.compression.dense import CODEC, Dense
from fedipfs.weights.compression.parts import floats
from fedipfs.weights.compression.payload import Payload
from fedipfs.weights.compression.spec import Spec
from fedipfs.weights.layout import is_float


class Decoded(Tensors):
    """base + delta, or, for a payload without a base, the tensors themselves.

    A tensor that is not in the payload is the base's. Memory: a piece or two, with the scales of
    a tensor or, of the sparse codecs, the values sent and their gaps as the payload holds them (2
    to 4 bytes, and 1 to 4 for topk) from the first piece read to the end of this object. Several
    threads may read at once.
    """

    def __init__(self, payload: Payload, base: Tensors | None) -> None:
        self.payload, self._base = payload, base
        self.specs = dict(payload.specs if base is None else base.specs)

    def piece(self, name: str, start: int) -> np.ndarray:
        spec = self.specs[name]
        stop = min(spec.elements, start + self.piece_starts(spec).step)
        if not is_float(spec):
            if f"raw/{name}" in self.payload:
                return self.payload.read(f"raw/{name}", start, stop)
            return self._of_base(name, start)
        if self._codec is None:
            return self._sparse(name, start, stop)
        if f"values/{name}" not in self.payload:
            return self._of_base(name, start)
        wide = wide_dtype(spec.numpy_dtype)
        read = partial(self._read, name)
        change = self._codec.decode(read, start, stop, wide)
        with np.errstate(over="ignore"):  # infinite values are for whoever reads to refuse
            if self._base is not None:
                change += self._base.piece(name, start)
            change = change.astype(spec.numpy_dtype, copy=False)
        return _read_only(change)

    @property
    def _codec(self) -> Dense | None:
        return CODEC.get(self.payload.spec.codec)

    def _read(self, name: str, kind: str, start: int, stop: int) -> np.ndarray:
        if kind == "scales":
            return self._scales(name)[start:stop]
        return self.payload.read(f"{kind}/{name}", start, stop)

    def _scales(self, name: str) -> np.ndarray:
        last = self._last_scales  # read once: several threads may share this
        if last[0] != name:
            last = self._last_scales = (name, self.payload.whole(f"scales/{name}"))
        return last[1]

    _last_scales: tuple[str | None, np.ndarray] = (None, np.zeros(0, np.float32))

    def _of_base(self, name: str, start: int) -> np.ndarray:
        assert self._base is not None  # Payload sees to it
        return self._base.piece(name, start)

    def _sparse(self, name: str, start: int, stop: int) -> np.ndarray:
        offset = self._offsets[name]
        indices, values = self._sent.between(offset + start, offset + stop)
        piece = self._of_base(name, start)
        if not indices.size:
            return piece
        wide = piece.astype(wide_dtype(piece.dtype))
        with np.errstate(over="ignore"):
            wide[indices - (offset + start)] += values
            return _read_only(wide.astype(piece.dtype, copy=False))

    @cached_property
    def _offsets(self) -> dict[str, int]:
        """The number of each floating-point tensor's first coordinate."""
        offsets, total = {}, 0
        for spec in floats(self.specs.values()):
            offsets[spec.name] = total
            total += spec.elements
        return offsets

    @cached_property
    def _sent(self) -> sparse.Sent:
        payload = self.payload
        values = payload.whole("values")
        if not np.isfinite(values).all():
            raise BadPayload("a value is NaN or infinite")
        gaps = payload.whole("gaps")
        return sparse.Sent(payload.spec, payload.elements, payload.seed, gaps, values)


def wide_dtype(dtype: np.dtype) -> np.dtype:
    """The floats in which deltas of a tensor are computed: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def decode(
    file: Weights,
    base: Tensors | None = None,
    base_cid: CID | None = None,
    *,
    asked: Spec | None = None,
) -> Decoded:
    """The update in `file` to the model `base`, whose CID is `base_cid`; or a model without base.

    Only the header is read. Raises WrongBase if it was made for another base, and BadPayload if
    it is malformed, or compressed otherwise than `asked`, if that is given.
    """
    payload = Payload(file, None if base is None else base.specs, base_cid)
    if asked is not None and payload.spec != asked:
        raise BadPayload(f"it is compressed as {payload.spec}, asked for was {asked}")
    return Decoded(payload, base)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
