"""`mnist` (10 clients, a small CNN) against bare torch on the same number of processes.

Ours: the rounds of the real command with two workers. The alternative: two processes, each of
which trains half of the clients in a plain torch loop (same model, partition, batches, optimizer,
schedule) and averages them in memory; the parent combines the two and evaluates. Its processes
have imported torch and hold the data as tensors before the time starts; ours load data and
convert them within the rounds. Goal, for MNIST: at most 1.15 x.
"""

from __future__ import annotations

import argparse
import multiprocessing
from typing import Any

from _common import (
    WORKERS,
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

EXPERIMENT = "mnist"


def worker(pipe: Any, config: dict[str, Any], clients: list[int]) -> None:
    """Train `clients` from the weights that come in, one after another; answer their mean."""
    one_thread()
    import torch

    from fedipfs import data

    task, dataset = load()
    x, y = task.inputs(dataset.train.inputs), task.targets(dataset.train.targets)
    total, train = config["clients"]["total"], config["train"]
    parts = data.partition(dataset.train.targets, name="iid", clients=total, seed=config["seed"])
    model = task.model()
    rate = dict(train["optimizer"])
    del rate["name"]
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        number, weights = asked
        rate["lr"] = train["optimizer"]["lr"] * train["schedule"]["gamma"] ** (number - 1)
        states = []
        for client in clients:
            model.load_state_dict(tensors(weights))
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), **rate)
            part = torch.from_numpy(parts[client])
            inputs, targets = x[part], y[part]
            for batch in torch.randperm(len(part)).split(train["batch_size"]):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
                optimizer.step()
            states.append((len(part), {n: t.clone() for n, t in model.state_dict().items()}))
        pipe.send((sum(count for count, _ in states), arrays(average(states))))


def arrays(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def tensors(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in state.items()}


def load() -> Any:
    from fedipfs.tasks.vision import Mnist

    task = Mnist()
    return task, task.data(root=None, fallback="digits")


class BareProcesses:
    """Federated averaging with `multiprocessing` and nothing else."""

    def __init__(self, config: dict[str, Any]) -> None:
        task, dataset = load()
        self.config, self.model = config, task.model()
        self.x, self.y = task.inputs(dataset.test.inputs), task.targets(dataset.test.targets)
        clients = list(range(config["clients"]["total"]))
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for number in range(WORKERS):
            ours, theirs = context.Pipe()
            mine = clients[number::WORKERS]
            context.Process(target=worker, args=(theirs, config, mine), daemon=True).start()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()
        self.accuracy = 0.0

    def run(self) -> None:
        import torch

        torch.manual_seed(self.config["seed"])
        for layer in self.model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        for number in range(1, self.config["rounds"] + 1):
            weights = arrays(self.model.state_dict())
            for pipe in self.pipes:
                pipe.send((number, weights))
            answers = [pipe.recv() for pipe in self.pipes]
            means = [(count, tensors(mean)) for count, mean in answers]
            self.model.load_state_dict(average(means))
            batch = self.config["evaluate"]["batch_size"]
            self.accuracy = accuracy(self.model, self.x, self.y, batch)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    one_thread()
    rounds = f"rounds={options.rounds}"
    bare = BareProcesses(configuration(EXPERIMENT, rounds))
    summaries: list[dict[str, Any]] = []

    with scratch() as folder:

        def ours() -> float:
            summaries.append(command(folder, EXPERIMENT, rounds)[0])
            return summaries[-1]["seconds"]["rounds"]

        times = interleave(ours, lambda: timed(bare.run), options.pairs)
    bare.close()
    summary, dataset = summaries[-1], summaries[-1]["dataset"]
    fed, loop = times.medians
    title(
        f"{EXPERIMENT}, {options.rounds} rounds of 10 clients, {summary['sgd_steps']} steps",
        f"data: {dataset}; medians of {options.pairs} pairs",
    )
    row("FedIPFS, two workers: rounds", f"{fed:.2f} s")
    row("bare torch, two processes", f"{loop:.2f} s")
    row("ratio", f"{times.ratio:.2f} x", "<= 1.15 x", judged(times.ratio <= 1.15, dataset))
    row("accuracy: FedIPFS", f"{summary['metrics']['accuracy']:.4f}")
    row("accuracy: bare torch", f"{bare.accuracy:.4f}")


if __name__ == "__main__":
    main()
