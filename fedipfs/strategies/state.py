"""What a strategy remembers between rounds (moments, momentum, ...), to and from the store.

A snapshot is a DAG-CBOR record {values, tensors}: plain values by attribute name, and a link to
one safetensors file with all arrays; what is stored already is linked. Attributes are found by
their type, so Flower's strategies are saved as they are. Callables and names that begin with an
underscore are not state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedipfs import weights
from fedipfs.errors import ConfigError, RunError
from fedipfs.exchange import StoredArrays, Vault, as_numpy, from_numpy, stored_cid, vault_of
from fedipfs.ipld import CID, DAG_CBOR, dagcbor, links
from fedipfs.store import Store

_PLAIN = (bool, int, float, str, type(None))


def save_state(strategy: Strategy, where: Store | Vault) -> tuple[CID, list[CID]]:
    """Put the state of `strategy` away; returns the record's CID and all that it links.

    Raises ConfigError for an attribute of a type that cannot be saved.
    """
    vault = vault_of(where)
    tensors: dict[str, np.ndarray] = {}
    values = _pack(strategy, "", tensors)
    specs = [weights.spec_of(name, array) for name, array in tensors.items()]
    arrays = vault.put_weights(specs, tensors.__getitem__, private=True)
    record = {"values": values, "tensors": arrays}
    linked = links(CID.of(b"", DAG_CBOR), dagcbor.encode(record))
    return vault.put_record(record, private=True), list(linked)


def load_state(strategy: Strategy, where: Store | Vault, state: CID) -> None:
    """Set the attributes of `strategy` to what `save_state` stored."""
    vault = vault_of(where)
    record = vault.get_record(state)
    _unpack(strategy, record["values"], vault.weights(record["tensors"]), vault)


def _pack(strategy: Strategy, prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in sorted(vars(strategy).items()):
        if name.startswith("_") or callable(value):
            continue
        path = f"{prefix}{name}"
        if _is_plain(value):
            values[name] = {"plain": value}
        elif isinstance(value, StoredArrays):
            values[name] = {"stored": _reference(value)}
        elif isinstance(value, dict) and _are(StoredArrays, value.values()):
            values[name] = {"members": [[key, _reference(each)] for key, each in value.items()]}
        elif isinstance(value, np.ndarray | np.generic):
            tensors[path] = np.asarray(value)
            values[name] = {"array": path}
        elif isinstance(value, Strategy):
            values[name] = {"strategy": _pack(value, f"{path}.", tensors)}
        else:
            kind, items = _items(value, path, strategy)
            for key, array in items.items():
                tensors[f"{path}/{key}"] = array
            values[name] = {kind: list(items)}
    return values


def _is_plain(value: Any) -> bool:
    """Numbers, texts and truths, and lists and text-keyed dictionaries of them."""
    if isinstance(value, list):
        return _are(_PLAIN, value)
    if isinstance(value, dict) and value:
        return _are(str, value) and _are(_PLAIN, value.values())
    return isinstance(value, _PLAIN)


def _are(kind: Any, values: Iterable[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _reference(arrays: StoredArrays) -> list[CID | None]:
    return [stored_cid(arrays), arrays.order]


def _items(value: Any, path: str, strategy: Strategy) -> tuple[str, dict[str, np.ndarray]]:
    """Kind and named arrays of a collection of arrays."""
    if isinstance(value, ArrayRecord):
        return "record", {name: as_numpy(array) for name, array in value.items()}
    if isinstance(value, Mapping) and _are(np.ndarray, value.values()):
        return "dict", {str(name): array for name, array in value.items()}
    if isinstance(value, list) and _are(np.ndarray, value):
        return "list", {str(i): array for i, array in enumerate(value)}
    raise ConfigError(
        f"{type(strategy).__name__}.{path} is a {type(value).__name__}, which cannot be saved "
        "for resume; begin its name with an underscore if it can be derived"
    )


def _unpack(
    strategy: Strategy,
    values: Mapping[str, Any],
    tensors: weights.Weights,
    vault: Vault,
    prefix: str = "",
) -> None:
    for name, packed in values.items():
        if name not in vars(strategy):
            raise RunError(
                f"the saved state has {name!r}, which {type(strategy).__name__} does not; "
                "resume with the versions that the run was made with"
            )
        ((kind, content),) = packed.items()
        path = f"{prefix}{name}"
        if kind == "strategy":
            _unpack(getattr(strategy, name), content, tensors, vault, f"{path}.")
        else:
            setattr(strategy, name, _value(kind, content, path, tensors, vault))


def _value(kind: str, content: Any, path: str, tensors: weights.Weights, vault: Vault) -> Any:
    if kind == "plain":
        return content
    if kind == "stored":
        return StoredArrays.open(vault, *content)
    if kind == "members":
        return {key: StoredArrays.open(vault, *reference) for key, reference in content}
    if kind == "array":
        return tensors.tensor(content)
    items = {key: tensors.tensor(f"{path}/{key}") for key in content}
    if kind == "record":
        return from_numpy(items)
    return items if kind == "dict" else list(items.values())
