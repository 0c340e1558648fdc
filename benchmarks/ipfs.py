"""Stores over an IPFS daemon, against that daemon's own HTTP calls and against the folder store.

`python benchmarks/ipfs.py`. It starts a js-ipfs of its own on loopback (Node.js 20; without it
the benchmark says so and ends), or uses the daemon whose RPC $FEDIPFS_KUBO_RPC names: take one
made for such things, as over a gigabyte of random data stays there.

Data are random and new every time, because a daemon skips blocks that it has. What it adds is
pinned and, as CIDv1 with raw leaves of 1 MiB, the same blocks whoever sends it: CIDs are compared.
Goals: moving 50 MB at least as fast as plain HTTP does; the first block of a cached model within
1 ms; `mnist` within 1.3 times the folder's; a round that changes a tenth moves at most 12 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import requests
from _common import Pairs, command, interleave, judged, row, scratch, timed, title

from fedipfs.ipld import CID, unixfs
from fedipfs.store import CachedStore, FolderStore, dag
from fedipfs.store.kubo import KuboStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import daemons

SIZE = 50_000_000  # bytes
EXPERIMENT = "mnist"
FROZEN, TENSORS = 9, 10  # tensors that a round leaves as they are, of how many
TENSOR = 524_288  # float32 in one: 2 MiB

_LIKE_OURS = {
    "cid-version": "1",
    "raw-leaves": "true",
    "chunker": "size-1048576",
    "pin": "true",
    "cid-base": "base32",
}


class Plain:
    """The daemon's own `add` and `cat` in one kept-open HTTP session, and nothing around them."""

    def __init__(self, url: str) -> None:
        self._api, self._session = f"{url}/api/v0", requests.Session()
        self._session.trust_env = False  # no proxy

    def add(self, data: bytes) -> CID:
        file = {"file": ("file", data, "application/octet-stream")}
        answer = self._session.post(f"{self._api}/add", params=_LIKE_OURS, files=file)
        answer.raise_for_status()
        return CID.parse(json.loads(answer.text.splitlines()[-1])["Hash"])

    def cat(self, cid: CID) -> int:
        """Bytes that came."""
        query = {"arg": str(cid)}
        with self._session.post(f"{self._api}/cat", params=query, stream=True) as answer:
            answer.raise_for_status()
            return sum(map(len, answer.iter_content(1 << 20)))

    def content(self, cid: CID) -> int:
        """The same, gathered into one `bytes`, as most programs do it."""
        answer = self._session.post(f"{self._api}/cat", params={"arg": str(cid)})
        answer.raise_for_status()
        return len(answer.content)


class Subject(NamedTuple):
    """What is measured: a daemon, and a place for folders."""

    address: str
    plain: Plain
    folder: Path

    def kubo(self) -> KuboStore:
        return KuboStore(self.address)

    def cached(self, name: str) -> CachedStore:
        return CachedStore(FolderStore(self.folder / name, durable=False), self.kubo())


@contextmanager
def daemon(folder: Path) -> Iterator[daemons.JsIpfs | daemons.Remote]:
    """The daemon that the environment names, or a new, empty one for the time."""
    if address := os.environ.get("FEDIPFS_KUBO_RPC"):
        yield daemons.Remote(address)
        return
    own = daemons.JsIpfs(folder / f"js-ipfs-{len(list(folder.iterdir()))}")
    own.start()
    try:
        yield own
    finally:
        own.stop()


def uploads(subject: Subject, pairs: int) -> None:
    """Put 50 MB, against `add` over plain HTTP and by ipfshttpclient."""
    from ipfshttpclient.client import Client

    store, client = subject.kubo(), Client(subject.address, timeout=60, session=True)

    def ours(data: bytes) -> CID:
        root = dag.add(store, unixfs.chunk(data))
        store.publish()
        return root

    def library(data: bytes) -> CID:
        answer = client.add_bytes(data, opts=_LIKE_OURS)
        return CID.parse(answer if isinstance(answer, str) else answer["Hash"])

    def moved(add: Callable[[bytes], CID]) -> Callable[[], float]:
        def once() -> float:
            data = os.urandom(SIZE)
            found: list[CID] = []
            seconds = timed(lambda: found.append(add(data)))
            assert found == [unixfs.cid_of(data)], "another CID than ours"
            return seconds

        return once

    ways = {"plain HTTP add": subject.plain.add, "ipfshttpclient add_bytes": library}
    for add in (ours, *ways.values()):
        moved(add)()  # connections, and the daemon's just-in-time compiler
    title(f"put of {SIZE // 10**6} MB, pinned", f"medians of {pairs} pairs")
    for name, add in ways.items():
        _compare("KuboStore", name, interleave(moved(ours), moved(add), pairs))


def downloads(subject: Subject, pairs: int) -> None:
    """Get 50 MB, every block checked, against `cat` over plain HTTP, nothing checked."""
    store, numbers = subject.kubo(), count()

    def through_cache(root: CID) -> int:
        cached = subject.cached(f"get-{next(numbers)}")
        cached.fetch(root)
        return sum(map(len, dag.cat(cached, root)))

    def read(get: Callable[[CID], int]) -> Callable[[], float]:
        def once() -> float:
            root = subject.plain.add(os.urandom(SIZE))
            came: list[int] = []
            seconds = timed(lambda: came.append(get(root)))
            assert came == [SIZE]
            return seconds

        return once

    def streamed(root: CID) -> int:
        return sum(len(block) for cid, block in store.leaves(root) if cid != root)

    def gathered(root: CID) -> int:
        return len(b"".join(block for cid, block in store.leaves(root) if cid != root))

    title(f"get of {SIZE // 10**6} MB", f"medians of {pairs} pairs")
    read(streamed)(), read(subject.plain.cat)()
    pair = interleave(read(gathered), read(subject.plain.content), pairs)
    _compare("KuboStore, gathered", "plain HTTP cat, gathered", pair)
    for name, get in {"KuboStore": streamed, "CachedStore, cold, then read": through_cache}.items():
        _compare(name, "plain HTTP cat", interleave(read(get), read(subject.plain.cat), pairs))


