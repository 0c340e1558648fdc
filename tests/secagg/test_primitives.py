"""Shamir, keys and masks against published vectors and the properties that they rest on."""

from __future__ import annotations

import hashlib
import hmac
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import WrongKeys, WrongShare
from fedipfs.secagg import keys, masks, shamir

SECRETS = st.binary(min_size=32, max_size=32)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", "").replace("\n", ""))


# Shamir


def test_the_prime_is_the_least_above_all_secrets():
    def is_prime(n: int) -> bool:  # Miller-Rabin with 40 bases
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in random.Random(1).sample(range(2, 1 << 60), 40):
            x = pow(base, odd, n)
            if x in (1, n - 1):
                continue
            for _ in range(twos - 1):
                x = x * x % n
                if x == n - 1:
                    break
            else:
                return False
        return True

    assert is_prime(shamir.PRIME) and shamir.PRIME > 2**256
    assert not any(is_prime(n) for n in range(2**256 + 1, shamir.PRIME, 2))


@settings(max_examples=60)
@given(SECRETS, st.data())
def test_any_threshold_of_shares_in_any_order_gives_the_secret(secret, data):
    count = data.draw(st.integers(1, 40))
    threshold = data.draw(st.integers(1, count))
    points = data.draw(st.lists(st.integers(1, 1800), min_size=count, max_size=count, unique=True))
    shares = dict(zip(points, shamir.split(secret, threshold, points), strict=True))
    some = data.draw(st.permutations(points))[:threshold]
    found = shamir.combine(shamir.coefficients(some), [shares[point] for point in some])
    assert found == secret


@settings(max_examples=30)
@given(SECRETS, SECRETS, st.integers(2, 20))
def test_one_share_less_leaves_every_candidate_possible(secret, candidate, threshold):
    # Exactly one value of a further share makes the others shares of the candidate.
    points = list(range(1, threshold + 1))
    known = shamir.split(secret, threshold, points)[:-1]
    weights = shamir.coefficients(points)
    partial = sum(w * shamir.element(s) for w, s in zip(weights, known, strict=False))
    wanted = int.from_bytes(candidate, "big")
    last = (wanted - partial) * pow(weights[-1], -1, shamir.PRIME) % shamir.PRIME
    share = last.to_bytes(shamir.SHARE, "big")
    assert shamir.combine(weights, [*known, share]) == candidate


def test_shares_against_a_plain_evaluation(monkeypatch):
    drawn = iter([5, 7])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda below: next(drawn))
    secret = bytes(31) + b"\x0b"
    shares = shamir.split(secret, 3, [1, 2, 300])  # 5 x^2 + 7 x + 11
    assert [int.from_bytes(each, "big") for each in shares] == [23, 45, 5 * 300**2 + 2111]


def test_lagrange_coefficients_against_their_definition():
    points = [3, 1, 4096, 65535, 77]
    for place, weight in enumerate(shamir.coefficients(points)):
        expected = 1
        for x in points[:place] + points[place + 1 :]:
            inverse = pow(x - points[place], -1, shamir.PRIME)
            expected = expected * x * inverse % shamir.PRIME
        assert weight == expected


def test_shares_that_fit_no_secret():
    points = [1, 2]
    weights = shamir.coefficients(points)
    top = (shamir.PRIME - 1).to_bytes(shamir.SHARE, "big")
    with pytest.raises(WrongShare, match="give no secret of 32 bytes"):
        shamir.combine(weights, [top, top])  # a constant polynomial of 2**256 + 296
    for bad in (b"", bytes(32), bytes(34), shamir.PRIME.to_bytes(33, "big"), b"\xff" * 33):
        with pytest.raises(WrongShare, match="no element of the field"):
            shamir.combine(weights, [bad, top])


@pytest.mark.parametrize(
    ("size", "threshold", "points"),
    [(31, 2, [1, 2]), (32, 0, [1, 2]), (32, 3, [1, 2]), (32, 2, [1, 1]), (32, 2, [0, 1])],
)
def test_misuse_of_shamir(size, threshold, points):
    with pytest.raises(ValueError):
        shamir.split(bytes(size), threshold, points)


# Keys


def test_x25519_vectors_of_rfc_7748():
    # Section 6.1.
    alice = unhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = unhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    publics = keys.public_of(alice), keys.public_of(bob)
    assert publics == (
        unhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"),
        unhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"),
    )
    shared = unhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert keys.Agreement(alice).exchange(publics[1], "bob") == shared
    assert keys.Agreement(bob).exchange(publics[0], "alice") == shared


