"""Bytes of Flower messages per client and round, by size of the model.

Ours: a ClientApp with `cid_mod` behind a CidGrid. The alternative: the same client in plain
Flower, arrays in the messages. Counted is the length of the serialised messages, both ways;
what gRPC and Flower's protocol add to a message in a deployment (some kB) is not in it.
Goal: at most 12 kB, the same for any model.
"""

from __future__ import annotations

from pathlib import Path

from _common import quiet_flower, row, scratch, title

SIZES = {"10 thousand": 10_000, "1 million": 1_000_000, "11 million": 11_000_000}
CLIENTS = 2


def by_cid(folder: Path, parameters: int) -> int:
    """Bytes a client and round with CIDs in the messages."""
    from _trivial import model
    from flwr.app import ConfigRecord

    from fedipfs import CidGrid, FedAvg, FolderStore
    from fedipfs.server.engine.local import LocalGrid
    from fedipfs.server.engine.pool import SerialPool

    store = FolderStore(folder, durable=False)
    options = {
        "app": "_trivial:app",
        "store": {"kind": "folder", "path": str(folder), "durable": False},
        "run_id": 1,
        "seed": 1,
        "run_config": {},
        "node_config": {},
        "threads": None,
        "offline": True,
        "keys": None,
        "seal": "none",
    }
    grid = LocalGrid(SerialPool("fedipfs.clients.worker:serve", options), CLIENTS)
    edge = CidGrid(grid, store, read_updates=False)
    strategy = FedAvg(fraction_evaluate=0.0)
    messages = strategy.configure_train(1, model(parameters, layers=10), ConfigRecord(), edge)
    arrays, _ = strategy.aggregate_train(1, edge.send_and_receive(messages))
    assert arrays is not None
    return grid.traffic.flower // CLIENTS


def by_value(parameters: int) -> int:
    """Bytes a client and round with arrays in the messages."""
    from _trivial import PlainGrid, model, plain_app, plain_round

    grid = PlainGrid(plain_app, CLIENTS)
    plain_round(grid, model(parameters, layers=10), 1)
    return grid.crossed // CLIENTS


def main() -> None:
    quiet_flower()
    sent: list[int] = []
    for name, parameters in SIZES.items():
        with scratch() as folder:
            ours, theirs = by_cid(folder, parameters), by_value(parameters)
        sent.append(ours)
        title(f"{name} parameters", "bytes a client and round, both ways; exact, not timed")
        row("FedIPFS: CIDs in the messages", f"{ours:,} B", "12,000 B", ours <= 12_000)
        row("plain Flower: arrays in the messages", f"{theirs:,} B")
        row("plain Flower / FedIPFS", f"{theirs / ours:,.0f} x")
    spread = max(sent) - min(sent)
    title("the same for any size", "largest less smallest")
    row("FedIPFS", f"{spread} B", "0 B", spread == 0)


if __name__ == "__main__":
    main()
