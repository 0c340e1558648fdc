"""Clients that differ: FedAvg, FedProx, SCAFFOLD and FedNova side by side on one partition.

`mnist` (the small CNN), 10 clients, each class divided among them by Dirichlet(0.5), all of them
in every round, plain SGD at one rate. The alternative is FedAvg. It is the short form of Flower's
niid_bench, which has 50 rounds of 10 epochs and another CNN: FedAvg 98.89 %, FedProx 99.02,
SCAFFOLD 99.07. Given are the mean and the spread over the seeds, which change the partition, too.
A round has the same steps for all; SCAFFOLD's messages carry twice the bytes, and its clients
store their control variates. Without MNIST's files (FEDIPFS_DATA) it is the stand-in digits.
About a minute for a strategy and a seed.
"""

from __future__ import annotations

import argparse
import statistics

from _common import command, row, scratch, title

EXPERIMENT = "mnist_noniid"
PLAIN = ["~train.optimizer.momentum", "train.schedule=null", "train.batch_size=32"]
STRATEGIES = {
    "fedavg": [],
    "fedprox": ["strategy.proximal_mu=0.1"],
    "scaffold": [],
    "fednova": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2, help="of each client in a round")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=0.05)
    options = parser.parse_args()
    words = [
        *PLAIN,
        f"rounds={options.rounds}",
        f"train.epochs={options.epochs}",
        f"train.optimizer.lr={options.lr}",
        f"data.alpha={options.alpha}",
        f"evaluate.every={options.rounds}",
    ]
    accuracies: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    dataset, moved = "", dict.fromkeys(STRATEGIES, 0)
    for seed in range(1, options.seeds + 1):
        for name, own in STRATEGIES.items():
            with scratch() as folder:
                line = [*words, f"seed={seed}", f"strategy={name}", *own]
                summary, _ = command(folder, EXPERIMENT, *line)
            accuracies[name].append(summary["metrics"]["accuracy"])
            moved[name] = summary["bytes"]["store_put"]
            dataset = summary["dataset"]
    title(
        f"{EXPERIMENT}, Dirichlet({options.alpha:g}), {options.rounds} rounds of 10 clients, "
        f"{options.epochs} epochs",
        f"data: {dataset}; {options.seeds} seeds; SGD {options.lr:g}",
    )
    for name, values in accuracies.items():
        spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        row(f"{name}: accuracy", f"{100 * statistics.mean(values):.2f}{spread} %")
    for name in list(STRATEGIES)[1:]:
        pairs = zip(accuracies[name], accuracies["fedavg"], strict=True)
        gain = statistics.mean(ours - base for ours, base in pairs)
        row(f"{name} over fedavg: accuracy, in points", f"{100 * gain:+.2f}")
        row(f"{name} over fedavg: bytes stored", f"{moved[name] / moved['fedavg']:.2f} x")


if __name__ == "__main__":
    main()
