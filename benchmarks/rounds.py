"""What a round costs beside training: 10 and 100 trivial clients, and starting the engine.

Ours: `Federation.play`, as in any run: two warm worker processes, every update stored, verified
and aggregated by FedAvg, the round's record written. The alternative: the same client and
Flower's own FedAvg in one process, messages serialised, arrays in the messages, nothing stored.
Goals: 0.01 s a round of 10 clients, 0.06 s of 100.

Starting: from making the pool to the first answer of both workers, everything imported already
in the process they are forked from. The alternative: two fresh interpreters that import the same.
Goal: 0.5 s.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import WORKERS, Pairs, interleave, quiet_flower, row, scratch, timed, title

GOALS = {10: 0.01, 100: 0.06}
FACTORY = "fedipfs.clients.worker:serve"


def start_pool(folder: Path) -> Any:
    """Two workers that serve the trivial client over the store in `folder`."""
    from fedipfs.server.engine.pool import ProcessPool

    options = {
        "app": "_trivial:app",
        "store": {"kind": "folder", "path": str(folder), "durable": False},
        "run_id": 1,
        "seed": 1,
        "run_config": {},
        "node_config": {},
        "threads": 1,
        "offline": True,
        "keys": None,
        "seal": "none",
    }
    return ProcessPool(FACTORY, options, workers=WORKERS, timeout_s=60)


class Federated:
    """`clients` trivial clients behind the local engine."""

    def __init__(self, folder: Path, pool: Any, clients: int) -> None:
        from _trivial import model

        from fedipfs.exchange import Vault, store_arrays
        from fedipfs.server.engine.local import LocalGrid
        from fedipfs.server.rounds import Federation
        from fedipfs.server.selection import Selection
        from fedipfs.store import FolderStore, dag
        from fedipfs.strategies import Brief, build

        store = FolderStore(folder, durable=False)
        config = dag.put_record(store, {})
        brief = Brief(per_round=clients, min_successes=clients)
        self._federation = Federation(
            vault=Vault(store),
            grid=LocalGrid(pool, clients),
            strategy=build({"name": "fedavg"}, brief),
            selection=Selection(clients),
            model=store_arrays(store, model(100)),
            config=config,
            run=config,
            head=config,
            seed=1,
            min_successes=clients,
        )
        self._number = 0

    def play(self) -> None:
        self._number += 1
        done = self._federation.play(self._number, evaluate=lambda: False)
        assert not done.failures, done.failures


class Plain:
    """As many trivial clients behind nothing."""

    def __init__(self, clients: int) -> None:
        from _trivial import PlainGrid, model, plain_app

        self._grid, self._arrays, self._number = PlainGrid(plain_app, clients), model(100), 0

    def play(self) -> None:
        from _trivial import plain_round

        self._number += 1
        self._arrays = plain_round(self._grid, self._arrays, self._number)


def rounds(folder: Path, pool: Any, clients: int, count: int) -> Pairs:
    """Seconds of `count` rounds of each kind, in turn, after one of each to warm up."""
    ours, theirs = Federated(folder, pool, clients), Plain(clients)
    ours.play()
    theirs.play()
    return interleave(lambda: timed(ours.play), lambda: timed(theirs.play), count)


def first_answers(folder: Path) -> None:
    """Start a pool, and have each worker answer once; a request it cannot read will do."""
    pool = start_pool(folder)
    for number in range(WORKERS):
        pool.submit(str(number), bad_request())
    answered = 0
    while answered < WORKERS:
        answered += len(pool.collect(None))
    pool.close()


def bad_request() -> bytes:
    from fedipfs.exchange import frame

    call = {"node": 2, "partition": 0, "partitions": 1, "state": None}
    return frame(call, b"not a message")


def fresh_interpreters() -> None:
    line = [sys.executable, "-c", "import fedipfs.clients.preload"]
    processes = [subprocess.Popen(line) for _ in range(WORKERS)]
    for process in processes:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="of each kind and size")
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()

    from fedipfs.server.engine.pool import warm_up

    quiet_flower()
    warm_up(["fedipfs.clients.preload", "_trivial"])
    with scratch() as folder:
        first_answers(folder)  # waits for the imports
        starts = interleave(
            lambda: timed(lambda: first_answers(folder)),
            lambda: timed(fresh_interpreters),
            options.starts,
        )
        pool = start_pool(folder)
        try:
            played = {n: rounds(folder, pool, n, options.rounds) for n in GOALS}
        finally:
            pool.close()
    for clients, times in played.items():
        ours, theirs = times.medians
        goal = GOALS[clients]
        title(f"a round of {clients} trivial clients", f"medians of {options.rounds} rounds each")
        row("FedIPFS, two workers, stored and recorded", f"{ours:.4f} s", f"{goal} s", ours <= goal)
        row("Flower's FedAvg in one process, nothing stored", f"{theirs:.4f} s")
        row("ratio", f"{times.ratio:.2f} x")
    ours, theirs = starts.medians
    title("starting two workers", f"medians of {options.starts} pairs")
    row("FedIPFS, beyond imports", f"{ours:.3f} s", "0.5 s", ours <= 0.5)
    row("two fresh interpreters that import the same", f"{theirs:.3f} s")
    row("ratio", f"{starts.ratio:.3f} x")


if __name__ == "__main__":
    main()
