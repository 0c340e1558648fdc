"""Records of a run: DAG-CBOR blocks that lead from the last round back to the first.

The first record ("fedipfs/run/v1") holds the configuration, the initial model and the versions;
each round's record ("fedipfs/round/v1") links to the record before it. They hold nothing that
differs between two runs of the same configuration (no times, no run id), so equal runs have equal
heads, and a replay proves itself by its head's CID.

A coordinator with keys signs every record, and the first then holds a nonce, as signatures must
not be good for another run. What seals content also seals a round's details: who took part, how,
with what result. Then the record shows only what leads on: links without names or numbers.
"""

from __future__ import annotations

import math
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NamedTuple

from fedipfs.errors import NotRecipient, RunError, SignatureMissing, SignatureWrong
from fedipfs.exchange import Vault, vault_of
from fedipfs.ipld import CID, DAG_CBOR, dagcbor, links, unixfs
from fedipfs.store import Store, dag
from fedipfs.trust import Statement
from fedipfs.trust.party import Party

RUN, ROUND = "fedipfs/run/v1", "fedipfs/round/v1"
_PACKAGES = ("fedipfs", "flwr", "torch", "numpy")
_DETAILS = (  # of a round
    "updates",
    "failures",
    "metrics",
    "aggregation",
    "clients",
    "asking",
    "privacy",
)
_SIGNATURE = ("signature", "by")
_FIRST = "first"  # what stands for the run in the signature of its first record


class Update(NamedTuple):
    """One client's contribution to a round.

    `signed` is what the client's `signature` covers (exchange/signing.py); empty without keys.
    `base` is the model it began with, where that is not the round's.
    """

    client: str
    cid: CID
    examples: int | float
    metrics: dict[str, Any]
    signed: bytes = b""
    signature: bytes = b""
    base: CID | None = None


