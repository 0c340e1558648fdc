"""Several processes, and processes that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedipfs.ipld import CID
from fedipfs.store import FolderStore

WRITER = """
import random, sys
from fedipfs.store import FolderStore
store = FolderStore(sys.argv[1], durable=sys.argv[3] == "durable")
source = random.Random(int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[4])):
    block = source.randbytes(source.choice([10, 3000, 300_000]))
    print(store.put(block), flush=True)
"""


def start(path: Path, seed: int, durable: bool, count: int) -> subprocess.Popen[str]:
    arguments = [str(path), str(seed), "durable" if durable else "quick", str(count)]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


@pytest.mark.parametrize("durable", [True, False])
def test_four_writers_of_the_same_and_of_other_blocks(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "s"
    writers = [start(path, seed, durable, 60) for seed in (1, 1, 2, 3)]  # two write the same
    for writer in writers:  # all have opened, and one of them created, the store
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    outputs = [writer.communicate("\n", timeout=60)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    cids = {CID.parse(line) for output in outputs for line in output.split()}
    store = FolderStore(path, create=False)
    report = store.verify()
    assert set(store) == cids and report.blocks == len(cids) and report.damaged == []
    assert outputs[0] == outputs[1] and not list(path.rglob(".*"))


def test_killed_writers_leave_whole_blocks_only(tmp_path: Path) -> None:
    path = tmp_path / "s"
    source = random.Random(0)
    acknowledged: set[CID] = set()
    for seed in range(8):
        writer = start(path, seed, bool(seed % 2), 10**6)
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
        writer.stdin.write("\n")
        writer.stdin.flush()
        time.sleep(source.uniform(0.0, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        lines = writer.stdout.read().split("\n")[:-1]  # the last may be cut
        writer.stdin.close()
        writer.stdout.close()
        assert writer.wait(10) == -signal.SIGKILL
        acknowledged.update(map(CID.parse, lines))
        store = FolderStore(path)
        assert store.verify().damaged == []
        assert acknowledged <= set(store)
    assert acknowledged
    for temporary in path.rglob(".tmp-*"):
        os.utime(temporary, (1, 1))
    store.gc(10**6)
    assert not list(path.rglob(".tmp-*")) and acknowledged <= set(store)
