from __future__ import annotations

import io
import json
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import CidError, FormatError, UnixFSError
from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, RAW, car, dagpb, links, unixfs, varint

VECTORS = Path(__file__).parent / "vectors"
MIB = 1 << 20
REFERENCE = json.loads((VECTORS / "unixfs-v1-2025.json").read_text())
RAMP = bytes((7 * j) % 256 for j in range(256)) * (MIB // 256)


class Blocks(dict[CID, bytes]):
    """Blocks in memory."""

    def put(self, block: object, codec: int) -> CID:
        data = bytes(block)  # type: ignore[call-overload]
        cid = CID.of(data, codec)
        self[cid] = data
        return cid

    def get_block(self, cid: CID) -> bytes:
        return self[cid]


def pieces(size: int, pattern: str) -> Iterator[memoryview]:
    """The vectors' bytes (see vectors/README.md); equal pieces are the same object."""
    zeros, shifted = memoryview(bytes(MIB)), {}
    for k in range((size + MIB - 1) // MIB):
        piece = zeros
        if pattern == "ramp":
            shift = k % 256
            if shift not in shifted:
                table = bytes((i + k) % 256 for i in range(256))
                shifted[shift] = memoryview(RAMP.translate(table))
            piece = shifted[shift]
        yield piece[: size - k * MIB]


@pytest.mark.parametrize("vector", REFERENCE, ids=lambda v: f"{v['size']}-{v['pattern']}")
def test_equals_the_reference_importer(vector: dict[str, object]) -> None:
    known: dict[tuple[bytes, int], CID] = {}

    def put(block: memoryview | bytes, codec: int) -> CID:
        if codec != RAW:
            return CID.of(block, codec)
        key = bytes(block[:2]), len(block)  # which piece it is: hash each once
        if key not in known:
            known[key] = CID.of(block)
        return known[key]

    root = unixfs.build(pieces(vector["size"], vector["pattern"]), put)  # type: ignore[arg-type]
    assert str(root) == vector["cid"]


@pytest.mark.parametrize("vector", [v for v in REFERENCE if v["size"] < 9e6], ids=str)
def test_cid_of_streams_and_buffers(vector: dict[str, int | str]) -> None:
    data = b"".join(pieces(int(vector["size"]), str(vector["pattern"])))
    for source in (data, bytearray(data), io.BytesIO(data)):
        assert str(unixfs.cid_of(source)) == vector["cid"]
    assert str(unixfs.cid_of(data, threads=1)) == vector["cid"]


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=7), max_size=40), st.integers(1, 3))
def test_uneven_leaves_read_back(parts: list[bytes], threads: int) -> None:
    blocks = Blocks()
    root = unixfs.build(parts, blocks.put, threads)
    full = [part for part in parts if part] or [b""]
    assert list(unixfs.leaves(root, blocks.get_block)) == full
    assert unixfs.size(root, blocks.get_block) == sum(map(len, parts))
    assert unixfs.leaf_links(root, blocks.get_block) == [(CID.of(p), len(p)) for p in full]
    assert all(codec in (RAW, DAG_PB) for codec in (cid.codec for cid in blocks))


@pytest.mark.parametrize("count", [1, 2, 1023, 1024, 1025, 2048, 2049, 5000])
def test_wide_files_read_back(count: int) -> None:
    blocks = Blocks()
    parts = [b"%d" % i for i in range(count)]
    root = unixfs.build(parts, blocks.put)
    assert list(unixfs.leaves(root, blocks.get_block)) == parts
    widths = [len(dagpb.decode(b).links) for cid, b in blocks.items() if cid.codec == DAG_PB]
    assert max(widths, default=0) <= unixfs.MAX_LINKS


def test_three_levels_of_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """One leaf more than two full levels hold: 17 nodes, 2 above them, 1 root."""
    monkeypatch.setattr(unixfs, "MAX_LINKS", 16)
    leaf = CID.of(b"x")
    nodes: dict[CID, bytes] = {}
    written = 0

    def put(block: object, codec: int) -> CID:
        nonlocal written
        if codec == RAW:
            return leaf
        written += 1
        data = bytes(block)  # type: ignore[call-overload]
        cid = CID.of(data, codec)
        nodes[cid] = data
        return cid

    count = 16 * 16 + 1
    root = unixfs.build((b"x" for _ in range(count)), put)
    assert written == 17 + 2 + 1
    assert unixfs.size(root, nodes.__getitem__) == count
    assert [link.tsize for link in dagpb.decode(nodes[root]).links][1] == (
        1 + sum(len(block) for block in _chain(nodes, root))
    )


