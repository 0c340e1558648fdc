"""A compressed update that was opened: checked against its model, read by range.

See docs/formats.md, "Compressed updates".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from fedipfs.errors import BadPayload, CompressionError, WrongBase
from fedipfs.ipld import CID
from fedipfs.weights.codec import Weights
from fedipfs.weights.compression import lossless
from fedipfs.weights.compression.dense import CODEC
from fedipfs.weights.compression.parts import (
    FORMAT,
    FRAMES,
    MOST_TIMES,
    NO_BASE,
    TENSOR,
    ZSTD,
    floats,
    inflated,
    plan,
)
from fedipfs.weights.compression.sparse import GAPS, VALUES
from fedipfs.weights.compression.spec import SPARSE, Spec
from fedipfs.weights.layout import DTYPES, TensorSpec

_COMMON = {"format", "compression", "base", "error"}
_OF_CODEC = {
    "int8": {"block"},
    "int4": {"block"},
    "topk": {"count", "values", "gaps"},
    "randk": {"count", "values", "seed"},
}


def is_payload(file: object) -> bool:
    """Whether a file says that it is a compressed update or model, of any version."""
    said = file.metadata.get("format", "") if isinstance(file, Weights) else ""
    return said.startswith("fedipfs/update/")


class Payload:
    """A payload that was opened: its metadata checked, its parts read by range.

    `model` are the tensors of the base stored as `base`; a payload without one brings them along.
    Raises WrongBase and BadPayload. Reading a part raises BadPayload, too, and what reading a
    block raises.
    """

    def __init__(
        self, file: Weights, model: Mapping[str, TensorSpec] | None = None, base: CID | None = None
    ) -> None:
        self.file, said = file, file.metadata
        if said.get("format") != FORMAT:
            raise BadPayload(f"its format is {said.get('format')!r:.80}, known is {FORMAT}")
        try:
            self.spec = Spec.parse(said.get("compression", ""))
        except CompressionError as error:
            raise BadPayload(str(error)) from None
        wanted = NO_BASE if base is None else str(base)
        if said.get("base") != wanted:
            raise WrongBase(f"it is relative to {said.get('base')!r:.80}, not to {wanted}")
        own = {key for key in said if key.startswith(TENSOR)} if base is None else set()
        known = _COMMON | _OF_CODEC.get(self.spec.codec, set()) | own
        if said.keys() != known:
            raise BadPayload(f"metadata {min(said.keys() ^ known)!r:.80} is missing or unknown")
        if base is None and self.spec.codec in SPARSE:
            raise BadPayload(f"{self.spec.codec} needs a base")
        if base is None or model is None:
            model = {key.removeprefix(TENSOR): _described(key, said[key]) for key in own}
            if inflated(model, file.nbytes):
                raise BadPayload(f"{file.nbytes} bytes stand for over {MOST_TIMES} times as many")
        self.specs, self._alone = model, base is None
        self.elements = sum(tensor.elements for tensor in floats(model.values()))
        self.error = _error(said["error"])
        self.count, self.seed = (_whole(said.get(key, "0"), key) for key in ("count", "seed"))
        self._check_codec(said)
        self._plan = plan(self.spec, model, said)
        self._check_parts()
        self._ends: dict[str, list[int]] = {}  # of the frames of a part

    def _check_codec(self, said: Mapping[str, str]) -> None:
        if self.spec.codec in SPARSE:
            most = self.spec.count(self.elements)
            exact = self.spec.codec == "randk"
            if self.count > most or (exact and self.count != most):
                raise BadPayload(f"{self.count} coordinates, {self.spec} sends {most}")
            if said["values"] not in VALUES or said.get("gaps", GAPS[0]) not in GAPS:
                raise BadPayload("its values or gaps are of an unknown dtype")
        elif "block" in said and said["block"] != str(CODEC[self.spec.codec].block):
            raise BadPayload(f"blocks of {said['block']!r:.80}, {self.spec.codec} has others")

    def _check_parts(self) -> None:
        """Only parts of the plan, each once, as planned, and together with those it needs."""
        files = self.file.specs
        self._have = {name.removeprefix(ZSTD) for name in files if not name.startswith(FRAMES)}
        for name in self._have:
            if name not in self._plan:
                raise BadPayload(f"part {name!r:.80} is none of {self.spec.codec}'s for this model")
            part = self._plan[name].spec
            if name in files and (files[name] != part or ZSTD + name in files):
                raise BadPayload(f"part {name!r:.80} has another dtype or shape, or stands twice")
            zstd = files.get(ZSTD + name)
            if zstd and (
                zstd.dtype != "U8" or len(zstd.shape) != 1 or not 0 < zstd.nbytes < part.nbytes
            ):
                raise BadPayload(f"part {name!r:.80} is not smaller with zstd, or no bytes")
            if self.spec.codec in CODEC and not name.startswith("raw/"):
                tensor = name.partition("/")[2]
                kinds = CODEC[self.spec.codec].parts(part)
                if any(f"{kind}/{tensor}" not in self._have for kind in kinds):
                    raise BadPayload(f"tensor {tensor!r:.80} has only some of its parts")
        for name in files:
            if name.startswith(FRAMES) and ZSTD + name.removeprefix(FRAMES) not in files:
                raise BadPayload(f"{name!r:.80} belongs to no part")
            if name.startswith(ZSTD):
                part_name = name.removeprefix(ZSTD)
                count, table = self._frames(part_name), FRAMES + part_name
                expected = TensorSpec(table, "U32", (count,)) if count > 1 else None
                if files.get(table) != expected:
                    raise BadPayload(f"part {part_name!r:.80} is not in {count} frames")
        for name in self._plan:
            needed = self._alone or (self.count and name in ("gaps", "values"))
            if needed and name not in self._have:
                raise BadPayload(f"part {name!r:.80} is missing")

    def _frames(self, name: str) -> int:
        part = self._plan[name]
        return -(-part.spec.elements // part.frame)

    def __contains__(self, name: str) -> bool:
        return name in self._have

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements of a part: flat, read-only. With zstd they must lie within a frame."""
        part = self._plan[name]
        if name in self.file.specs:
            return self.file.span(name, start, stop)
        number = start // part.frame
        first, last = ([0, *self._frame_ends(name)])[number : number + 2]
        size = min(part.frame, part.spec.elements - number * part.frame)
        data = self.file.span(ZSTD + name, first, last).tobytes()
        dtype = DTYPES[part.spec.dtype]
        whole = lossless.decompress(data, size * dtype.itemsize)
        inside = start - number * part.frame
        return np.frombuffer(whole, dtype)[inside : inside + stop - start]

    def whole(self, name: str) -> np.ndarray:
        """All of a part that is one frame; empty if it is not there."""
        if name not in self:
            return np.zeros(0, np.uint8)
        return self.read(name, 0, self._plan[name].spec.elements)

    def _frame_ends(self, name: str) -> list[int]:
        if name not in self._ends:
            total = self.file.specs[ZSTD + name].elements
            ends = [total]
            if FRAMES + name in self.file.specs:
                lengths = self.file.tensor(FRAMES + name)
                ends = np.cumsum(lengths, dtype=np.int64).tolist()
            if ends[-1] != total or any(a >= b for a, b in pairwise([0, *ends])):
                raise BadPayload(f"the frames of part {name!r:.80} do not add up")
            self._ends[name] = ends
        return self._ends[name]


def _described(key: str, text: str) -> TensorSpec:
    dtype, *shape = text.split(" ")
    if dtype not in DTYPES or len(shape) > 64:
        raise BadPayload(f"{key!r:.80} has no known dtype, or too many dimensions")
    sizes = tuple(_whole(size, key) for size in shape)
    if math.prod(sizes) >= 1 << 62:
        raise BadPayload(f"{key!r:.80} is too large")
    return TensorSpec(key.removeprefix(TENSOR), dtype, sizes)


def _whole(text: str, key: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < 1 << 64):
        raise BadPayload(f"its {key!r:.80} is {text!r:.80}, not a whole number")
    return int(text)


def _error(text: str) -> float:
    try:
        error = float(text[:40])
    except ValueError:
        error = math.nan
    if not (math.isfinite(error) and error >= 0):
        raise BadPayload(f"its error is {text!r:.80}, not a number of at least 0")
    return error
