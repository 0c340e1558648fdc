"""Records of a run: DAG-CBOR blocks that lead from the last round back to the first.

The first record ("fedipfs/run/v1") holds the configuration, the initial model and the versions;
each round's record ("fedipfs/round/v1") links to the record before it. They hold nothing that
differs between two runs of the same configuration (no times, no run id), so equal runs have equal
heads, and a replay proves itself by its head's CID.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from fedipfs.errors import RunError
from fedipfs.ipld import CID, unixfs
from fedipfs.store import Store, dag

RUN, ROUND = "fedipfs/run/v1", "fedipfs/round/v1"
_PACKAGES = ("fedipfs", "flwr", "torch", "numpy")


class Update(NamedTuple):
    """One client's contribution to a round."""

    client: str
    cid: CID
    examples: int | float
    metrics: dict[str, Any]


def run_record(config: CID, model: CID, order: CID | None, dataset: str) -> dict[str, Any]:
    """The record a run begins with."""
    return {
        "type": RUN,
        "config": config,
        "model": model,
        "order": order,
        "dataset": dataset,
        "profile": unixfs.PROFILE,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def round_record(
    *,
    number: int,
    parent: CID,
    config: CID,
    model_in: CID,
    model_out: CID,
    order: CID | None,
    updates: Sequence[Update],
    failures: Mapping[str, str],
    metrics: Mapping[str, Any],
    strategy: CID,
    clients: Mapping[int, CID],
) -> dict[str, Any]:
    """The record of one completed round.

    `strategy` links what the strategy remembers, `clients` the state of each node that keeps any
    (local engine only); both are what a resumed run needs.
    """
    return {
        "type": ROUND,
        "round": number,
        "parent": parent,
        "config": config,
        "model_in": model_in,
        "model_out": model_out,
        "order": order,
        "updates": [{**update._asdict(), "metrics": plain(update.metrics)} for update in updates],
        "failures": dict(failures),
        "metrics": plain(metrics),
        "strategy": strategy,
        "clients": {str(node): state for node, state in clients.items()},
        "privacy": None,
    }


def plain(value: Any) -> Any:
    """`value` as DAG-CBOR and JSON can hold it: NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def chain(store: Store, head: CID) -> Iterator[tuple[CID, dict[str, Any]]]:
    """(CID, record) from `head` back to the run's first record.

    Raises RunError for a record that is neither, and BlockNotFound where the chain breaks.
    """
    cid: CID | None = head
    while cid is not None:
        record = dag.get_record(store, cid)
        if not isinstance(record, dict) or record.get("type") not in (RUN, ROUND):
            raise RunError(f"{cid} is not a record of a FedIPFS run")
        yield cid, record
        cid = record.get("parent")