def _compare(ours: str, theirs: str, times: Pairs) -> None:
    mine, other = times.medians
    row(f"{ours}, MB/s", f"{SIZE / mine / 1e6:.0f}")
    row(f"  {theirs}, MB/s", f"{SIZE / other / 1e6:.0f}")
    row("  ratio of times", f"{times.ratio:.2f} x", "<= 1 x", times.ratio <= 1)


def first_bytes(subject: Subject, repeats: int) -> None:
    """The first block of a model that is in the folder, and opening it, by fresh stores."""
    from fedipfs.weights import Weights, put

    writer = subject.cached("near")
    root = put(writer, _model(_random(SIZE // 4 // TENSOR + 1)))
    writer.publish()
    blocks, opened = [], []
    for _ in range(repeats):
        store = subject.cached("near")
        blocks.append(timed(lambda store=store: store.get(root)))
        store = subject.cached("near")
        opened.append(timed(lambda store=store: next(Weights(store, root).pieces("layer0"))))
    first, tensor = statistics.median(blocks) * 1000, statistics.median(opened) * 1000
    title(f"a cached model of {SIZE // 10**6} MB", f"median of {repeats}, a new store each time")
    row("first block", f"{first:.2f} ms", "< 1 ms", first < 1)
    row("header checked and first bytes of a tensor", f"{tensor:.2f} ms")


def frozen_layers(subject: Subject) -> None:
    """The second round of a model of which nine tensors of ten stay: what is sent and fetched."""
    from fedipfs.weights import put

    writer, reader = subject.cached("writer"), subject.cached("reader")
    tensors = _random(TENSORS)
    sent = fetched = size = 0
    for _ in range(2):
        tensors[FROZEN] = _random(1)[0]
        before = writer.counters.copy(), reader.counters.copy()
        root = put(writer, _model(tensors))
        writer.publish()
        reader.fetch(root)
        size = sum(map(len, dag.cat(reader, root)))
        sent = writer.counters.sent_bytes - before[0].sent_bytes
        fetched = reader.counters.fetched_bytes - before[1].fetched_bytes
    title(f"round two, {FROZEN} of {TENSORS} tensors unchanged", "unsealed; exact, not timed")
    for name, moved in {"sent by the writer": sent, "fetched by the reader": fetched}.items():
        share = moved / size
        row(f"{name}, of {size:,} B", f"{share:.1%}", "<= 12 %", share <= 0.12)


def whole_runs(folder: Path, pairs: int, rounds: int) -> None:
    """The real command, sealed over a daemon, against the folder, where nothing is sealed.

    Every run has a new daemon, as every run has a new folder: js-ipfs unpins the slower, the more
    is pinned.
    """
    runs = folder / "runs"
    runs.mkdir()
    summaries: list[dict[str, Any]] = []

    def wall(store: str) -> float:
        words = [f"rounds={rounds}", f"store={store}"]
        if store == "folder":
            summary, seconds = command(runs, EXPERIMENT, *words)
        else:
            with daemon(folder) as empty:
                key = "store.address" if store == "kubo" else "store.kubo.address"
                summary, seconds = command(runs, EXPERIMENT, *words, f"{key}={empty.address}")
        summaries.append(summary)
        return seconds

    times: dict[str, list[float]] = {store: [] for store in ("folder", "cached", "kubo")}
    for turn in range(pairs):
        for store in sorted(times, reverse=bool(turn % 2)):
            times[store].append(wall(store))
    plain, dataset = times.pop("folder"), summaries[0]["dataset"]
    title(
        f"{EXPERIMENT}, {rounds} rounds of 10 clients, the whole command",
        f"data: {dataset}; medians of {pairs} runs each, in turn",
    )
    row("store=folder, nothing sealed", f"{statistics.median(plain):.2f} s")
    for store, seconds in times.items():
        ratio = Pairs(seconds, plain).ratio
        row(f"store={store}, all sealed", f"{statistics.median(seconds):.2f} s")
        row("  ratio", f"{ratio:.2f} x", "<= 1.3 x", judged(ratio <= 1.3, dataset))
    accuracies = {round(summary["metrics"]["accuracy"], 6) for summary in summaries}
    row("accuracy, the same in all", ", ".join(map(str, accuracies)), "one", len(accuracies) == 1)


def _random(number: int) -> list[Any]:
    import numpy as np

    return [np.frombuffer(os.urandom(4 * TENSOR), np.float32) for _ in range(number)]


def _model(tensors: list[Any]) -> dict[str, Any]:
    return {f"layer{number}": tensor for number, tensor in enumerate(tensors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7, help="transfers of each kind, in turn")
    parser.add_argument("--runs", type=int, default=3, help="whole runs with each store, in turn")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of such a run")
    options = parser.parse_args()
    with scratch() as folder:
        try:
            whole_runs(folder, options.runs, options.rounds)
            with daemon(folder) as measured:
                subject = Subject(measured.address, Plain(measured.url), folder)
                frozen_layers(subject)
                first_bytes(subject, 50)
                uploads(subject, options.pairs)
                downloads(subject, options.pairs)
        except daemons.Unavailable as error:
            print(f"ipfs.py measures nothing: {error}; install Node.js 20, or set FEDIPFS_KUBO_RPC")


if __name__ == "__main__":
    main()
