from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest

from fedipfs.errors import BlockCorrupt, BlockNotFound, CarError, DagCborError, UnixFSError
from fedipfs.ipld import CID, car, unixfs
from fedipfs.store import FolderStore, Store, dag

REFERENCE = Path(__file__).parents[1] / "ipld" / "vectors"


def test_files_round_trip(store: Store, tmp_path: Path) -> None:
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5_000_000):
        data = random.Random(size).randbytes(size)
        (tmp_path / "file").write_bytes(data)
        root = dag.add_file(store, tmp_path / "file")
        assert root == unixfs.cid_of(data) == dag.add(store, unixfs.chunk(data))
        assert b"".join(dag.cat(store, root)) == data


def test_a_file_that_is_not_there(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dag.add_file(store, tmp_path / "absent")


def test_damage_below_a_file_is_never_returned(store: FolderStore) -> None:
    root = unixfs.build([b"aa", b"bb", b"cc"], store.put)
    (path,) = store.path.glob(f"blocks/*/{CID.of(b'bb')}")
    path.write_bytes(b"bB")
    reading = dag.cat(store, root)
    assert next(reading) == b"aa"
    with pytest.raises(BlockCorrupt, match=str(CID.of(b"bb"))):
        next(reading)
    path.unlink()
    with pytest.raises(BlockNotFound, match=str(CID.of(b"bb"))):
        list(dag.cat(store, root))


def test_records_keep_their_links(store: Store) -> None:
    model = store.put(b"model")
    value = {"model": model, "round": 3, "loss": 0.5, "signature": model.bytes, "none": None}
    cid = dag.put_record(store, value)
    assert dag.get_record(store, cid) == value
    assert cid == dag.put_record(store, dict(reversed(value.items())))
    with pytest.raises(DagCborError, match="not a record"):
        dag.get_record(store, model)
    with pytest.raises(UnixFSError, match="not a UnixFS file"):
        list(dag.cat(store, cid))


def test_walk_visits_each_once_parents_first(store: Store) -> None:
    shared = unixfs.build([b"a", b"a", b"b"], store.put)
    left = dag.put_record(store, [shared, 1])
    root = dag.put_record(store, {"l": left, "r": [shared, left]})
    assert list(dag.walk(store, root)) == [root, left, shared, CID.of(b"a"), CID.of(b"b")]


def test_walking_a_bomb_visits_its_few_blocks(store: Store) -> None:
    cid = store.put(b"x")
    for _ in range(40):
        cid = dag.put_record(store, [cid] * 100)
    assert len(list(dag.walk(store, cid))) == 41


def test_walk_is_not_limited_by_depth(store: Store) -> None:
    head = None
    for number in range(3000):
        head = dag.put_record(store, {"parent": head, "round": number})
    assert head is not None
    assert sum(1 for _ in dag.walk(store, head)) == 3000


def test_car_carries_everything_once(store: FolderStore, tmp_path: Path) -> None:
    model = unixfs.build([b"a", b"b", b"a"], store.put)
    roots = [dag.put_record(store, {"model": model}), model]
    file = io.BytesIO()
    dag.export_car(store, roots, file)
    other = FolderStore(tmp_path / "other")
    file.seek(0)
    assert dag.import_car(other, file) == roots
    assert sorted(other) == sorted(store)
    assert b"".join(dag.cat(other, model)) == b"aba"
    again = io.BytesIO()
    dag.export_car(other, roots, again)
    assert again.getvalue() == file.getvalue()
    with pytest.raises(BlockNotFound):
        dag.export_car(store, [CID.of(b"absent")], io.BytesIO())


def test_a_damaged_car_stores_only_whole_blocks(store: FolderStore, tmp_path: Path) -> None:
    root = unixfs.build([b"%d" % i for i in range(50)], store.put)
    file = io.BytesIO()
    dag.export_car(store, [root], file)
    data = file.getvalue()
    for place in range(60, len(data), 397):
        other = FolderStore(tmp_path / str(place), durable=False)
        with pytest.raises(CarError):
            dag.import_car(other, io.BytesIO(data[:place] + bytes([data[place] ^ 1]) + b""))
        report = other.verify()
        assert report.damaged == [] and set(other) <= set(store)


def test_a_car_that_was_cut_between_blocks_is_refused(store: FolderStore, tmp_path: Path) -> None:
    leaves = [b"a", b"b", b"c"]
    root = unixfs.build(leaves, store.put)
    blocks = [(cid, store.get(cid)) for cid in dag.walk(store, root)]
    for come in range(4):
        cut = io.BytesIO(b"".join(car.write([root], blocks[:come])))
        other = FolderStore(tmp_path / str(come))
        with pytest.raises(CarError, match=f"lacks {4 - come if come else 1} blocks"):
            dag.import_car(other, cut)
        assert len(list(other)) == come
    rest = io.BytesIO(b"".join(car.write([root], blocks[:2])))
    assert dag.import_car(store, rest) == [root], "the others are here already"


def test_a_car_of_the_reference_writer(store: Store) -> None:
    names = json.loads((REFERENCE / "reference.json").read_text())
    with open(REFERENCE / "reference.car", "rb") as file:
        roots = dag.import_car(store, file)
    assert [str(root) for root in roots] == [names["record"], names["meta"], names["dir"]]
    record = dag.get_record(store, roots[0])
    data = bytes((7 * i) % 256 for i in range(1000))
    assert str(record["file"]) == names["unixfs-v1-2025"]
    assert record["looks"] == record["file"].bytes  # bytes that look like a link stay bytes
    for cid in (record["file"], record["nested"]["aa"][0]):
        assert b"".join(dag.cat(store, cid)) == data
    assert record["list"] == [1, -1, 2**40, 1.5, True, None, "text", b"\x01\x02\x03"]
    file = io.BytesIO()
    dag.export_car(store, roots, file)  # with CIDs of version 0
    file.seek(0)
    again, blocks = car.read(file)
    reached = {cid for root in roots for cid in dag.walk(store, root)}
    assert again == roots and {cid for cid, _ in blocks} == reached
