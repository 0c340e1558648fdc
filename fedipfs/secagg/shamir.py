"""Shamir's secret sharing (1979): any t shares give a 32-byte secret, t - 1 say nothing about it.

Over the field of the prime 2**256 + 297, the least above all secrets, in Python's integers. Their
time depends a little on the values: share where no adversary can measure it to the microsecond.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

from fedipfs.errors import WrongShare

PRIME = 2**256 + 297
SECRET, SHARE = 32, 33  # bytes

_STEPS = 32  # of Horner's rule between two reductions


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Shares of 33 bytes of a 32-byte secret, one for each of the distinct points (1 or more).

    The polynomial's other `threshold` - 1 coefficients come from `secrets`. Raises ValueError for
    a secret of another size, a threshold beyond 1 to len(points), and points that are not distinct
    or not in 1 to 65535.
    """
    if len(secret) != SECRET:
        raise ValueError(f"a secret has {SECRET} bytes, not {len(secret)}")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} of {len(points)} shares")
    _check(points)
    polynomial = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    polynomial.append(int.from_bytes(secret, "big"))
    # Points are small: between reductions Horner's rule multiplies by one machine word only.
    parts = [polynomial[start : start + _STEPS] for start in range(0, threshold, _STEPS)]
    shares = []
    for point in points:
        value = 0
        for part in parts:
            for coefficient in part:
                value = value * point + coefficient
            value %= PRIME
        shares.append(value.to_bytes(SHARE, "big"))
    return shares


def coefficients(points: Sequence[int]) -> list[int]:
    """Lagrange's coefficients at 0 for shares at these points: for all secrets that they share.

    The i-th is the product of x_j / (x_j - x_i) over j != i, modulo the prime. Raises ValueError
    for points as `split` does.
    """
    _check(points)
    numerator = math.prod(points) % PRIME
    below = [math.prod([one - x for one in points if one != x]) * x % PRIME for x in points]
    return [numerator * inverse % PRIME for inverse in _inverses(below)]


def combine(weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The 32-byte secret, from `coefficients` of exactly `threshold` points and their shares.

    Wrong shares give a wrong secret: compare it with a commitment. Raises WrongShare where they
    give none at all, and for shares that are no field elements.
    """
    value = sum(w * element(share) for w, share in zip(weights, shares, strict=True)) % PRIME
    if value >> 8 * SECRET:
        raise WrongShare("the shares do not fit each other: they give no secret of 32 bytes")
    return value.to_bytes(SECRET, "big")


def element(share: bytes) -> int:
    """A share as an element of the field. Raises WrongShare."""
    value = int.from_bytes(share, "big")
    if len(share) != SHARE or value >= PRIME:
        raise WrongShare(f"a share of {len(share)} bytes is no element of the field")
    return value


def _check(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(0 < point < 1 << 16 for point in points):
        raise ValueError("points are distinct integers from 1 to 65535")


def _inverses(values: Sequence[int]) -> list[int]:
    """The inverses of all values for the price of one (Montgomery 1987)."""
    before, product = [], 1
    for value in values:
        before.append(product)
        product = product * value % PRIME
    inverse, found = pow(product, -1, PRIME), []
    for value, product in zip(reversed(values), reversed(before), strict=True):
        found.append(inverse * product % PRIME)
        inverse = inverse * value % PRIME
    return found[::-1]
