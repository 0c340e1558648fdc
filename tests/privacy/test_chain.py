"""The files of a ledger: what is noticed, what a crash leaves, and who may use them."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from children import child, wait
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import LedgerError, LedgerTampered
from fedipfs.privacy import files
from fedipfs.privacy.chain import START, Chain


def add(chain: Chain, **fields: object) -> str:
    with chain.writing() as append:
        return append({"kind": "test", **fields})


def begun(folder: Path, lines: int = 1) -> Chain:
    chain = Chain(folder, "c")
    chain.begin({"kind": "first"})
    for number in range(2, lines + 1):
        add(chain, value=number)
    return chain


def read(folder: Path) -> list[object]:
    """The values in the chain in `folder`, read anew."""
    chain = Chain(folder, "c")
    with chain.reading():
        return [entry.get("value") for entry in chain.entries]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


# ---- what is written


def test_the_file_can_be_checked_with_a_hash_function_alone(folder: Path) -> None:
    chain = begun(folder, 5)
    previous = START
    lines = (folder / "c.jsonl").read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        entry = json.loads(line)
        assert (entry["number"], entry["previous"]) == (number, previous)
        assert entry["time"].endswith("+00:00") and len(entry["nonce"]) == 32
        previous = hashlib.sha256(line).hexdigest()
    assert (folder / "c.head").read_text() == f"000000000000005 {previous}\n"
    assert chain.head == previous and bytes(chain.lines) == b"".join(lines)


def test_a_line_is_on_disk_before_the_head_and_both_before_it_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, synced = begun(folder), []
    sync = files._sync

    def watched(file: int) -> None:
        sync(file)
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        lines = (folder / "c.jsonl").read_bytes().count(b"\n")
        synced.append((name, lines, int((folder / "c.head").read_text().split()[0])))

    monkeypatch.setattr(files, "_sync", watched)
    add(chain)
    assert synced == [("c.jsonl", 2, 1), ("c.head", 2, 2)]


def test_equal_entries_have_unequal_hashes(folder: Path) -> None:
    heads = set()
    for name in "abc":
        (folder / name).mkdir(mode=0o700)
        heads.add(begun(folder / name).head)
    assert len(heads) == 3


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20))
@settings(max_examples=20)
def test_numbers_and_text_come_back_exactly(number: float, text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        add(begun(Path(name)), value=[number, text])
        assert read(Path(name)) == [None, [number, text]]


def test_a_chain_is_begun_once(folder: Path) -> None:
    chain = begun(folder, 3)
    before = (folder / "c.jsonl").read_bytes()
    with pytest.raises(LedgerError, match="never begun anew"):
        Chain(folder, "c").begin({"kind": "first"})
    assert (folder / "c.jsonl").read_bytes() == before
    assert chain.exists and not Chain(folder, "d").exists


# ---- what is noticed

ORIGINAL = tempfile.mkdtemp()
GROWN = begun(Path(ORIGINAL), 6)
LINES = bytes(GROWN.lines)
HEAD = (Path(ORIGINAL) / "c.head").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def original_removed():
    yield
    shutil.rmtree(ORIGINAL)


def refused(lines: bytes, head: bytes = HEAD) -> None:
    """These files are refused, by who opens them and by who had read the right ones before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for suffix, good, bad in (("jsonl", LINES, lines), ("head", HEAD, head)):
            path = folder / f"c.{suffix}"
            path.touch(mode=0o600)
            path.write_bytes(good)
            if suffix == "head":
                opened = Chain(folder, "c")
                with opened.reading():
                    assert len(opened.entries) == 6
                (folder / "c.jsonl").write_bytes(lines)
                path.write_bytes(bad)
        for chain in (Chain(folder, "c"), opened):
            with pytest.raises(LedgerTampered, match=r"c\.(jsonl|head)"), chain.reading():
                pass
            with pytest.raises(LedgerTampered):
                add(chain)
        assert ((folder / "c.jsonl").read_bytes(), path.read_bytes()) == (lines, head)


@given(st.integers(0, len(LINES) - 1), st.integers(1, 255))
def test_any_byte_changed(place: int, bits: int) -> None:
    changed = bytearray(LINES)
    changed[place] ^= bits
    refused(bytes(changed))


