"""The folder store against `shutil.copy` of the same bytes: `python benchmarks/store.py [FOLDER]`.

Every figure is a median of runs that take turns with the copy, so a busy moment hits both. FOLDER
says which disk to measure (default: the temporary folder, which may be in memory).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from fedipfs.ipld import unixfs
from fedipfs.store import FolderStore, dag

LARGE = 50_000_000  # bytes
SMALL, COUNT = 5_000, 200  # bytes, and files at a time
REPEATS = 7

Times = dict[str, list[float]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the folder store.")
    parser.add_argument("folder", nargs="?", help="a folder on the disk to measure")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as name:
        folder = Path(name)
        large: Times = defaultdict(list)
        small: Times = defaultdict(list)
        for _ in range(REPEATS + 1):  # the first warms up
            measure_large(folder, large)
            measure_small(folder, small)
    print(f"{LARGE // 10**6} MB, median of {REPEATS} runs{'GB/s':>21}{'of copy':>10}")
    report(large, lambda seconds: LARGE / seconds / 1e9)
    print(f"\n{SMALL // 1000} KB blocks, {COUNT} at a time{'us each':>24}{'of copy':>10}")
    report(small, lambda seconds: seconds / COUNT * 1e6)


def measure_large(folder: Path, times: Times) -> None:
    """One file of 50 MB."""
    source, copy = folder / "source", folder / "copy"
    data = os.urandom(LARGE)
    source.write_bytes(data)
    quick = FolderStore(folder / "quick", durable=False)
    durable = FolderStore(folder / "durable")
    timed(times, "copy", lambda: shutil.copy(source, copy))
    timed(times, "put", lambda: dag.add(quick, unixfs.chunk(data)))
    timed(times, "put, then flush", lambda: flush_after_put(folder / "flushed", data))
    timed(times, "copy, with fsync", lambda: copy_and_sync(source, [str(copy)]))
    timed(times, "put, durable", lambda: dag.add(durable, unixfs.chunk(data)))
    timed(times, "CID only", lambda: unixfs.cid_of(data))
    root = unixfs.cid_of(data)
    timed(times, "verified get", lambda: sum(map(len, dag.cat(quick, root))))
    clear(folder)


def measure_small(folder: Path, times: Times) -> None:
    """Two hundred blocks of 5 KB."""
    source, copy = folder / "source", folder / "copy"
    source.write_bytes(os.urandom(SMALL))
    blocks = [os.urandom(SMALL) for _ in range(COUNT)]
    quick = FolderStore(folder / "quick", durable=False)
    durable = FolderStore(folder / "durable")
    copies = [f"{copy}-{number}" for number in range(COUNT)]
    cids = [unixfs.cid_of(block) for block in blocks]
    timed(times, "copy", lambda: [shutil.copy(source, name) for name in copies])
    timed(times, "put", lambda: [quick.put(block) for block in blocks])
    timed(times, "put of what is there", lambda: [quick.put(block) for block in blocks])
    timed(times, "verified get", lambda: [quick.get(cid) for cid in cids])
    timed(times, "copy, with fsync", lambda: copy_and_sync(source, copies))
    timed(times, "put, durable", lambda: [durable.put(block) for block in blocks])
    clear(folder)


def flush_after_put(path: Path, data: bytes) -> None:
    store = FolderStore(path, durable=False)
    dag.add(store, unixfs.chunk(data))
    store.flush()


def copy_and_sync(source: Path, targets: list[str]) -> None:
    for target in targets:
        shutil.copy(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def timed(times: Times, name: str, call: Callable[[], object]) -> None:
    began = time.perf_counter()
    call()
    times[name].append(time.perf_counter() - began)


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()  # so that no run pays for the disk writes of the one before


def report(times: Times, figure: Callable[[float], float]) -> None:
    """Each row beside the copy that promises the same."""
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, seconds in medians.items():
        synced = "durable" in name or "flush" in name or "fsync" in name
        against = medians["copy, with fsync" if synced else "copy"]
        rate, ratio = figure(seconds), figure(seconds) / figure(against)
        print(f"  {name:<38}{rate:>10.2f}{ratio:>9.2f}x")


if __name__ == "__main__":
    main()