def run_record(
    config: CID, model: CID, order: CID | None, dataset: str, vault: Vault
) -> dict[str, Any]:
    """The record a run begins with; `vault` says who coordinates it and what it seals."""
    record: dict[str, Any] = {
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
    if (party := vault.party) is not None:
        record["seal"] = vault.seal
        record["nonce"] = secrets.token_bytes(16)
        record["coordinator"] = party.identity.public.fingerprint
    return record


def round_record(
    *,
    number: int,
    run: CID,
    parent: CID,
    config: CID,
    model_in: CID,
    model_out: CID,
    order: CID | None,
    result: CID | None,
    updates: Sequence[Update],
    failures: Mapping[str, str],
    metrics: Mapping[str, Any],
    aggregation: Mapping[str, Any],
    strategy: CID,
    clients: Mapping[int, Sequence[CID]],
    asking: Mapping[str, Any],
    privacy: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The record of one completed round.

    `model_out` is what the next round begins with, `result` what the run yields if that is
    something else. `aggregation` says how the updates were combined. `strategy` links what the
    strategy remembers, `clients` the state of each node that keeps any and what that links (local
    engine only), `asking` who is left out and who is at work: what a resumed run needs. `privacy`
    is what the run has cost so far.
    """
    return {
        "type": ROUND,
        "round": number,
        "run": run,
        "parent": parent,
        "config": config,
        "model_in": model_in,
        "model_out": model_out,
        "order": order,
        "result": result,
        "updates": [_update(update) for update in updates],
        "failures": dict(failures),
        "metrics": plain(metrics),
        "aggregation": plain(aggregation),
        "strategy": strategy,
        "clients": {str(node): list(state) for node, state in clients.items()},
        "asking": asking,
        "privacy": privacy and plain(privacy),
    }


def _update(update: Update) -> dict[str, Any]:
    record = {**update._asdict(), "metrics": plain(update.metrics)}
    if not update.signature:
        del record["signed"], record["signature"]
    if update.base is None:
        del record["base"]
    return record


def hide(
    vault: Vault, record: Mapping[str, Any], blocks: Iterable[CID]
) -> tuple[dict[str, Any], CID | None]:
    """A round's record as it is stored, its details sealed where the vault seals.

    Returns the CID of the details, too, if they were sealed. `blocks` are what the record leads to
    through what only this party can read: they stay within reach of pins.
    """
    value = dict(record)
    if vault.seal == "none":
        return value, None
    details = {key: value.pop(key) for key in _DETAILS}
    value["details"] = vault.put_record(details, private=True)
    value["blocks"] = sorted(_links(details) | set(blocks))
    return value, value["details"]


def put(vault: Vault, record: Mapping[str, Any], run: CID | None) -> CID:
    """Store a record, signed if the vault has keys.

    `run` is the CID of the run's first record; None for that one itself.
    """
    value = dict(record)
    if vault.party is not None:
        statement = _statement(value, run)
        value["signature"], value["by"] = vault.party.sign(statement), vault.party.name
    return dag.put_record(vault.store, value)


def get(vault: Vault, cid: CID) -> dict[str, Any]:
    """A record, its signature checked if the vault has a party, its details opened.

    Without the coordinator's keys the details of a sealed round are left out. Raises RunError for
    what is no record of a run, SignatureRefused, and what reading it raises.
    """
    record = dag.get_record(vault.store, cid)
    if not isinstance(record, dict) or record.get("type") not in (RUN, ROUND):
        raise RunError(f"{cid} is not a record of a FedIPFS run")
    if record["type"] == ROUND:
        _check_form(cid, record)
    if vault.party is not None:
        _check(vault.party, cid, record)
        if "details" in record:
            with suppress(NotRecipient):  # a participant checks the signatures all the same
                record |= vault.get_record(record["details"])
    return record


def _check_form(cid: CID, record: Mapping[str, Any]) -> None:
    """RunError unless a round's record has a number and links that lead on."""
    number = record.get("round")
    linked = all(type(record.get(key)) is CID for key in ("run", "parent"))
    if type(number) is not int or number < 1 or not linked:
        raise RunError(f"{cid} is no record of a round: its round, run or parent is malformed")


def _check(party: Party, cid: CID, record: Mapping[str, Any]) -> None:
    signature, by = record.get("signature"), record.get("by")
    if signature is None:
        raise SignatureMissing(f"the record {cid} is not signed")
    if not isinstance(signature, bytes) or not isinstance(by, str):
        raise SignatureWrong(f"the signature of the record {cid} is incomplete")
    value = {key: item for key, item in record.items() if key not in _SIGNATURE}
    statement = _statement(value, value["run"] if value["type"] == ROUND else None)
    if party.role == "coordinator":
        party.verify_own(by, statement, signature)
    else:
        party.verify(by, statement, signature)


def _statement(value: Mapping[str, Any], run: CID | None) -> Statement:
    cid = CID.of(dagcbor.encode(dict(value)), DAG_CBOR)
    return Statement(cid, str(run or _FIRST), value.get("round", 0), "record")


def _links(value: Any) -> set[CID]:
    return set(links(CID.of(b"", DAG_CBOR), dagcbor.encode(value)))


def plain(value: Any) -> Any:
    """`value` as DAG-CBOR and JSON can hold it: NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _before(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the record that a round's links to has to be: its round, run, and last model."""
    return record["round"] - 1, record["run"], record.get("model_in")


def _end(cid: CID, record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record is, see `_before`."""
    if record["type"] == RUN:
        return 0, cid, record.get("model")
    return record["round"], record["run"], record.get("model_out")


def chain(where: Store | Vault, head: CID) -> Iterator[tuple[CID, dict[str, Any]]]:
    """(CID, record) from `head` back to the run's first record; see `get`.

    Raises RunError for a record that is neither, or that does not come before the one that links
    to it, and BlockNotFound where the chain breaks.
    """
    vault = vault_of(where)
    cid: CID | None = head
    later: dict[str, Any] | None = None
    while cid is not None:
        record = get(vault, cid)
        if later is not None and _before(later) != _end(cid, record):
            raise RunError(f"{cid} is not of the round before the record that links to it")
        yield cid, record
        later = record
        cid = record["parent"] if record["type"] == ROUND else None
