"""Codecs that send a number for every coordinate: half precision, or blocks of small integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from fedipfs.errors import BadPayload, CompressionError
from fedipfs.weights.layout import DTYPES, TensorSpec

Read = Callable[[str, int, int], np.ndarray]  # a part's elements: (its name, start, stop)


class Dense(Protocol):
    """Numbers in, named parts out, and back by range."""

    block: int  # elements that share a scale; 1 if there is none

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """What `encode` gives for a tensor: dtype and shape of each part."""
        ...

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Flat parts of flat, finite floats. CompressionError if they are out of range."""
        ...

    def decode(self, read: Read, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Elements `start`, a multiple of `block`, to `stop`, in `dtype`."""
        ...


class Cast:
    """x -> x rounded to the nearest number of a narrower floating-point type."""

    block = 1

    def __init__(self, code: str) -> None:
        self._code = code

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"values": TensorSpec("values", self._code, spec.shape)}

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(over="ignore"):
            narrow = values.astype(DTYPES[self._code])
        if not np.isfinite(narrow).all():
            raise CompressionError(
                f"a value of {np.abs(values).max():.3g} is beyond the range of {self._code}; "
                "choose compression=bf16 or int8"
            )
        return {"values": narrow}

    def decode(self, read: Read, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        return read("values", start, stop).astype(dtype)


class Quantized:
    """x -> round(x / s) * s with s = max |x| / m over each block, m = 2^(bits-1) - 1.

    Symmetric absmax quantization by block (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
    Quantization", section 2.1), to the nearest. With 4 bits, element 2 i is in the low and
    2 i + 1 in the high half of byte i, both in two's complement.
    """

    def __init__(self, bits: int, block: int) -> None:
        self._bits, self._most, self.block = bits, 2 ** (bits - 1) - 1, block

    def parts(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        blocks = -(-spec.elements // self.block)
        values = TensorSpec("values", "I8", spec.shape)
        if self._bits == 4:
            values = TensorSpec("values", "U8", ((spec.elements + 1) // 2,))
        return {"values": values, "scales": TensorSpec("scales", "F32", (blocks,))}

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        blocks = -(-values.size // self.block)
        padded = np.zeros(blocks * self.block, values.dtype)
        padded[: values.size] = values
        rows = padded.reshape(blocks, self.block)
        with np.errstate(over="ignore"):
            scales = (np.abs(rows).max(1) / self._most).astype(np.float32)
        if not np.isfinite(scales).all():
            raise CompressionError(f"a value of {np.abs(values).max():.3g} is beyond float32")
        divisors = np.where(scales == 0, np.float32(1), scales).astype(values.dtype)
        rows /= divisors[:, None]
        np.rint(rows, out=rows)
        np.clip(rows, -self._most, self._most, out=rows)
        rows[scales == 0] = 0  # too small for a scale
        whole = padded[: values.size].astype(np.int8)
        return {"values": _packed(whole) if self._bits == 4 else whole, "scales": scales}

    def decode(self, read: Read, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        first, last = start // self.block, -(-stop // self.block)
        scales = read("scales", first, last)
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise BadPayload("a scale is negative, NaN or infinite")
        if self._bits == 4:
            whole = _unpacked(read("values", start // 2, (stop + 1) // 2))[: stop - start]
        else:
            whole = read("values", start, stop)
        values = whole.astype(dtype)
        values *= np.repeat(scales.astype(dtype), self.block)[: values.size]
        return values


def _packed(whole: np.ndarray) -> np.ndarray:
    padded = np.zeros(whole.size + whole.size % 2, np.uint8)
    padded[: whole.size] = whole.view(np.uint8) & 15
    return padded[::2] | padded[1::2] << 4


def _unpacked(packed: np.ndarray) -> np.ndarray:
    pairs = np.stack([packed << 4, packed & 240], axis=1).reshape(-1)
    return pairs.view(np.int8) >> 4


CODEC: dict[str, Dense] = {
    "fp16": Cast("F16"),
    "bf16": Cast("BF16"),
    "int8": Quantized(8, 256),
    "int4": Quantized(4, 64),
}
