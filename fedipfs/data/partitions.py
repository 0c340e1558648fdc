"""Divide a data set over clients: which examples each of them holds.

Dirichlet, shard and pathological partitions are Flower Datasets' partitioners, given only labels
and indices. Importing that library takes seconds, so partitions are kept in the user's cache:
worker processes and second runs read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedipfs.data import cache
from fedipfs.data.base import Labels
from fedipfs.errors import ConfigError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

NAMES = ("iid", "dirichlet", "shards", "pathological")
REVISION = 1  # raise it when the code below divides otherwise: kept partitions are then outdated
Indices = NDArray[np.int64]


def partition(
    labels: Labels,
    *,
    name: str,
    clients: int,
    seed: int,
    alpha: float = 0.5,
    shards_per_client: int = 2,
    classes_per_client: int = 2,
    cache_dir: Path | None = None,
) -> list[Indices]:
    """The indices of each client's examples: every index once, no client without any.

    `labels` has shape (N,), int64. By `name`:
    - `iid`: shuffled, then cut into parts whose sizes differ by one at most;
    - `dirichlet`: of each class, the clients' proportions are drawn from Dirichlet(`alpha`)
      (Yurochkin et al. 2019; the smaller `alpha`, the less alike the clients);
    - `shards`: sorted by label and cut into `clients * shards_per_client` shards, dealt at random
      (McMahan et al. 2017). Where N is no multiple of the shards, each of the few examples left
      over, drawn at random, goes to a client that has its label;
    - `pathological`: every client has `classes_per_client` classes.

    The same arguments give the same partition. `cache_dir` defaults to a folder in the user's
    cache; one that cannot be written is not used. Raises ConfigError for what cannot be divided.
    """
    _check(labels, name, clients, alpha, shards_per_client, classes_per_client)
    if name == "iid":
        # Exactly IidPartitioner on shuffled data (a test compares), without the import.
        order = np.random.default_rng(seed).permutation(len(labels)).astype(np.int64)
        return np.array_split(order, clients)
    # Only what this kind of partition depends on is in its key.
    detail = {
        "dirichlet": float(alpha),
        "shards": int(shards_per_client),
        "pathological": int(classes_per_client),
    }[name]
    version = [REVISION, metadata.version("flwr-datasets")]
    key = hashlib.sha256(json.dumps([name, clients, seed, detail, version]).encode())
    key.update(np.ascontiguousarray(labels).tobytes())
    path = (cache_dir or cache.folder() / "partitions") / f"{name}-{key.hexdigest()[:32]}.npz"

    def compute() -> dict[str, Indices]:
        parts = _COMPUTE[name](labels, clients, seed, detail)
        return {
            "order": np.concatenate(parts),
            "sizes": np.array([len(part) for part in parts], dtype=np.int64),
        }

    kept = cache.arrays(path, ("order", "sizes"), compute)
    order, sizes = kept["order"], kept["sizes"]
    return np.split(order, np.cumsum(sizes)[:-1])


def _check(
    labels: Labels, name: str, clients: int, alpha: float, shards: int, classes: int
) -> None:
    if name not in NAMES:
        raise ConfigError(f"data.partition={name} is unknown; choose one of {', '.join(NAMES)}")
    if clients < 1:
        raise ConfigError(f"clients.total={clients} must be 1 or more")
    if clients > len(labels):
        raise ConfigError(
            f"clients.total={clients} is more than the {len(labels)} training examples;"
            f" use {len(labels)} clients or fewer"
        )
    if name == "dirichlet" and not alpha > 0:
        raise ConfigError(f"data.alpha={alpha} must be above 0, as 0.5")
    if name == "shards" and not 1 <= shards <= len(labels) // clients:
        raise ConfigError(
            f"data.shards_per_client={shards} must be from 1 to {len(labels) // clients}, for"
            f" {clients} clients and {len(labels)} training examples"
        )
    known = len(np.unique(labels))
    if name == "pathological" and not 1 <= classes <= known:
        raise ConfigError(f"data.classes_per_client={classes} must be from 1 to {known}")


def _dirichlet(labels: Labels, clients: int, seed: int, alpha: float) -> list[Indices]:
    from flwr_datasets.partitioner import DirichletPartitioner

    # Ten examples each where that leaves the proportions much freedom, fewer where data are few.
    least = max(1, min(10, len(labels) // (4 * clients)))
    try:
        return _run(
            DirichletPartitioner(clients, "label", alpha, min_partition_size=least, seed=seed),
            labels,
        )
    except ValueError as error:
        raise ConfigError(
            f"data.alpha={alpha:g} leaves one of {clients} clients fewer than {least} of the"
            f" {len(labels)} training examples, in ten draws; raise data.alpha, lower"
            " clients.total, or try another seed"
        ) from error


def _shards(labels: Labels, clients: int, seed: int, shards: int) -> list[Indices]:
    from flwr_datasets.partitioner import ShardPartitioner

    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels)).astype(np.int64)
    whole = len(labels) - len(labels) % (clients * shards)
    used, left = shuffled[:whole], shuffled[whole:]
    # Sorting keeps equal labels in order, so shuffling first varies who meets whom in a shard.
    partitioner = ShardPartitioner(clients, "label", num_shards_per_partition=shards, seed=seed)
    parts = [used[part] for part in _run(partitioner, labels[used])]
    for index in left:
        holders = [i for i, part in enumerate(parts) if labels[index] in labels[part]]
        taker = min(holders or range(clients), key=lambda i: len(parts[i]))
        parts[taker] = np.append(parts[taker], index)
    return parts


def _pathological(labels: Labels, clients: int, seed: int, classes: int) -> list[Indices]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    known = len(np.unique(labels))
    if clients * classes < known:
        raise ConfigError(
            f"{clients} clients with data.classes_per_client={classes} cannot hold all {known}"
            " classes; raise either, so that their product is the number of classes or more"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels)).astype(np.int64)
    renamed = rng.permutation(known)[np.unique(labels, return_inverse=True)[1]]
    # Parts of one class each, going round the (renamed) classes, and as many of them in a row to
    # each client: its classes differ, and none is left out, as choosing at random may.
    partitioner = PathologicalPartitioner(
        clients * classes, "label", 1, class_assignment_mode="deterministic", shuffle=False
    )
    try:
        parts = _run(partitioner, renamed[shuffled])
    except ValueError as error:
        raise ConfigError(
            f"{clients} clients with data.classes_per_client={classes} need more examples of a"
            " class than there are; lower either"
        ) from error
    return [
        shuffled[rng.permutation(np.concatenate(parts[i : i + classes]))]
        for i in range(0, len(parts), classes)
    ]


def _run(partitioner: Partitioner, labels: Labels) -> list[Indices]:
    from datasets import Dataset

    columns = {"label": labels, "index": np.arange(len(labels))}
    partitioner.dataset = Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each draw that is repeated
        parts: list[Any] = [
            partitioner.load_partition(i)[:]["index"] for i in range(partitioner.num_partitions)
        ]
    return [np.asarray(part, dtype=np.int64) for part in parts]


_COMPUTE: dict[str, Any] = {
    "dirichlet": _dirichlet,
    "shards": _shards,
    "pathological": _pathological,
}

# Read by the libraries when they are imported: nothing here needs the network.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