def test_ed25519_vector_of_rfc_8032():
    # Section 7.1, test 1.
    key = Ed25519PrivateKey.from_private_bytes(
        unhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    assert key.public_key().public_bytes_raw() == (
        unhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    )
    assert key.sign(b"") == unhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555f"
        "b8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869 by the letter."""
    pseudorandom = hmac.digest(salt, secret, hashlib.sha256)
    found, block = b"", b""
    for number in range(1, -(-size // 32) + 1):
        block = hmac.digest(pseudorandom, block + info + bytes([number]), hashlib.sha256)
        found += block
    return found[:size]


def test_hkdf_vector_of_rfc_5869():
    # Appendix A.1.
    secret, salt, info = b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA))
    expected = unhex(
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert HKDF(SHA256(), 42, salt, info).derive(secret) == expected
    assert hkdf(secret, salt, info, 42) == expected
    info = b"fedipfs/secagg/v1/pair mask\0alpha\0beta"
    found = keys.derive(secret, "pair mask", salt, "alpha", "beta")
    assert found == hkdf(secret, salt, info, 32)


def test_every_word_of_a_derivation_counts():
    words = [("a", "b", "c"), ("ab", "c"), ("b", "a", "c"), ("a", "bc")]
    found = {keys.derive(bytes(32), *w[:1], bytes(32), *w[1:]) for w in words}
    found |= {keys.derive(bytes(32), "a", b"\1" * 32, "b", "c"), keys.commit(bytes(32), b"", "a")}
    found |= {keys.commit(bytes(32), bytes(32), "a"), keys.commit(bytes(32), bytes(32), "b")}
    assert len(found) == 8


def test_sealing_against_the_vector_of_gcm():
    # McGrew and Viega, "The Galois/Counter Mode of Operation", appendix B, test case 14.
    sealed = unhex("cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919")
    assert keys.seal(bytes(32), bytes(16), b"") == sealed
    assert keys.unseal(bytes(32), sealed, b"", "a") == bytes(16)
    for key, bad, binding in (
        (b"\1" * 32, sealed, b""),
        (bytes(32), sealed[:-1], b""),
        (bytes(32), b"", b""),
        (bytes(32), sealed, b"x"),
    ):
        with pytest.raises(WrongShare, match="what a sealed does not open"):
            keys.unseal(key, bad, binding, "a")


def test_keys_of_small_order():
    # All that X25519 maps to zero: these, with or without the bit that it ignores.
    agreement = keys.Agreement(bytes(range(32)))
    assert len(keys._SMALL_ORDER) == 7
    for point in keys._SMALL_ORDER:
        for value in (point, point + 2**255):
            public = value.to_bytes(32, "little")
            assert keys.is_weak(public)
            with pytest.raises(WrongKeys, match="the key of mallory is a point of small order"):
                agreement.exchange(public, "mallory")
    for point in range(2, 200):
        public = point.to_bytes(32, "little")
        assert not keys.is_weak(public)
        agreement.exchange(public, "alice")


def test_private_keys_are_not_shown():
    private = bytes(range(32))
    assert private.hex() not in repr(keys.Agreement(private))
    assert repr(private) not in repr(vars(keys.Agreement(private)))


# Masks


def test_the_counter_mode_vector_of_nist():
    # SP 800-38A, F.5.5.
    key = unhex("603deb1015ca71be2b73aef0857d7781 1f352c073b6108d72d9810a30914dff4")
    plain = unhex(
        "6bc1bee22e409f96e93d7e117393172a ae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52ef f69f2445df4f9b17ad2b417be66c3710"
    )
    counter = unhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    assert Cipher(AES256(key), CTR(counter)).encryptor().update(plain) == unhex(
        "601ec313775789a5b7a7f504bbf3d228 f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988d dfc9c58db67aada613c2dd08457941a6"
    )


def test_the_key_stream_starts_at_zero():
    # AESAVS, KeySbox256, number 0: the block of zeros under this key.
    key = unhex("c47b0294dbbbee0fec4757f22ffeee3587ca4730c3d33b691df38bab076bc558")
    words = masks.Keystream(key, masks.buffer()).words(4)
    assert words.tobytes() == unhex("46f2fb342d6f0ab477476fc501242c5f")
    assert words.dtype == np.uint32


def plain_stream(key: bytes, words: int) -> np.ndarray:
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(4 * words))
    return np.frombuffer(stream, "<u4").astype(np.uint64)


@pytest.mark.parametrize(
    "size", [0, 1, 3, 5, masks.TILE - 1, masks.TILE, masks.TILE + 1, 3 * masks.TILE + 7]
)
def test_masks_against_a_plain_key_stream(size):
    vector = np.random.default_rng(size).integers(0, 1 << 32, size, np.uint32)
    expected = vector.astype(np.uint64)
    one, two, three = (bytes([number]) * 32 for number in range(3))
    masks.apply(vector, add=[one, two], subtract=[three])
    expected += plain_stream(one, size) + plain_stream(two, size) - plain_stream(three, size)
    np.testing.assert_array_equal(vector, expected & 0xFFFFFFFF)
    masks.apply(vector, add=[three], subtract=[two, one])
    np.testing.assert_array_equal(vector, np.random.default_rng(size).integers(0, 1 << 32, size))


@pytest.mark.parametrize(
    "vector", [np.zeros(3, np.int32), np.zeros((2, 2), np.uint32), np.zeros(8, np.uint32)[::2]]
)
def test_masks_go_on_flat_uint32_only(vector):
    with pytest.raises(ValueError, match="flat vector of uint32"):
        masks.apply(vector, [bytes(32)])
