"""`lr_mnist_1000` against a bare torch loop of the same steps.

Ours: the whole command (1000 clients, 10 a round, 100 rounds; two workers), in which every update
is stored, verified and recorded. The alternative: the same model, partition, batches, rounds and
evaluations in one process and one thread, averaged in memory; data loaded beforehand.
Compared is the time of the rounds. Goals, for MNIST: at most 2 x the loop; the whole command
under 12 s.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from _common import (
    accuracy,
    average,
    command,
    configuration,
    interleave,
    judged,
    one_thread,
    row,
    scratch,
    timed,
    title,
)

EXPERIMENT = "lr_mnist_1000"


class BareLoop:
    """Federated averaging in memory, written as one would without any library but torch."""

    def __init__(self, config: dict[str, Any]) -> None:
        from fedipfs import data
        from fedipfs.tasks.vision import MnistLogistic

        task = MnistLogistic()
        dataset = task.data(root=None, fallback="digits")
        self.config, self.model = config, task.model()
        self.x = task.inputs(dataset.train.inputs)
        self.y = task.targets(dataset.train.targets)
        self.test_x = task.inputs(dataset.test.inputs)
        self.test_y = task.targets(dataset.test.targets)
        self.parts = data.partition(
            dataset.train.targets,
            name="iid",
            clients=config["clients"]["total"],
            seed=config["seed"],
        )
        self.accuracy, self.steps = 0.0, 0

    def run(self) -> None:
        import torch

        config = self.config
        draw = random.Random(config["seed"])
        self.steps = 0
        weights = {name: torch.zeros_like(t) for name, t in self.model.state_dict().items()}
        for number in range(1, config["rounds"] + 1):
            cohort = draw.sample(range(len(self.parts)), config["clients"]["per_round"])
            weights = average([self._client(client, weights) for client in cohort])
            if number % config["evaluate"]["every"] == 0:
                self.model.load_state_dict(weights)
                batch = config["evaluate"]["batch_size"]
                self.accuracy = accuracy(self.model, self.test_x, self.test_y, batch)

    def _client(self, client: int, weights: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        import torch

        model, train = self.model, self.config["train"]
        model.load_state_dict(weights)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=train["optimizer"]["lr"])
        part = torch.from_numpy(self.parts[client])
        x, y = self.x[part], self.y[part]
        for batch in torch.randperm(len(y)).split(train["batch_size"]):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            self.steps += 1
        return len(y), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each, in turn")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    one_thread()
    rounds = f"rounds={options.rounds}"
    bare = BareLoop(configuration(EXPERIMENT, rounds))
    runs: list[tuple[dict[str, Any], float]] = []

    with scratch() as folder:

        def ours() -> float:
            runs.append(command(folder, EXPERIMENT, rounds))
            return runs[-1][0]["seconds"]["rounds"]

        times = interleave(ours, lambda: timed(bare.run), options.pairs)
    summary, dataset = runs[-1][0], runs[-1][0]["dataset"]
    fed, loop = times.medians
    wall = statistics.median(wall for _, wall in runs)
    title(
        f"{EXPERIMENT}, {options.rounds} rounds",
        f"data: {dataset}; medians of {options.pairs} pairs",
    )
    row(f"FedIPFS, {summary['sgd_steps']} steps, two workers: rounds", f"{fed:.2f} s")
    row(f"bare torch loop, {bare.steps} steps, one process", f"{loop:.2f} s")
    row("ratio", f"{times.ratio:.2f} x", "<= 2 x", judged(times.ratio <= 2, dataset))
    row("FedIPFS: the whole command", f"{wall:.1f} s", "< 12 s", judged(wall < 12, dataset))
    row("accuracy: FedIPFS", f"{summary['metrics']['accuracy']:.4f}")
    row("accuracy: bare torch loop", f"{bare.accuracy:.4f}")


if __name__ == "__main__":
    main()
