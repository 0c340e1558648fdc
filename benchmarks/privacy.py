"""What privacy costs: DP-SGD, the ledger, distributed noise, noise from AES.

`python benchmarks/privacy.py`. DP-SGD takes turns with plain SGD on the same batches of the same
model, for three models and two ways of clipping; images are random, which no time depends on. A
spend from a ledger takes turns with an append and fsync of the same line, an update under
distributed noise with one that is clipped and gets plain Gaussian noise, and our noise with that of
torch and of NumPy. But for the ledger, which waits for the disk, times are those of the processor
on one thread, with memory kept as a run's workers keep it: what else runs then matters less.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import as_worker, one_thread, row, scratch, timed, title

if TYPE_CHECKING:
    from torch import nn

BATCHES = (64, 256)
LONG_S = 0.1  # of a turn, at least
LINES = (10, 100, 1000)  # of a ledger
WINDOW = 20  # spends that are taken together
VALUES = 1_199_882  # as many as the first model has
SURVIVORS, COHORT = 7, 10

DP_SGD = {"ghost": 2.5, "hooks": 3.0}  # times plain SGD
LEDGER_MS, ENCODE_S = 2.0, 0.3

Work = Callable[[], object]


def processor(work: Work) -> float:
    """Seconds of processor time that `work` takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def turns(ways: dict[str, Work], count: int, steps: int = 1) -> dict[str, list[float]]:
    """Processor seconds of each way, `count` times in turn, each after one step that only warms."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for _ in range(count):
        for name in order:
            ways[name]()
            seconds[name].append(sum(processor(ways[name]) for _ in range(steps)) / steps)
        order.append(order.pop(0))
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over the turns of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# ---- DP-SGD


def example_cnn() -> nn.Module:
    """The CNN of PyTorch's MNIST example without its dropout: 1,199,882 parameters."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def dp_sgd(count: int) -> None:
    from fedipfs.tasks.vision import Mnist, MnistMcMahan

    models = {
        "PyTorch's MNIST example, 1.2M": example_cnn,
        "MnistMcMahan, 1.7M": MnistMcMahan().model,
        "Mnist, the default task, 78k": Mnist().model,
    }
    title("DP-SGD / plain SGD, a step", f"median of {count} turns, processor time, one thread")
    for name, model in models.items():
        for batch in BATCHES:
            seconds = steps(model, batch, count)
            plain = statistics.median(seconds["plain"])
            row(f"{name}, batch {batch}: plain", f"{plain * 1e3:.1f} ms")
            for mode, goal in DP_SGD.items():
                found = ratio(seconds[mode], seconds["plain"])
                row(f"  {mode}", f"{found:.2f}x", f"<= {goal:g}x", found <= goal)


