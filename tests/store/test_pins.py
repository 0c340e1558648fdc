from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.errors import StoreUnusable
from fedipfs.ipld import CID, DAG_PB
from fedipfs.store import FolderStore


def test_pins_are_listed_and_removed(store: FolderStore) -> None:
    a, b = store.put(b"a"), store.put(b"b", DAG_PB)
    store.pin(a, "run 1\nline ü")
    store.pin(b)
    assert store.pins() == {a: ("run 1\nline ü",), b: ("",)}
    store.pin(a, "run 2")
    store.pin(a, "run 2")
    assert FolderStore(store.path).pins() == {a: ("run 1\nline ü", "run 2"), b: ("",)}
    assert store.stat().pins == 2
    store.unpin(a)
    store.unpin(a)
    assert store.pins() == {b: ("",)}
    old = CID(0, DAG_PB, b.digest)
    store.pin(old, "as version 0")
    assert store.pins()[old] == ("as version 0",)


def test_a_root_keeps_the_names_that_are_not_taken_away(store: FolderStore) -> None:
    """Two equal runs have the same head: giving one up must not take the other's."""
    head = store.put(b"head")
    store.pin(head, "run A")
    store.pin(head, "run B")
    store.pin(head)
    store.unpin(head, "run B")
    store.unpin(head, "run C")
    assert store.pins() == {head: ("", "run A")}
    store.unpin(head, "")
    for path in store.path.glob("blocks/*/*"):
        os.utime(path, (1, 1))
    assert store.gc(0).removed == 0
    store.unpin(head, "run A")
    assert store.pins() == {} and store.gc(0).removed == 1


@given(st.sets(st.text(st.characters()) | st.sampled_from(["..", "a/b", "\0", "x" * 90000])))
def test_names_are_any_text(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    store = FolderStore(tmp_path_factory.mktemp("s") / "s", durable=False)
    root = store.put(b"a")
    for name in names:
        store.pin(root, name)
    assert store.pins().get(root, ()) == tuple(sorted(names))
    for name in names:
        store.unpin(root, name)
    assert store.pins() == {}


def test_a_pin_without_its_name_still_pins(store: FolderStore) -> None:
    a = store.put(b"a")
    store.pin(a, "name")
    for content in (b"", b"{", b"[1]", b'{"name": 3}', b"\xff", b"[" * 60000):
        (file,) = (store.path / "pins").iterdir()
        file.write_bytes(content)
        assert store.pins() == {a: ("",)}
    store.unpin(a, "name")
    assert store.pins() == {}


@pytest.mark.parametrize("name", ["notes.txt", str(CID.of(b"a")), f"f{CID.of(b'a').bytes.hex()}.0"])
def test_a_stranger_among_the_pins_is_named(store: FolderStore, name: str) -> None:
    (store.path / "pins" / name).write_text("x")
    with pytest.raises(StoreUnusable, match=f"{re.escape(name)} is not a pin"):
        store.pins()
    with pytest.raises(StoreUnusable):
        store.gc(0)  # what it may stand for must not be removed


def test_pins_survive_where_the_folder_is_missing(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "s", durable=False)
    (tmp_path / "s" / "pins").rmdir()
    assert store.pins() == {}
    store.pin(store.put(b"a"), "n")
    assert list(store.pins().values()) == [("n",)]
