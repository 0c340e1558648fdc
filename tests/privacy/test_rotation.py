"""The public rotation: lengths kept, undone exactly, flat, and the same everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from fedipfs.privacy import rotation

SEED = bytes(range(32))
sizes = st.one_of(st.integers(1, 300), st.sampled_from([16_384, 16_385, 40_000]))


@settings(deadline=None, max_examples=40)
@given(sizes, st.sampled_from(["f4", "f8"]), st.integers(0, 99))
def test_lengths_and_angles_are_kept_and_it_is_undone(size, dtype, number):
    rng = np.random.default_rng(number)
    one, other = rng.normal(size=(2, size)).astype(dtype)
    tolerance = 1e-5 if dtype == "f4" else 1e-12
    rotated = rotation.rotate(one, SEED)
    assert rotated.shape == (rotation.padded(size),)
    assert rotated.dtype == one.dtype
    assert rotated @ rotation.rotate(other, SEED) == pytest.approx(
        one @ other, abs=tolerance * float(np.linalg.norm(one) * np.linalg.norm(other))
    )
    np.testing.assert_allclose(rotation.unrotate(rotated, SEED, size), one, atol=10 * tolerance)


@pytest.mark.parametrize("size", [1, 2, 8, 32])
def test_it_is_signs_then_hadamard(size):
    columns = np.stack([rotation.rotate(row, SEED) for row in np.eye(size)], axis=1)
    signs = columns[0] * np.sqrt(size)
    np.testing.assert_allclose(np.abs(signs), 1)
    np.testing.assert_allclose(columns, hadamard(size) / np.sqrt(size) * signs, atol=1e-12)


def test_blocks_do_not_mix():
    size = 3 * rotation.MOST_BLOCK
    values = np.zeros(size)
    values[rotation.MOST_BLOCK] = 1
    rotated = rotation.rotate(values, SEED).reshape(3, -1)
    np.testing.assert_allclose(np.abs(rotated[1]), rotation.MOST_BLOCK**-0.5)
    assert not rotated[[0, 2]].any()


def test_any_vector_becomes_flat():
    for values in (np.ones(40_000), np.arange(40_000.0), np.eye(1, 40_000)[0]):
        rotated = rotation.rotate(values / np.linalg.norm(values), SEED)
        assert np.abs(rotated).max() < np.sqrt(2 * np.log(2e9 * 40_000) / rotation.MOST_BLOCK)


def test_signs_are_the_same_on_every_machine():
    rotated = rotation.rotate(np.ones(16), SEED)
    bits = np.unpackbits(
        np.frombuffer(hashlib.shake_256(b"fedipfs rotation 1" + SEED).digest(2), np.uint8)
    )
    np.testing.assert_allclose(hadamard(16) @ rotated / 4, 1.0 - 2.0 * bits, atol=1e-12)
    assert "".join(map(str, bits)) == "0110000111101011"
    assert not np.allclose(rotation.rotate(np.ones(16), bytes(32)), rotated)


@pytest.mark.parametrize(
    ("dimension", "block", "padded"),
    [(1, 1, 1), (2, 2, 2), (3, 4, 4), (1000, 1024, 1024), (16_385, 16_384, 32_768)],
)
def test_padding(dimension, block, padded):
    assert rotation.block(dimension) == block
    assert rotation.padded(dimension) == padded
    assert rotation.padded(1_200_000) < 1.013 * 1_200_000


def test_misuse():
    with pytest.raises(ValueError, match="seed has 32 bytes, not 31"):
        rotation.rotate(np.ones(4), bytes(31))
    with pytest.raises(ValueError, match="5 rotated values come as 8"):
        rotation.unrotate(np.ones(5), SEED, 5)