def steps(make: Callable[[], nn.Module], batch: int, count: int) -> dict[str, list[float]]:
    """Seconds of a step on one batch: plain, and with each way of clipping."""
    import torch

    from fedipfs.privacy import noise
    from fedipfs.privacy.base import Mechanism
    from fedipfs.privacy.dpsgd import PrivateGradients
    from fedipfs.tasks.vision import Mnist

    task, size = Mnist(), 4 * batch
    inputs, targets = torch.randn(size, 1, 28, 28), torch.randint(10, (size,))
    chosen = np.arange(0, size, 4)
    index = torch.from_numpy(chosen)
    start = make().train()

    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make().train()
        model.load_state_dict(start.state_dict())
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    model, optimizer = trained()

    def plain() -> None:
        loss = task.loss(model(inputs[index]), targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def private(mode: str, stack: ExitStack) -> Work:
        model, optimizer = trained()
        step = Mechanism(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.25, batch_size=batch)
        gradients = stack.enter_context(
            PrivateGradients(task, model, optimizer, inputs, targets, step, noise.generator(), mode)
        )

        def step_once() -> None:
            gradients.fill(chosen)
            optimizer.step()

        return step_once

    with ExitStack() as stack:
        ways: dict[str, Work] = {"plain": plain}
        ways |= {mode: private(mode, stack) for mode in DP_SGD}
        first = turns(ways, 1)["plain"][0]
        return turns(ways, count, max(1, round(LONG_S / first)))


# ---- the ledger


def ledger(folder: Path) -> None:
    from fedipfs.privacy.accounting import Event
    from fedipfs.privacy.ledger import Cap, Ledger

    account = Ledger.create(folder / "ledger", secrets.token_hex(32), Cap(3.0, 1e-5))
    path = next((folder / "ledger").glob("*.jsonl"))
    ours: list[float] = []
    busy: list[float] = []  # the processor, of ours; the rest waits for the disk, twice
    theirs: list[float] = []
    file = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def spend() -> None:
        event = Event(noise_multiplier=1.0, sample_rate=0.01, steps=1)
        account.spend([event], purpose="training", run="bench", round=1, coordinator="bench")

    def append(line: bytes) -> None:
        os.write(file, line)
        os.fsync(file)

    while len(ours) < max(LINES) + WINDOW:
        ours.append(timed(lambda: busy.append(processor(spend))))
        line = path.read_bytes().splitlines(keepends=True)[-1]
        theirs.append(timed(lambda line=line: append(line)))
    os.close(file)
    title("ledger, ms a spend", f"medians of {WINDOW}; spend / append and fsync of the line, ratio")
    for lines in LINES:
        part = slice(lines - 1, lines - 1 + WINDOW)  # its first line says what it is
        a, b = (1e3 * statistics.median(times[part]) for times in (ours, theirs))
        figure = f"{a:.2f} / {b:.2f}, {ratio(ours[part], theirs[part]):.1f}x"
        row(f"with {lines} lines", figure, f"<= {LEDGER_MS:g}", a <= LEDGER_MS)
    row("  of it processor time", f"{1e3 * statistics.median(busy[part]):.2f}")
    row(f"mean of all {len(ours)}, with the epsilons", f"{1e3 * statistics.mean(ours):.2f}")
    row("  the longest of them", f"{1e3 * max(ours):.0f}")


# ---- noise


def distributed(count: int) -> None:
    from fedipfs.privacy import noise, skellam
    from fedipfs.privacy.distributed import Parameters, encode

    told: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 1.0, "dimension": VALUES}
    parameters = Parameters.chosen(**told, survivors=SURVIVORS, cohort=COHORT)
    seed, rng, other = secrets.token_bytes(32), noise.generator(), np.random.default_rng()
    update = other.standard_normal(VALUES, dtype=np.float32)
    share = parameters.variance / SURVIVORS

    def gaussian() -> np.ndarray:
        """The same share of noise, where it need not survive arithmetic modulo 2^32."""
        clipped = update * np.float32(1 / np.linalg.norm(update))
        drawn = other.standard_normal(VALUES, dtype=np.float32)
        return clipped + drawn * np.float32(SURVIVORS**-0.5)

    ways: dict[str, Work] = {
        "encode": lambda: encode(update, parameters, seed, rng),
        "noise": lambda: skellam.sample(rng, share, parameters.size),
        "gaussian": gaussian,
    }
    seconds = turns(ways, count)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    title(f"distributed noise, {VALUES / 1e6:.1f}M values", f"median of {count}, processor time")
    found = medians["encode"]
    row("rotated, rounded, noised, s", f"{found:.3f}", f"<= {ENCODE_S:g}", found <= ENCODE_S)
    row("  of it Skellam noise, s", f"{medians['noise']:.3f}")
    row("  clipped, plain Gaussian noise of NumPy, s", f"{medians['gaussian']:.3f}")
    row("  ratio", f"{ratio(seconds['encode'], seconds['gaussian']):.1f}x")


def generators(count: int) -> None:
    import torch

    from fedipfs.privacy import noise

    ours, numpy = noise.generator(), np.random.default_rng()
    values, tensor = np.empty(VALUES, np.float32), torch.empty(VALUES)
    ways: dict[str, Work] = {
        "ours, AES in counter mode": lambda: ours.standard_normal(out=values, dtype=np.float32),
        "NumPy's, PCG64": lambda: numpy.standard_normal(out=values, dtype=np.float32),
        "torch's, 32 bits of seed": lambda: tensor.normal_(),
    }
    seconds = turns(ways, count)
    (first, mine), *others = seconds.items()
    title("Gaussian noise, float32, ns a value", f"median of {count}, processor time; ratio")
    row(first, f"{statistics.median(mine) / VALUES * 1e9:.1f}")
    for name, times in others:
        median = statistics.median(times) / VALUES * 1e9
        row(name, f"{median:.1f}, {ratio(mine, times):.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    as_worker()
    one_thread()
    dp_sgd(options.turns)
    with scratch() as folder:
        ledger(folder)
    distributed(options.turns)
    generators(options.turns)


if __name__ == "__main__":
    main()
