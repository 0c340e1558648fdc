from __future__ import annotations

from pathlib import Path

import pytest

from fedipfs.errors import StoreUnusable
from fedipfs.ipld import CID, DAG_PB
from fedipfs.store import FolderStore


def test_pins_are_listed_renamed_and_removed(store: FolderStore) -> None:
    a, b = store.put(b"a"), store.put(b"b", DAG_PB)
    store.pin(a, "run 1\nline ü")
    store.pin(b)
    assert store.pins() == {a: "run 1\nline ü", b: ""}
    store.pin(a, "run 2")
    assert FolderStore(store.path).pins() == {a: "run 2", b: ""}
    store.unpin(a)
    store.unpin(a)
    assert store.pins() == {b: ""}
    old = CID(0, DAG_PB, b.digest)
    store.pin(old, "as version 0")
    assert store.pins()[old] == "as version 0"


def test_a_pin_without_its_name_still_pins(store: FolderStore) -> None:
    a = store.put(b"a")
    store.pin(a, "name")
    for content in (b"", b"{", b"[1]", b'{"name": 3}', b"\xff", b"[" * 60000):
        (store.path / "pins" / str(a)).write_bytes(content)
        assert store.pins() == {a: ""}


def test_a_stranger_among_the_pins_is_named(store: FolderStore) -> None:
    (store.path / "pins" / "notes.txt").write_text("x")
    with pytest.raises(StoreUnusable, match=r"notes\.txt is not a pin"):
        store.pins()
    with pytest.raises(StoreUnusable):
        store.gc(0)  # what it may stand for must not be removed


def test_pins_survive_where_the_folder_is_missing(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "s", durable=False)
    (tmp_path / "s" / "pins").rmdir()
    assert store.pins() == {}
    store.pin(store.put(b"a"), "n")
    assert list(store.pins().values()) == ["n"]
