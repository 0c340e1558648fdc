"""The records that keep blocks at a node."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, RAW, dagcbor, links
from fedipfs.store import held

cids = st.builds(
    CID, st.just(1), st.sampled_from([RAW, DAG_PB, DAG_CBOR]), st.binary(min_size=32, max_size=32)
)
names = st.text(st.characters(exclude_categories=["Cs"]))


@given(root=cids, name=names, recursive=st.booleans())
def test_pins_are_read_back(root: CID, name: str, recursive: bool) -> None:
    cid, block = held.pin_record(root, name, recursive)
    assert cid == CID.of(block, DAG_CBOR) == held.pin_record(root, name, recursive)[0]
    found = held.read(block)
    assert isinstance(found, held.Pin) and found[:2] == (root, name)
    # Of one raw block both kinds of pin keep the same.
    assert found.recursive == (recursive or root.codec == RAW)
    (link,) = links(cid, block)
    assert link == (root if recursive else CID(1, RAW, root.digest))


def test_every_name_and_root_has_its_own_record() -> None:
    a, b = CID.of(b"a", DAG_CBOR), CID.of(b"b", DAG_CBOR)
    records = {
        held.pin_record(root, name, recursive)[0]
        for root in (a, b)
        for name in ("", "x", "y")
        for recursive in (True, False)
    }
    assert len(records) == 12


def test_version_0_is_pinned_as_version_1() -> None:
    old = CID(0, DAG_PB, bytes(32))
    assert held.pin_record(old, "x", True) == held.pin_record(old.to_v1(), "x", True)


@given(blocks=st.lists(cids), since=st.integers(0, 2**40), lease=st.integers(0, 2**40))
def test_leases_are_read_back(blocks: list[CID], since: int, lease: int) -> None:
    cid, block = held.lease_record(blocks, held.Lease(since, since + lease))
    assert held.read(block) == held.Lease(since, since + lease)
    assert links(cid, block) == [CID(1, RAW, block.digest) for block in blocks]


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"\xff",
        b"\x81" * 100_000,
        dagcbor.encode(None),
        dagcbor.encode({"type": "fedipfs/pin/v1"}),
        dagcbor.encode({"type": "fedipfs/pin/v1", "name": "x", "codec": 85, "root": "text"}),
        dagcbor.encode({"type": "fedipfs/pin/v2", "name": "x", "codec": 85, "root": CID.of(b"")}),
        dagcbor.encode({"type": "fedipfs/lease/v1", "until": "tomorrow", "since": 5}),
        dagcbor.encode({"type": "fedipfs/lease/v1", "until": 1.5, "since": 5}),
    ],
)
def test_other_blocks_are_not_ours(block: bytes) -> None:
    assert held.read(block) is None


@pytest.mark.parametrize("codec", [-1, 2**64 - 1, True])
def test_a_pin_with_an_impossible_codec_is_not_ours(codec: int) -> None:
    value = {"type": "fedipfs/pin/v1", "name": "x", "codec": codec, "root": CID.of(b"")}
    assert held.read(dagcbor.encode(value)) is None


@given(st.binary(max_size=200))
def test_any_bytes_can_be_looked_at(block: bytes) -> None:
    held.read(block)
