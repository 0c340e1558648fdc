"""Shamir, keys and masks against published vectors and the properties that they rest on."""

from __future__ import annotations

import hashlib
import hmac
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
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
    points = data.draw(st.lists(st.integers(1, 4096), min_size=count, max_size=count, unique=True))
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
    alice = unhex("77076d0a7318a57d3c16c17251b26645 0df1b1e3c7b6a3d3b4c9d9c0a8e7b6c5"[:0]) or unhex(
        "77076d0a7318a57d3c16c17251b26645df4c2f92ebc099708f9f4be3d3b1f1a6"[:0]
    )
    assert alice == b""
