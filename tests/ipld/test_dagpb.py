from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import UnixFSError
from fedipfs.ipld import CID, DAG_PB, dagpb, links

nodes = st.builds(
    lambda items, data: dagpb.Node(tuple(items), data),
    st.lists(
        st.builds(
            dagpb.Link,
            st.binary(max_size=3).map(CID.of),
            st.none() | st.text(max_size=8),
            st.none() | st.integers(0, 2**63 - 1),
        ),
        max_size=4,
    ),
    st.none() | st.binary(max_size=20),
)
CID_FIELD = b"\x0a\x24" + CID.of(b"").bytes


def link(body: bytes) -> bytes:
    return b"\x12" + bytes((len(body),)) + body


@given(nodes)
def test_round_trip(node: dagpb.Node) -> None:
    block = dagpb.encode(node)
    assert dagpb.decode(block) == node
    assert links(CID.of(block, DAG_PB), block) == [item.cid for item in node.links]


@pytest.mark.parametrize(
    "block",
    [
        b"\x0a\x01a" + link(CID_FIELD),  # data before links
        link(CID_FIELD) + b"\x0a\x01a\x0a\x01a",  # data twice
        link(b""),  # no hash
        link(b"\x12\x00"),
        link(b"\x12\x00" + CID_FIELD),  # out of order
        link(CID_FIELD + CID_FIELD),
        link(CID_FIELD + b"\x18\x80\x00"),  # varint not shortest
        link(CID_FIELD + b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        link(CID_FIELD + b"\x12\x01\xff"),  # not UTF-8
        link(CID_FIELD + b"\x22\x00"),  # unknown field
        link(b"\x0a\x03abc"),  # not a CID
        b"\x1a\x00",
        b"\x12\x05\x0a",
        b"\x12",
        b"\x0a\x80\x80\x80\x80\x80\x80\x01",
        bytes(dagpb.MAX_BLOCK + 1),
    ],
)
def test_blocks_that_are_not_canonical(block: bytes) -> None:
    with pytest.raises(UnixFSError) as caught:
        dagpb.decode(block)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@settings(max_examples=400)
@given(st.binary(max_size=100))
def test_any_bytes_give_a_canonical_node_or_an_error(data: bytes) -> None:
    try:
        node = dagpb.decode(data)
    except UnixFSError:
        return
    assert dagpb.encode(node) == data


@settings(max_examples=300)
@given(nodes, st.data())
def test_mutated_blocks_give_a_canonical_node_or_an_error(
    node: dagpb.Node, data: st.DataObject
) -> None:
    block = bytearray(dagpb.encode(node) or b"\0")
    block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = dagpb.decode(bytes(block))
    except UnixFSError:
        return
    assert dagpb.encode(again) == bytes(block)