def _chain(nodes: dict[CID, bytes], root: CID) -> Iterator[bytes]:
    """The two nodes above the last leaf."""
    second = dagpb.decode(nodes[root]).links[1].cid
    yield nodes[second]
    yield nodes[dagpb.decode(nodes[second]).links[0].cid]


def test_memory_does_not_grow_with_the_file() -> None:
    zeros = bytes(1 << 16)
    leaf = CID.of(zeros)

    def put(block: object, codec: int) -> CID:
        return leaf if codec == RAW else CID.of(block, codec)  # type: ignore[arg-type]

    def peak(count: int) -> int:
        tracemalloc.start()
        unixfs.build((zeros for _ in range(count)), put)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(20_000) < peak(3_000) + 200_000


def test_leaves_are_lazy() -> None:
    blocks, got = Blocks(), []
    root = unixfs.build([b"%d" % i for i in range(900)], blocks.put)

    def get(cid: CID) -> bytes:
        got.append(cid)
        return blocks[cid]

    reading = unixfs.leaves(root, get)
    assert got == []
    assert [next(reading) for _ in range(2)] == [b"0", b"1"]
    assert len(got) == 3


def test_an_error_in_a_thread_comes_out_and_stops_the_rest() -> None:
    taken = []

    def put(block: object, codec: int) -> CID:
        if block == b"40":
            raise OSError("disk full")
        return CID.of(block, codec)  # type: ignore[arg-type]

    def parts() -> Iterator[bytes]:
        for i in range(900):
            taken.append(i)
            yield b"%d" % i

    with pytest.raises(OSError, match="disk full"):
        unixfs.build(parts(), put, threads=2)
    assert len(taken) < 60
    assert not [t for t in threading.enumerate() if t.name.startswith("fedipfs-ahead")]


def test_chunks_over_the_limit_are_refused() -> None:
    with pytest.raises(UnixFSError, match="cut it every"):
        unixfs.build([bytes(MIB + 1)], Blocks().put)


def test_chunk_cuts_buffers_without_copying_and_short_reads_whole() -> None:
    data = bytes(range(256)) * 10
    cut = list(unixfs.chunk(data, 1000))
    assert [bytes(piece) for piece in cut] == [data[:1000], data[1000:2000], data[2000:]]
    assert all(isinstance(piece, memoryview) and piece.obj is data for piece in cut)

    class Pipe(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 7))

    assert list(unixfs.chunk(Pipe(data), 1000)) == [data[:1000], data[1000:2000], data[2000:]]
    assert list(unixfs.chunk(b"")) == [] and list(unixfs.chunk(io.BytesIO())) == []


def test_reads_files_of_the_reference_importer() -> None:
    names = json.loads((VECTORS / "reference.json").read_text())
    with open(VECTORS / "reference.car", "rb") as file:
        blocks = Blocks(car.read(file)[1])
    data = bytes((7 * i) % 256 for i in range(1000))
    for profile in ("unixfs-v1-2025", "unixfs-v0-2015"):
        root = CID.parse(names[profile])
        assert b"".join(unixfs.leaves(root, blocks.get_block)) == data
        assert unixfs.size(root, blocks.get_block) == 1000
    assert b"".join(unixfs.leaves(CID.parse(names["meta"]), blocks.get_block)) == data[:50]
    with pytest.raises(UnixFSError, match="directory, not a file"):
        list(unixfs.leaves(CID.parse(names["dir"]), blocks.get_block))
    with pytest.raises(UnixFSError, match="data inside its nodes"):
        unixfs.leaf_links(CID.parse(names["unixfs-v0-2015"]), blocks.get_block)


# ---- hostile DAGs


def data_field(sizes: list[int], total: int | None = None) -> bytes:
    out = b"\x08\x02\x18" + varint.encode(sum(sizes) if total is None else total)
    return out + b"".join(b"\x20" + varint.encode(size) for size in sizes)


def node(blocks: Blocks, children: list[CID], data: bytes) -> CID:
    links = [dagpb.Link(child, "", 0) for child in children]
    return blocks.put(dagpb.encode(dagpb.Node(links, data)), DAG_PB)