@given(st.integers(0, len(HEAD) - 1), st.integers(1, 255))
@settings(max_examples=50)
def test_any_byte_of_the_head_changed(place: int, bits: int) -> None:
    changed = bytearray(HEAD)
    changed[place] ^= bits
    refused(LINES, bytes(changed))


@given(st.integers(0, len(LINES) - 1))
def test_the_end_cut_off_anywhere(length: int) -> None:
    refused(LINES[:length])


@given(st.integers(0, len(HEAD) - 1))
@settings(max_examples=20)
def test_the_head_cut_off_anywhere(length: int) -> None:
    refused(LINES, HEAD[:length])


@given(
    st.permutations(range(6)) | st.lists(st.integers(0, 5), max_size=9),
)
def test_lines_dropped_swapped_and_doubled(order: list[int]) -> None:
    lines = LINES.splitlines(keepends=True)
    changed = b"".join(lines[place] for place in order)
    if changed != LINES:
        refused(changed)


@given(st.integers(0, 6), st.binary(max_size=60))
@settings(max_examples=50)
def test_lines_inserted(place: int, content: bytes) -> None:
    lines = LINES.splitlines(keepends=True)
    forged = content.replace(b"\0", b"") + b"\n"
    refused(b"".join([*lines[:place], forged, *lines[place:]]))


def test_the_right_lines_of_another_chain(folder: Path) -> None:
    begun(folder, 6)
    refused((folder / "c.jsonl").read_bytes())
    refused(LINES, (folder / "c.head").read_bytes())


def test_more_than_one_line_that_the_head_does_not_know(folder: Path) -> None:
    chain = begun(folder, 4)
    head = (folder / "c.head").read_bytes()
    add(chain)
    add(chain)
    (folder / "c.head").write_bytes(head)
    with pytest.raises(LedgerTampered, match="has 6 whole lines, and should have 4"):
        read(folder)


@pytest.mark.parametrize("missing", ["c.jsonl", "c.head"])
def test_a_missing_file(folder: Path, missing: str) -> None:
    chain = begun(folder, 3)
    (folder / missing).unlink()
    for attempt in (
        lambda: read(folder),
        lambda: add(chain),
        lambda: Chain(folder, "c").begin({"kind": "first"}),
    ):
        with pytest.raises(LedgerTampered, match=f"{missing} is missing: put it back"):
            attempt()
    assert not (folder / missing).exists()


def test_both_files_taken_back_are_noticed_by_who_has_read_later_ones(folder: Path) -> None:
    chain = begun(folder, 3)
    old = {path: path.read_bytes() for path in folder.iterdir()}
    add(chain)
    for path, content in old.items():
        path.write_bytes(content)
    assert len(read(folder)) == 3  # as said in chain.py
    with pytest.raises(LedgerTampered, match="that this process has read before"):
        add(chain)


# ---- what a crash leaves


def crashed(folder: Path, keep: Callable[[bytes], bytes]) -> Chain:
    """A chain of 3 lines whose 4th append broke off: of its line is left what `keep` gives."""
    chain = begun(folder, 3)
    head = (folder / "c.head").read_bytes()
    size = len(chain.lines)
    add(chain, value=4)
    lines = (folder / "c.jsonl").read_bytes()
    (folder / "c.jsonl").write_bytes(lines[:size] + keep(lines[size:]))
    (folder / "c.head").write_bytes(head)
    return Chain(folder, "c")


def test_a_whole_line_that_the_head_does_not_know_counts(folder: Path) -> None:
    chain = crashed(folder, lambda line: line)
    assert read(folder) == [None, 2, 3, 4]
    add(chain, value=5)
    assert read(folder) == [None, 2, 3, 4, 5]
    assert (folder / "c.head").read_text().startswith("000000000000005 ")


@given(st.integers(1, 150), st.booleans())
@settings(max_examples=30)
def test_a_part_of_a_line_is_taken_off(length: int, zeros: bool) -> None:
    def part(line: bytes) -> bytes:
        assert length < len(line)
        return line[:length] + bytes(len(line) - length - 1) + b"\n" if zeros else line[:length]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chain = crashed(folder, part)
        broken = (folder / "c.jsonl").read_bytes()
        assert read(folder) == [None, 2, 3]
        assert (folder / "c.jsonl").read_bytes() == broken  # reading mends nothing
        with chain.reading():
            whole = len(chain.lines)
        add(chain, value=5)
        assert chain.entries[-1]["removed"] == len(broken) - whole
        assert read(folder) == [None, 2, 3, 5]


