"""The fingerprint of a data set: what it depends on, and what it does not."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import DataError
from fedipfs.privacy import fingerprint as module
from fedipfs.privacy.fingerprint import fingerprint

SOURCE = np.random.default_rng(0)
INPUTS = SOURCE.integers(0, 256, (50, 4, 3), dtype=np.uint8)
TARGETS = SOURCE.integers(0, 10, 50)


def written_down(inputs: np.ndarray, targets: np.ndarray) -> str:
    """As its docstring says, record by record."""
    header = "\n".join(
        [
            "fedipfs-data-set/v1",
            f"{inputs.dtype.newbyteorder('<').str} {inputs.shape[1:]}",
            f"{targets.dtype.newbyteorder('<').str} {targets.shape[1:]}",
            f"{len(inputs)}",
            "",
        ]
    )
    records = (
        one.astype(one.dtype.newbyteorder("<")).tobytes()
        + other.astype(other.dtype.newbyteorder("<")).tobytes()
        for one, other in zip(inputs, targets, strict=True)
    )
    digests = sorted(hashlib.sha256(record).digest() for record in records)
    return hashlib.sha256(header.encode() + b"".join(digests)).hexdigest()


def test_a_frozen_fingerprint() -> None:
    # Ledgers are kept under these names for years: they never change.
    inputs = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    assert fingerprint(inputs, np.array([1, 0, 1])) == (
        "6c50acc4d7dc4abe1ada4bc9f45cf07e978cecb3cd5dc05c6c3886bd485ecc53"
    )


dtypes = st.sampled_from(["u1", "<f4", ">f4", "<i8", ">u2", "?", "f2", "c8"])


@given(st.integers(1, 40), st.lists(st.integers(1, 3), max_size=3), dtypes, dtypes, st.data())
@settings(max_examples=60)
def test_any_arrays_in_any_order(
    count: int, shape: list[int], dtype: str, other: str, data: st.DataObject
) -> None:
    source = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    inputs = source.integers(0, 3, (count, *shape)).astype(dtype)
    targets = source.integers(0, 3, count).astype(other)
    order = source.permutation(count)
    found = fingerprint(inputs, targets)
    assert found == fingerprint(inputs[order], targets[order]) == written_down(inputs, targets)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(INPUTS, TARGETS)
    for size in (1, 20, 100, 333):
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
        assert fingerprint(INPUTS, TARGETS) == whole


def test_views_and_byte_orders_do_not_matter() -> None:
    wide = INPUTS.astype(np.float32)
    whole = fingerprint(wide, TARGETS)
    assert fingerprint(np.asfortranarray(wide), TARGETS.astype(">i8")) == whole
    assert fingerprint(wide.astype(">f4")[::-1], TARGETS[::-1]) == whole


def test_all_content_matters() -> None:
    changed, moved = INPUTS.copy(), TARGETS.copy()
    changed[7, 1, 1] += 1
    moved[[3, 4]] = moved[4], moved[3] + 1
    prints = [
        fingerprint(*each)
        for each in (
            (INPUTS, TARGETS),
            (changed, TARGETS),
            (INPUTS, moved),
            (INPUTS[:-1], TARGETS[:-1]),
            (np.concatenate([INPUTS, INPUTS[:1]]), np.concatenate([TARGETS, TARGETS[:1]])),
            (np.concatenate([INPUTS, INPUTS[1:2]]), np.concatenate([TARGETS, TARGETS[1:2]])),
            (INPUTS.reshape(50, 12), TARGETS),
            (INPUTS.astype(np.int8), TARGETS),
            (INPUTS, TARGETS.astype(np.int32)),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(each) == 64 for each in prints)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (INPUTS, TARGETS[:-1]),
        (INPUTS[:0], TARGETS[:0]),
        (np.zeros((5, 0)), np.zeros(5)),
        (np.float32(1), np.zeros(1)),
        (np.array(["a", "b"]), np.zeros(2)),
        (np.array([None, {}]), np.zeros(2)),
    ],
)
def test_arrays_without_a_fingerprint(inputs: np.ndarray, targets: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"give (numbers|as many rows)"):
        fingerprint(inputs, targets)
