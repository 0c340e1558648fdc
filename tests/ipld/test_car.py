from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import CarError
from fedipfs.ipld import CID, DAG_CBOR, RAW, car, dagcbor, varint

VECTORS = Path(__file__).parent / "vectors"

blocks = st.lists(
    st.tuples(st.sampled_from([RAW, DAG_CBOR]), st.binary(max_size=50)), max_size=6
).map(lambda items: [(CID.of(data, codec), data) for codec, data in items])


def whole(roots: list[CID], content: list[tuple[CID, bytes]]) -> bytes:
    return b"".join(car.write(roots, content))


def parse(data: bytes) -> tuple[list[CID], list[tuple[CID, bytes]]]:
    roots, content = car.read(io.BytesIO(data))
    return roots, list(content)


@given(blocks)
def test_round_trip(content: list[tuple[CID, bytes]]) -> None:
    roots = [cid for cid, _ in content[:2]]
    assert parse(whole(roots, content)) == (roots, content)


def test_reads_the_reference_writer() -> None:
    names = json.loads((VECTORS / "reference.json").read_text())
    data = (VECTORS / "reference.car").read_bytes()
    roots, content = parse(data)
    assert [str(root) for root in roots] == [names["record"], names["meta"], names["dir"]]
    assert len(content) == 26
    assert whole(roots, content) == data


def test_streams_that_give_a_byte_at_a_time() -> None:
    class Dribble(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 1))

    block = b"hello" * 10
    data = whole([CID.of(block)], [(CID.of(block), block)])
    roots, content = car.read(Dribble(data))
    assert (roots, list(content)) == ([CID.of(block)], [(CID.of(block), block)])


@settings(max_examples=200)
@given(blocks, st.data())
def test_every_cut_is_noticed(content: list[tuple[CID, bytes]], data: st.DataObject) -> None:
    stream = whole([], content)
    ends = {0}
    position = len(whole([], []))
    ends.add(position)
    for cid, block in content:
        position += len(varint.encode(len(cid.bytes) + len(block))) + len(cid.bytes) + len(block)
        ends.add(position)
    cut = data.draw(st.integers(0, len(stream)))
    if cut in ends and cut:
        assert len(parse(stream[:cut])[1]) <= len(content)
    else:
        with pytest.raises(CarError):
            parse(stream[:cut])


@settings(max_examples=300)
@given(blocks, st.data())
def test_mutations_never_give_a_wrong_block(
    content: list[tuple[CID, bytes]], data: st.DataObject
) -> None:
    stream = bytearray(whole([CID.of(b"")], content))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        _, found = parse(bytes(stream))
    except CarError:
        return
    assert all(CID.of(block, cid.codec) == cid.to_v1() for cid, block in found)


@settings(max_examples=300)
@given(st.binary(max_size=120))
def test_any_bytes_give_blocks_or_an_error(data: bytes) -> None:
    try:
        _, found = parse(data)
    except CarError:
        return
    assert all(cid.matches(block) for cid, block in found)


def test_a_damaged_block_is_named_after_the_good_ones() -> None:
    good, bad = CID.of(b"good"), CID.of(b"bad")
    _, found = car.read(io.BytesIO(whole([good], [(good, b"good"), (bad, b"BAD")])))
    assert next(found) == (good, b"good")
    with pytest.raises(CarError, match=f"block 1 does not hash to its CID {bad}"):
        next(found)


def header(value: object) -> bytes:
    block = dagcbor.encode(value)
    return varint.encode(len(block)) + block


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\0", "0 bytes"),
        (b"<html>nothing</html>", "cut short|bad header"),
        (varint.encode(car.MAX_HEADER + 1) + b"a", "limit"),
        (b"\xff" * 20, "longer than 9"),
        (header({"version": 2}), "version 2 is not supported"),
        (header({"version": 1}), "without a list of roots"),
        (header({"version": 1, "roots": [1]}), "without a list of roots"),
        (header([1]), "version None"),
        (header({"version": 1, "roots": []}) + b"\0", "block 0 of 0 bytes"),
        (header({"version": 1, "roots": []}) + varint.encode(1 << 40), "limit"),
        (header({"version": 1, "roots": []}) + b"\x02\x01\x55", "no valid CID"),
    ],
)
def test_errors_name_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(CarError, match=message) as caught:
        parse(data)
    assert "\n" not in str(caught.value)


def test_memory_is_bounded_whatever_lengths_are_declared() -> None:
    asked: list[int] = []

    class Endless:
        def __init__(self, head: bytes) -> None:
            self.head = io.BytesIO(head)

        def read(self, size: int, /) -> bytes:
            asked.append(size)
            return self.head.read(size) or bytes(size)

    huge = header({"version": 1, "roots": []}) + varint.encode(1 << 60)
    for head in (huge, varint.encode(1 << 60)):
        with pytest.raises(CarError):
            list(car.read(Endless(head))[1])
    assert max(asked) <= car.MAX_BLOCK + 64
