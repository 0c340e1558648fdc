"""Aggregation of 100 updates of 11 million float32 parameters: memory and throughput.

Ours: FedAvg over a CidGrid: every block read, hashed, looked through for NaN, added in float64;
the mean is stored. The alternative: one NumPy pass over the same values in plain files,
`sum += weight * np.fromfile(file)` in float32, one update in memory at a time, nothing checked.
Each in a fresh process, files in the page cache as far as it reaches. Memory is the peak above
what the process had before, in models of 44 MB. Goal: at most 3 models.
Needs 9 GB of disk for 100 updates; `--updates 10` is a quick look.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _common import interleave, quiet_flower, row, scratch, timed, title

LAYERS, WIDTH = 10, 1_100_000
MODEL = LAYERS * WIDTH * 4  # bytes


def write(folder: Path, updates: int) -> None:
    """The updates, no two blocks alike, in a store and as plain files."""
    import numpy as np

    from fedipfs import FolderStore, weights

    store = FolderStore(folder / "store", durable=False)
    base = np.random.default_rng(1).standard_normal((LAYERS, WIDTH), np.float32)
    cids = []
    for number in range(updates):
        values = base + np.float32(number / 1000)
        values.tofile(folder / f"{number}.f32")
        tensors = {f"layer{i}": values[i] for i in range(LAYERS)}
        cids.append(str(weights.put(store, tensors)))
    (folder / "updates.json").write_text(json.dumps(cids))


def fedavg(folder: Path) -> None:
    """Aggregate the updates as a round of a run does."""
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid

    from fedipfs import CID, CidGrid, FedAvg, FolderStore
    from fedipfs.exchange import Exchange, StoredArrays
    from fedipfs.flower_compat import set_identity, set_message_id

    set_identity(run_id=1, node_id=1)
    store = FolderStore(folder / "store", durable=False)
    cids = [CID.parse(text) for text in json.loads((folder / "updates.json").read_text())]

    class Answers(Grid):
        """Nodes that have trained already: each answers the CID of its update."""

        run = None

        def set_run(self, run: Any) -> None: ...

        def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
            return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

        def get_node_ids(self) -> Iterable[int]:
            return range(2, 2 + len(cids))

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            raise NotImplementedError

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise NotImplementedError

        def send_and_receive(self, messages, *, timeout=None) -> Iterable[Message]:
            return [self._answer(message) for message in messages]

        def _answer(self, message: Message) -> Message:
            node = message.metadata.dst_node_id
            set_message_id(message, str(node))
            content = RecordDict(
                {
                    "arrays": StoredArrays.open(store, cids[node - 2]),
                    "metrics": MetricRecord({"num-examples": node}),
                }
            )
            return Message(Exchange(store).swap_out(content), reply_to=message)

    edge = CidGrid(Answers(), store, read_updates=False)
    strategy = FedAvg(fraction_evaluate=0.0, min_successes=len(cids))
    model = StoredArrays.open(store, cids[0])
    messages = strategy.configure_train(1, model, ConfigRecord(), edge)
    arrays, _ = strategy.aggregate_train(1, edge.send_and_receive(messages))
    assert arrays is not None


def numpy_pass(folder: Path) -> None:
    """What one would write by hand."""
    import numpy as np

    count = len(json.loads((folder / "updates.json").read_text()))
    total = sum(range(2, 2 + count))
    mean = np.zeros(LAYERS * WIDTH, np.float32)
    for number in range(count):
        mean += np.float32((number + 2) / total) * np.fromfile(folder / f"{number}.f32", np.float32)
    mean.tofile(folder / "mean.f32")


def child(way: str, folder: Path) -> None:
    """Do it one way; print seconds and peak memory above the base in bytes."""
    import numpy  # noqa: F401

    import fedipfs.strategies  # noqa: F401

    quiet_flower()
    before = memory("VmRSS")
    work = {"fedavg": fedavg, "numpy": numpy_pass}[way]
    seconds = timed(lambda: work(folder))
    print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before}))


def memory(key: str) -> int:
    """A size of this process in bytes, as the kernel has it.

    Not getrusage's ru_maxrss where there is /proc: that begins with the parent's.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
    (line,) = (line for line in status.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def run_child(way: str, folder: Path, peaks: list[float]) -> float:
    line = [sys.executable, __file__, "--child", way, str(folder)]
    done = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)
    peaks.append(done["peak"] / MODEL)
    return float(done["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    needed = 2.1 * MODEL * options.updates
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        fit = int(free / (2.1 * MODEL))
        print(
            f"NOT RUN: {needed / 1e9:.1f} GB of disk are needed in {tempfile.gettempdir()}, "
            f"{free / 1e9:.1f} GB are free; --updates {fit} would fit"
        )
        return
    ours: list[float] = []
    theirs: list[float] = []
    with scratch() as folder:
        write(folder, options.updates)
        times = interleave(
            lambda: run_child("fedavg", folder, ours),
            lambda: run_child("numpy", folder, theirs),
            options.pairs,
        )
    size = MODEL * options.updates / 1e9
    peak, (fed, plain) = statistics.median(ours), times.medians
    title(
        f"aggregation of {options.updates} updates of {LAYERS * WIDTH:,} parameters",
        f"{size:.1f} GB; medians of {options.pairs} pairs",
    )
    row("FedIPFS: peak memory", f"{peak:.2f} models", "<= 3 models", peak <= 3)
    row("FedIPFS: verified, checked, float64", f"{size / fed:.2f} GB/s")
    row("NumPy over plain files: peak memory", f"{statistics.median(theirs):.2f} models")
    row("NumPy over plain files, float32", f"{size / plain:.2f} GB/s")
    row("ratio of times", f"{times.ratio:.2f} x")


if __name__ == "__main__":
    main()