def test_a_decompression_bomb_costs_nothing_until_read(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks()
    cid, size = blocks.put(bytes(1000), RAW), 1000
    for _ in range(5):
        cid = node(blocks, [cid] * 1000, data_field([size] * 1000))
        size *= 1000
    assert unixfs.size(cid, blocks.get_block) == 10**18
    reading = unixfs.leaves(cid, blocks.get_block)
    assert next(reading) == bytes(1000)
    monkeypatch.setattr(unixfs, "MAX_LEAVES", 30_000)  # the real limit takes seconds
    with pytest.raises(UnixFSError, match="more than 30000 leaves"):
        unixfs.leaf_links(cid, blocks.get_block)


def test_a_bomb_of_empty_parts_is_refused() -> None:
    blocks = Blocks()
    cid = blocks.put(b"", RAW)
    for _ in range(6):
        cid = node(blocks, [cid] * 1000, data_field([0] * 1000))
    for read in (unixfs.leaves, unixfs.leaf_links):
        with pytest.raises(UnixFSError, match="no bytes"):
            list(read(cid, blocks.get_block))


def test_chains_are_refused_at_a_depth() -> None:
    blocks = Blocks()
    cid = blocks.put(b"x", RAW)
    for _ in range(unixfs.MAX_DEPTH):
        cid = node(blocks, [cid], data_field([1]))
    assert b"".join(unixfs.leaves(cid, blocks.get_block)) == b"x"
    cid = node(blocks, [cid], data_field([1]))
    with pytest.raises(UnixFSError, match="deeper than 16"):
        list(unixfs.leaves(cid, blocks.get_block))


def count_gets(blocks: Blocks, root: CID, error: str) -> int:
    """Blocks fetched until both ways of reading refuse `root` with `error`; the larger number."""
    counts = []
    for read in (unixfs.leaves, unixfs.leaf_links):
        got = []

        def get(cid: CID, got: list[CID] = got) -> bytes:
            got.append(cid)
            return blocks[cid]

        with pytest.raises(UnixFSError, match=error):
            list(read(root, get))
        counts.append(len(got))
    return max(counts)


def test_many_chains_over_few_leaves_are_refused() -> None:
    blocks = Blocks()
    cid = blocks.put(b"x", RAW)
    for _ in range(14):
        cid = node(blocks, [cid], data_field([1]))
    root = node(blocks, [cid] * 30_000, data_field([1] * 30_000))
    assert count_gets(blocks, root, "too many nodes") < 100
    pair = node(blocks, [blocks.put(b"x", RAW)] * 2, data_field([1, 1]))
    root = node(blocks, [pair] * 30_000, data_field([2] * 30_000))
    assert count_gets(blocks, root, "too many nodes") < 500


@pytest.mark.parametrize("where", ["mtime", "link name", "many links"])
def test_nodes_with_padding_are_refused(where: str) -> None:
    blocks = Blocks()
    leaf = blocks.put(b"x", RAW)
    field, links = data_field([1]), [dagpb.Link(leaf, "", 1)]
    if where == "mtime":
        field += b"\x42" + varint.encode(2_000_000) + bytes(2_000_000)
    elif where == "link name":
        links = [dagpb.Link(leaf, "n" * 2_000_000, 1)]
    else:
        links, field = [dagpb.Link(leaf, "n" * 500, 1)] * 1000, data_field([1] * 1000)
    root = blocks.put(dagpb.encode(dagpb.Node(links, field)), DAG_PB)
    assert count_gets(blocks, root, "no part of a file") == 1
    with pytest.raises(UnixFSError, match="no part of a file"):
        unixfs.size(root, blocks.get_block)


def test_a_mode_and_a_time_are_no_padding() -> None:
    blocks = Blocks()
    leaf = blocks.put(b"x", RAW)
    time = b"\x08" + varint.encode(varint.MAX) + b"\x15\xff\xc9\x9a\x3b"
    field = data_field([1]) + b"\x38\xed\x03" + b"\x42" + varint.encode(len(time)) + time
    assert list(unixfs.leaves(node(blocks, [leaf], field), blocks.get_block)) == [b"x"]


@pytest.mark.parametrize(
    ("width", "leaves"), [(174, 174 * 3 + 1), (174, 31_000), (5, 3126), (2, 60)]
)
def test_narrow_balanced_files_read(
    monkeypatch: pytest.MonkeyPatch, width: int, leaves: int
) -> None:
    monkeypatch.setattr(unixfs, "MAX_LINKS", width)
    blocks = Blocks()
    root = unixfs.build((b"x" for _ in range(leaves)), blocks.put)
    assert sum(map(len, unixfs.leaves(root, blocks.get_block))) == leaves
    assert len(unixfs.leaf_links(root, blocks.get_block)) == leaves


@pytest.mark.parametrize("raw", [True, False])
def test_trickle_files_read(raw: bool) -> None:
    """As the reference importer lays them out: leaves, then four subtrees of each depth."""
    blocks = Blocks()
    left = 5000

    def leaf() -> tuple[CID, int]:
        if raw:
            return blocks.put(b"x", RAW), 1
        return node(blocks, [], b"\x08\x02\x12\x01x\x18\x01"), 1

    def tree(depth: int) -> tuple[CID, int]:
        nonlocal left
        parts = []
        for _ in range(min(left, 174)):
            parts.append(leaf())
            left -= 1
        for level in range(1, depth):
            for _ in range(4):
                if left:
                    parts.append(tree(level))
        sizes = [size for _, size in parts]
        return node(blocks, [cid for cid, _ in parts], data_field(sizes)), sum(sizes)

    root, size = tree(5)
    assert left == 0
    assert size == sum(map(len, unixfs.leaves(root, blocks.get_block))) == 5000


def test_sizes_that_do_not_add_up() -> None:
    blocks = Blocks()
    leaf = blocks.put(b"abc", RAW)
    inner = node(blocks, [leaf, leaf], data_field([3, 3]))
    wrong = [
        node(blocks, [leaf], data_field([4])),
        node(blocks, [leaf], data_field([3], total=4)),
        node(blocks, [leaf, leaf], data_field([3])),
        node(blocks, [leaf], data_field([3, 3])),
        node(blocks, [inner], data_field([5])),
        node(blocks, [leaf], b"\x08\x02\x20\x03"),  # no filesize
        node(blocks, [leaf], b"\x18\x03\x20\x03"),  # no type
        node(blocks, [leaf], b"\x08\x02\x18\x03\x20\x03\x18\x03"),  # out of order
        node(blocks, [leaf], b"\x08\x02\x18\x03\x20\x03\x4a\x00"),  # unknown field
        node(blocks, [leaf], b"\x08\x02\x18\x03\x22\x01\x03"),  # packed sizes
        node(blocks, [leaf], b"\x08\x04\x18\x03\x20\x03"),  # a symlink
        node(blocks, [leaf], b""),
        node(blocks, [blocks.put(b"\xa0", DAG_CBOR)], data_field([1])),
        blocks.put(b"\xa0", DAG_CBOR),
    ]
    for root in wrong:
        with pytest.raises(UnixFSError) as caught:
            list(unixfs.leaves(root, blocks.get_block))
        assert "\n" not in str(caught.value)


def test_blocks_over_two_mebibytes_are_refused() -> None:
    blocks = Blocks()
    cid = blocks.put(bytes(unixfs.MAX_BLOCK + 1), RAW)
    for read in (unixfs.leaves, unixfs.leaf_links):
        with pytest.raises(UnixFSError, match="the limit is"):
            list(read(cid, blocks.get_block))


@settings(max_examples=300)
@given(st.data())
def test_mutated_trees_give_at_most_the_declared_bytes_or_an_error(data: st.DataObject) -> None:
    blocks = Blocks()
    root = unixfs.build([b"%d" % i for i in range(30)], blocks.put)
    root = node(blocks, [root, root], data_field([50, 50]))
    block = bytearray(blocks[root])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(block) - 1))
        block[place] = data.draw(st.integers(0, 255))
    blocks[root] = bytes(block)  # as from a store that does not check
    try:
        declared = unixfs.size(root, blocks.get_block)
        assert sum(map(len, unixfs.leaves(root, blocks.get_block))) == declared
        assert sum(size for _, size in unixfs.leaf_links(root, blocks.get_block)) == declared
    except (UnixFSError, KeyError):
        pass


@settings(max_examples=300)
@given(st.binary(max_size=90), st.sampled_from([RAW, DAG_PB, DAG_CBOR, 0x0129]))
def test_links_of_any_bytes(data: bytes, codec: int) -> None:
    try:
        assert all(isinstance(link, CID) for link in links(CID.of(data, codec), data))
    except FormatError:
        assert codec != RAW


def test_links_of_an_unknown_codec() -> None:
    with pytest.raises(CidError, match="only raw, dag-pb and dag-cbor"):
        links(CID.of(b"{}", 0x0129), b"{}")
