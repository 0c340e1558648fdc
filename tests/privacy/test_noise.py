"""Noise comes from AES in counter mode, and from nothing that code can seed."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedipfs.privacy import noise

# NIST SP 800-38A, appendix F.1.1: the key of all AES-128 examples.
NIST_KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")


def keystream(key: bytes, blocks: int) -> bytes:
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return b"".join(cipher.update(count.to_bytes(16, "little")) for count in range(blocks))


def test_the_stream_is_aes_in_counter_mode():
    raw = noise.generator(NIST_KEY).bit_generator.random_raw(2000)
    assert raw.tobytes() == keystream(NIST_KEY, 1000)


def test_seeding_every_global_generator_changes_nothing():
    def draw():
        np.random.seed(7)
        random.seed(7)
        return noise.generator().standard_normal(8)

    assert not np.array_equal(draw(), draw())


def test_a_given_key_repeats():
    draws = [noise.generator(NIST_KEY).standard_normal(8) for _ in range(2)]
    assert np.array_equal(*draws)


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_a_key_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"16 bytes, not {size}"):
        noise.generator(bytes(size))


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_samples_are_gaussian(scale):
    from scipy import stats

    values = noise.generator(NIST_KEY).normal(0, scale, 200_000)
    assert stats.kstest(values / scale, "norm").pvalue > 1e-3
