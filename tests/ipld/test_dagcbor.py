from __future__ import annotations

import random
from typing import Any

import libipld
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedipfs.errors import DagCborError
from fedipfs.ipld import CID, DAG_CBOR, RAW, dagcbor, links

cids = st.builds(lambda data: CID.of(data, DAG_CBOR), st.binary(max_size=4))
lookalikes = cids.map(lambda cid: cid.bytes)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.text(max_size=30)
    | st.floats(allow_nan=False, allow_infinity=False) | st.binary(max_size=40) | lookalikes | cids
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)


@given(values)
def test_round_trip_types_included(value: Any) -> None:
    again = dagcbor.decode(dagcbor.encode(value))
    assert again == value and _types(again) == _types(value)


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _types(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_types(item) for item in value]
    return type(value)


@given(values)
def test_a_maintained_library_reads_what_is_written(value: Any) -> None:
    def plain(item: Any) -> Any:  # libipld shows links as bytes
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [plain(inner) for inner in item]
        return item.bytes if isinstance(item, CID) else item

    assert libipld.decode_dag_cbor(dagcbor.encode(value)) == plain(value)


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 9), min_size=2), st.randoms())
def test_order_of_keys_does_not_matter(value: dict[str, int], order: random.Random) -> None:
    keys = list(value)
    order.shuffle(keys)
    assert dagcbor.encode({key: value[key] for key in keys}) == dagcbor.encode(value)


def test_known_encodings() -> None:
    assert dagcbor.encode({"bb": 1, "a": [True, None, -1, 1.5]}).hex() == (
        "a26161" + "84f5f620fb3ff8000000000000" + "626262" + "01"
    )
    cid = CID.of(b"")
    assert dagcbor.encode(cid) == b"\xd8\x2a\x58\x25\x00" + cid.bytes
    assert dagcbor.encode(cid.bytes) == b"\x58\x24" + cid.bytes
    for length in (0, 23, 24, 255, 256, 65535, 65536):
        for value in (b"x" * length, "x" * length, [0] * length):
            assert dagcbor.encode(value) == libipld.encode_dag_cbor(value)


def test_random_signatures_stay_bytes() -> None:
    # Also the one in a thousand that libipld would write as a link.
    source = random.Random(0)
    for _ in range(5000):
        signature = source.randbytes(64)
        assert dagcbor.decode(dagcbor.encode({"signature": signature})) == {"signature": signature}


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 2**64, -(2**64) - 1, {1: 2}, {b"a": 1}, object(),
     {1, 2}, "\ud800", {"\ud800": 1}, [object()], 1j, range(3)],
)  # fmt: skip
def test_values_it_cannot_hold(value: Any) -> None:
    with pytest.raises(DagCborError) as caught:
        dagcbor.encode(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    ["", "1800", "190001", "0000", "f7", "f97e00", "f93c00", "fa3f800000", "fb7ff8000000000000",
     "fb7ff0000000000000", "9fff", "bf00ff", "5f4101ff", "7f6101ff", "c100", "d82a4100", "d82a00",
     "a2616101616102", "a2626262016161", "a10001", "9b00ffffffffffffff", "5b00ffffffffffffff",
     "bb00ffffffffffffff", "7b00ffffffffffffff", "61ff", "ff", "1c", "d82a5825001220" + "00" * 31,
     "d82a45000155a0e4", "5818" + "00" * 24 + "00", "580100", "d82a5827000171122000" + "00" * 33],
)  # fmt: skip
def test_bytes_that_are_not_canonical(text: str) -> None:
    with pytest.raises(DagCborError):
        dagcbor.decode(bytes.fromhex(text))


def test_deep_nesting_is_refused_both_ways() -> None:
    for depth in (130, 1000, 10**6):
        for block in (b"\x81" * depth + b"\0", b"\xa1\x61a" * depth + b"\0", b"\x81" * depth):
            with pytest.raises(DagCborError):
                dagcbor.decode(block)
    value: list[Any] = []
    value.append(value)
    with pytest.raises(DagCborError, match="deeper than 128"):
        dagcbor.encode(value)
    nested: Any = 1
    for _ in range(128):
        nested = [nested]
    assert dagcbor.decode(dagcbor.encode(nested)) == nested


def test_blocks_over_the_limit_are_refused() -> None:
    with pytest.raises(DagCborError, match="limit"):
        dagcbor.decode(bytes(dagcbor.MAX_BLOCK + 1))


@settings(max_examples=500)
@given(st.binary(max_size=80))
@example(b"\xd8\x2a\x58\x27\x00" + CID.of(b"").bytes + b"xx")
def test_any_bytes_give_a_canonical_value_or_an_error(data: bytes) -> None:
    try:
        value = dagcbor.decode(data)
    except DagCborError:
        return
    assert dagcbor.encode(value) == data


@settings(max_examples=300)
@given(values, st.data())
def test_mutated_blocks_give_a_canonical_value_or_an_error(value: Any, data: st.DataObject) -> None:
    block = bytearray(dagcbor.encode(value))
    for _ in range(data.draw(st.integers(1, 3))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = dagcbor.decode(bytes(block))
    except DagCborError:
        return
    assert dagcbor.encode(again) == bytes(block)


def test_links_of_a_record_in_order() -> None:
    a, b = CID.of(b"a"), CID.of(b"b")
    block = dagcbor.encode({"x": [a, {"y": b}], "z": a, "bytes": b.bytes})
    assert links(CID.of(block, DAG_CBOR), block) == [a, b, a]
    assert links(CID.of(block, RAW), block) == []