@pytest.mark.parametrize("left", [None, 0, 50])
def test_a_crash_while_a_chain_is_begun(folder: Path, left: int | None) -> None:
    begun(folder)
    line = (folder / "c.jsonl").read_bytes()
    (folder / "c.head.new").touch()
    (folder / "c.head").write_text(f"{0:015} {START}\n")
    assert Chain(folder, "c").exists  # after the append, before the head
    assert len(read(folder)) == 1
    if left is None:
        (folder / "c.jsonl").unlink()
    else:
        (folder / "c.jsonl").write_bytes(line[:left])
    assert not Chain(folder, "c").exists
    begun(folder)
    assert len(read(folder)) == 1


# ---- disks and users


def test_a_disk_that_is_full(folder: Path) -> None:
    before = bytes(begun(folder, 3).lines)

    def attempt() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, resource.RLIM_INFINITY))
        chain = Chain(folder, "c")
        for _ in range(3):
            with pytest.raises(LedgerError, match=r"c.jsonl \(File too large\): make room"):
                add(chain, value=4)
            assert read(folder) == [None, 2, 3]
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, resource.RLIM_INFINITY))
        add(chain, value=5)

    assert wait(child(attempt)) == 0
    assert read(folder) == [None, 2, 3, 5]
    assert (folder / "c.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
@pytest.mark.parametrize("name", ["c.jsonl", "c.head", "."])
def test_files_open_to_others_are_refused(folder: Path, name: str, mode: int) -> None:
    chain = begun(folder, 2)
    path = folder / name
    path.chmod(mode | 0o100 if name == "." else mode)
    remedy = f"is open to other users: chmod {700 if name == '.' else 600} {folder}"
    for attempt in (lambda: read(folder), lambda: add(chain)):
        with pytest.raises(LedgerError, match=remedy):
            attempt()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
@pytest.mark.parametrize("name", ["c.jsonl", "c.head", "."])
def test_files_of_another_user_are_refused(folder: Path, name: str) -> None:
    begun(folder, 2)
    os.chown(folder / name, 12345, -1)
    with pytest.raises(LedgerError, match="belongs to another user"):
        read(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.chmod(0o500)
    with pytest.raises(LedgerError, match="make it a place that this user can write"):
        begun(folder)


def test_other_things_in_the_place_of_files(folder: Path) -> None:
    begun(folder, 2)
    (folder / "c.jsonl").unlink()
    os.mkfifo(folder / "c.jsonl", mode=0o600)
    with pytest.raises(LedgerError, match="is not what it should be"):
        read(folder)
    with pytest.raises(LedgerError, match="is not what it should be"):
        begun(folder / "c.head")
    with pytest.raises(LedgerError, match="No such file or directory"):
        begun(folder / "none")


# ---- several at once


def test_a_ledger_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, other = begun(folder, 2), Chain(folder, "c")
    monkeypatch.setattr(files, "PATIENCE_S", 0.05)
    with chain.writing(), pytest.raises(LedgerError, match="in use by another process"):
        add(other)
    with chain.reading(), other.reading():  # readers do not mind each other
        pass
    monkeypatch.setattr(files, "PATIENCE_S", 30)
    with chain.writing():
        waiting = threading.Thread(target=add, args=(other,))
        waiting.start()
        time.sleep(0.05)
    waiting.join()
    assert len(read(folder)) == 3


def test_threads_and_processes_add_to_one_chain(folder: Path) -> None:
    chain = begun(folder)

    def adds(own: Chain, who: int) -> None:
        for number in range(25):
            add(own, value=[who, number])

    children = [child(lambda who=who: adds(Chain(folder, "c"), who)) for who in range(4)]
    threads = [threading.Thread(target=adds, args=(chain, who)) for who in (4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [wait(pid) for pid in children] == [0] * 4
    values = read(folder)[1:]
    assert sorted(values) == [[who, number] for who in range(6) for number in range(25)]
    for who in range(6):  # each in its own order
        assert [number for one, number in values if one == who] == list(range(25))
