"""Numbers that travel masked beside the values: fixed-point, in several 32-bit coordinates each.

A number is a signed integer of 64 bits, 32 of them after the point, cut into limbs that are small
enough that no sum over all clients passes 32 bits. So sums are exact: integers below 2**31 in sum,
fractions to 2**-33 a client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedipfs.errors import BadUpdate

BITS, FRACTION = 64, 32


def limbs(clients: int) -> int:
    """Coordinates that a number takes with so many clients."""
    return -(-BITS // _limb_bits(clients))


def encode(name: str, value: float, clients: int) -> list[int]:
    """The limbs of a number, lowest first. Raises BadUpdate for NaN and what could overflow."""
    limit = 2.0 ** (BITS - FRACTION - 1) / clients
    if not abs(value) < limit:
        raise BadUpdate(
            f"{name}={value!r:.80} cannot be summed over {clients} clients under masks: keep it "
            f"between -{limit:g} and {limit:g}"
        )
    bits, whole = _limb_bits(clients), round(math.ldexp(value, FRACTION)) % (1 << BITS)
    return [whole >> start & ((1 << bits) - 1) for start in range(0, BITS, bits)]


def decode(sums: Sequence[int], clients: int) -> float:
    """The sum of all clients' numbers, from the sums of their limbs."""
    bits = _limb_bits(clients)
    whole = sum(int(each) << position * bits for position, each in enumerate(sums)) % (1 << BITS)
    signed = whole - (1 << BITS) if whole >> BITS - 1 else whole
    return math.ldexp(signed, -FRACTION)


def _limb_bits(clients: int) -> int:
    return 32 - (clients - 1).bit_length()
