"""What the benchmarks share: pairs of timings, the real command, plain evaluation, the printing.

Run one by `python benchmarks/NAME.py`, all by `make bench`. A missed goal is printed, never an
error: figures depend on the machine and on what else it does.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WORKERS = 2


class Pairs(NamedTuple):
    """Timings of two ways to do the same thing, taken in turn."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """The median over the pairs of ours / theirs."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.ours), statistics.median(self.theirs)


def interleave(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> Pairs:
    """Call both `pairs` times in turn, the second first in every other pair."""
    times = Pairs([], [])
    for number in range(pairs):
        first, second = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        one, two = first(), second()
        a, b = (one, two) if first is ours else (two, one)
        times.ours.append(a)
        times.theirs.append(b)
    return times


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def title(text: str, note: str) -> None:
    """Name what follows and how it was taken."""
    print(f"{text} ({note})", flush=True)


def row(label: str, figure: str, goal: str = "", met: bool | None = None) -> None:
    """One figure, and whether it meets its goal."""
    verdict = "" if met is None else f"   goal {goal}: {'met' if met else 'NOT met'}"
    print(f"  {label:<58} {figure:>12}{verdict}", flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed again."""
    with tempfile.TemporaryDirectory(prefix="fedipfs-bench-") as folder:
        yield Path(folder)


def judged(met: bool, dataset: str) -> bool | None:
    """`met`, or None where the goal was set for MNIST and stand-in data were used."""
    return met if dataset == "mnist" else None


def configuration(experiment: str, *words: str) -> dict[str, Any]:
    """The checked configuration of an experiment, as the command line would give it."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from fedipfs.server import settings

    with initialize_config_module("fedipfs.conf", version_base="1.3"):
        config: Any = compose("config", [f"+experiment={experiment}", *words])
    return settings.check(OmegaConf.to_container(config, resolve=True))


def command(runs: Path, experiment: str, *words: str) -> tuple[dict[str, Any], float]:
    """Run the real command with a store of its own under `runs`: its summary, and wall seconds.

    Leave what it writes until all is measured: some file systems (ext4) create files ten times
    slower for minutes after many were removed.
    """
    folder = runs / f"{len(list(runs.iterdir()))}"
    line = [sys.executable, "-m", "fedipfs.server", f"+experiment={experiment}"]
    line += [f"runs_dir={folder}", "run_id=bench", f"engine.workers={WORKERS}", *words]
    began = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr}")
    return json.loads((folder / "bench" / "summary.json").read_text()), wall


def quiet_flower() -> None:
    """Take Flower's log off the terminal."""
    import logging

    from fedipfs.flower_compat import flower_logger

    logger = flower_logger()
    logger.handlers, logger.propagate = [logging.NullHandler()], False


def one_thread() -> None:
    """Torch on one thread, and past what it does only once (its first optimizer takes a second)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def as_worker() -> None:
    """Start this script anew, unless it has the environment that a run gives its workers."""
    kept = str(1 << 30)  # bytes of freed memory: see fedipfs.server.engine.pool.warm_up
    wanted = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": kept,
        "MALLOC_MMAP_THRESHOLD_": kept,
    }
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


def average(states: list[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The mean of state_dicts weighted by examples, in memory."""
    total = sum(count for count, _ in states)
    return {
        name: sum(state[name] * (count / total) for count, state in states)  # type: ignore[misc]
        for name in states[0][1]
    }


def accuracy(model: torch.nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    """Share of examples that `model` gets right; loss is computed too, as the product does."""
    import torch

    right = loss = 0.0
    model.eval()
    with torch.inference_mode():
        for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
            output = model(inputs)
            loss += torch.nn.functional.cross_entropy(output, targets, reduction="sum").item()
            right += (output.argmax(1) == targets).sum().item()
    return right / len(y)
