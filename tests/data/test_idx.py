"""The IDX parser, on good files and on hostile ones."""

from __future__ import annotations

import gzip
import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedipfs.data import idx
from fedipfs.errors import DataError


def encode(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6))


@given(arrays, st.booleans())
def test_what_is_written_is_read(tmp_path_factory, array, packed):
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(encode(array)) if packed else encode(array))
    got = idx.read(path)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, array)


@given(arrays, st.data())
def test_a_file_cut_anywhere_is_refused(array, data):
    whole = encode(array)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(DataError, match=r"cut short|not an IDX"):
        idx.parse(io.BytesIO(whole[:cut]), "x")


@given(arrays, st.binary(min_size=1, max_size=9))
def test_a_file_that_goes_on_is_refused(array, more):
    with pytest.raises(DataError, match="goes on"):
        idx.parse(io.BytesIO(encode(array) + more), "x")


@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda rest: b"\0\0\x08\x01" + rest))
def test_any_bytes_give_an_array_or_a_data_error(junk):
    try:
        assert idx.parse(io.BytesIO(junk), "x").dtype == np.uint8
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "start", [b"\0\0\x0d\x01", b"\0\0\x08\x00", b"\0\0\x08\x05", b"\x01\0\x08\x01"]
)
def test_other_types_and_dimensions_are_refused(start):
    with pytest.raises(DataError):
        idx.parse(io.BytesIO(start + bytes(40)), "x")


def test_a_header_that_asks_for_too_much_is_refused_before_memory_is_taken():
    bomb = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    with pytest.raises(DataError, match="at most"):
        idx.parse(io.BytesIO(bomb), "x")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    packed = bytearray(gzip.compress(encode(np.arange(200, dtype=np.uint8))))
    if damage == "cut":
        del packed[-12:]
    else:
        packed[-8] ^= 1  # its checksum
    path = tmp_path / "damaged.gz"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"damaged\.gz"):
        idx.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        idx.read(tmp_path / "nowhere")
