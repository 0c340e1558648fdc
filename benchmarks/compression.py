"""Compressed updates: bytes, error, speed, and the accuracy of whole runs, for each codec.

The alternative is what a run does without compression: the update as plain safetensors. Bytes and
error are those of one client's first update on `mnist` (exact, not timed). Speed is that of an
update of 11 million parameters: encode and hash it as blocks, and read all of it from a folder
store as a server does. Accuracy is that of the real command on `mnist` and `mnist_noniid`; its
alternative is the same run with compression=none. Goals, for MNIST: int8 at most 26 % of the bytes
and 0.1 point of accuracy lost; topk with 1 % of the coordinates at most 3 % and, IID, one point.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
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

from fedipfs import FolderStore, weights
from fedipfs.ipld import CID, RAW, unixfs
from fedipfs.weights import Weights
from fedipfs.weights.compression import CODECS, Decoded, Spec, decode, encode

BYTES = {"int8": 26.0, "topk": 3.0}  # % of the plain update
POINTS = {"int8": {"mnist": 0.1, "mnist_noniid": 0.1}, "topk": {"mnist": 1.0}}


def first_update() -> tuple[dict[str, Any], dict[str, Any], str]:
    """A model, what the first client of `mnist` makes of it, and the data set's name."""
    import torch

    from fedipfs import data
    from fedipfs.clients.trainer import train
    from fedipfs.tasks.vision import Mnist

    config = configuration("mnist")
    torch.manual_seed(config["seed"])
    task = Mnist()
    model, dataset = task.model(), task.data(root=None, fallback="digits")
    total, options = config["clients"]["total"], config["train"]
    parts = data.partition(dataset.train.targets, name="iid", clients=total, seed=config["seed"])
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    inputs, targets = dataset.train.inputs[parts[0]], dataset.train.targets[parts[0]]
    train(task, model, inputs, targets, config=options, seed=1, server_round=1)
    return before, {n: t.numpy() for n, t in model.state_dict().items()}, dataset.name


def put(store: FolderStore, spec: Spec, base: Weights, new: dict[str, Any]) -> Decoded:
    """The update in the store, and as the server has it."""
    encoded = encode(spec, base.specs, new.__getitem__, base, base.cid)
    file = Weights(store, unixfs.build(iter(encoded.file), store.put))
    return decode(file, base, base.cid)


def hashed(data: bytes, codec: int = RAW) -> CID:
    """What a store that keeps nothing answers."""
    return CID.of(data, codec)


def read(tensors: weights.Tensors) -> float:
    """Read every value once, piece by piece."""
    return sum(float(piece[0]) for name in tensors.names for piece in tensors.pieces(name))


def sizes(folder: Path) -> None:
    before, new, dataset = first_update()
    store = FolderStore(folder, durable=False)
    base = Weights(store, weights.put(store, before))
    note = f"a client's first update on {dataset}; % of {base.nbytes:,} B, relative L2 error"
    title("bytes and error", note)
    for name in CODECS:
        payload = put(store, chosen(name), base, new).payload
        share = 100 * payload.file.nbytes / base.nbytes
        goal = BYTES.get(name)
        met = judged(share <= goal, dataset) if goal else None
        figure = f"{share:.2f} %, {payload.error:.4f}"
        row(str(payload.spec), figure, f"{goal:g} %" if goal else "", met)


def speeds(folder: Path, pairs: int) -> None:
    rng = np.random.default_rng(0)
    before = {f"layer{i}": rng.normal(size=1_100_000).astype("f4") for i in range(10)}
    new = {
        n: a + np.float32(1e-3) * rng.normal(size=a.size).astype("f4") for n, a in before.items()
    }
    store = FolderStore(folder, durable=False)
    base = Weights(store, weights.put(store, before))
    plain = Weights(store, weights.put(store, new))
    title("speed", f"11 million parameters, medians of {pairs} pairs: compressed / plain, ratio")
    for name in CODECS:
        spec = chosen(name)
        decoded = put(store, spec, base, new)

        def make_plain() -> CID:
            specs = base.specs.values()
            return unixfs.build(weights.chunks(specs, new.__getitem__), hashed)

        def make_ours(spec: Spec = spec) -> CID:
            encoded = encode(spec, base.specs, new.__getitem__, base, base.cid)
            return unixfs.build(iter(encoded.file), hashed)

        def read_ours(decoded: Decoded = decoded) -> float:
            return read(decoded)

        for label, ours, theirs in (
            ("encode and hash", make_ours, make_plain),
            ("read and decode", read_ours, lambda: read(plain)),
        ):
            times = interleave(lambda o=ours: timed(o), lambda t=theirs: timed(t), pairs)
            a, b = times.medians
            row(f"{name}: {label}", f"{a * 1e3:.0f} / {b * 1e3:.0f} ms, {times.ratio:.2f} x")


def accuracies(folder: Path, seeds: int) -> None:
    for experiment in ("mnist", "mnist_noniid"):
        title(experiment, f"accuracy in % after its rounds, mean of {seeds} seeds; points lost")
        plain, dataset = accuracy(folder, experiment, "none", seeds)
        row("none", f"{plain:.2f} %")
        for name in CODECS:
            found, _ = accuracy(folder, experiment, name, seeds)
            lost, goal = plain - found, POINTS.get(name, {}).get(experiment)
            met = judged(lost <= goal, dataset) if goal else None
            row(name, f"{found:.2f} %, {lost:+.2f}", f"{goal} points" if goal else "", met)


def accuracy(folder: Path, experiment: str, name: str, seeds: int) -> tuple[float, str]:
    """The test accuracy in % of whole runs, and the data set they used."""
    found = []
    for seed in range(1, seeds + 1):
        summary, _ = command(folder, experiment, f"compression={name}", f"seed={seed}")
        found.append(100 * summary["metrics"]["accuracy"])
    return float(np.mean(found)), summary["dataset"]


def chosen(name: str) -> Spec:
    """A codec as conf/compression has it."""
    spec = Spec.of(configuration("mnist", f"compression={name}")["compression"])
    assert spec is not None
    return spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="of timings")
    parser.add_argument("--seeds", type=int, default=1, help="runs that are averaged; 0: none")
    options = parser.parse_args()
    one_thread()
    with scratch() as folder:
        sizes(folder / "sizes")
        speeds(folder / "speeds", options.pairs)
        if options.seeds:
            runs = folder / "runs"
            runs.mkdir()
            accuracies(runs, options.seeds)


if __name__ == "__main__":
    main()
