"""What a strategy remembers between rounds (moments, momentum, ...), to and from the store.

A snapshot is a DAG-CBOR record {values, tensors}: plain values by attribute name, and a link to
one safetensors file with all arrays. Attributes are found by their type, so Flower's strategies
are saved as they are. Callables and names that begin with an underscore are not state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedipfs import weights
from fedipfs.errors import ConfigError, RunError
from fedipfs.exchange import Vault, as_numpy, from_numpy, vault_of
from fedipfs.ipld import CID
from fedipfs.store import Store

_PLAIN = (bool, int, float, str, type(None))


def save_state(strategy: Strategy, where: Store | Vault) -> tuple[CID, CID]:
    """Put the state of `strategy` away; returns the CIDs of the record and of its tensors.

    Raises ConfigError for an attribute of a type that cannot be saved.
    """
    vault = vault_of(where)
    tensors: dict[str, np.ndarray] = {}
    values = _pack(strategy, "", tensors)
    specs = [weights.spec_of(name, array) for name, array in tensors.items()]
    arrays = vault.put_weights(specs, tensors.__getitem__, private=True)
    return vault.put_record({"values": values, "tensors": arrays}, private=True), arrays


def load_state(strategy: Strategy, where: Store | Vault, state: CID) -> None:
    """Set the attributes of `strategy` to what `save_state` stored."""
    vault = vault_of(where)
    record = vault.get_record(state)
    _unpack(strategy, record["values"], vault.weights(record["tensors"]))


def _pack(strategy: Strategy, prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in sorted(vars(strategy).items()):
        if name.startswith("_") or callable(value):
            continue
        path = f"{prefix}{name}"
        if isinstance(value, _PLAIN):
            values[name] = {"plain": value}
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


def _items(value: Any, path: str, strategy: Strategy) -> tuple[str, dict[str, np.ndarray]]:
    """Kind and named arrays of a collection of arrays."""
    if isinstance(value, ArrayRecord):
        return "record", {name: as_numpy(array) for name, array in value.items()}
    if isinstance(value, Mapping) and all(isinstance(v, np.ndarray) for v in value.values()):
        return "dict", {str(name): array for name, array in value.items()}
    if isinstance(value, list) and all(isinstance(v, np.ndarray) for v in value):
        return "list", {str(i): array for i, array in enumerate(value)}
    raise ConfigError(
        f"{type(strategy).__name__}.{path} is a {type(value).__name__}, which cannot be saved "
        "for resume; begin its name with an underscore if it can be derived"
    )


def _unpack(
    strategy: Strategy, values: Mapping[str, Any], tensors: weights.Weights, prefix: str = ""
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
            _unpack(getattr(strategy, name), content, tensors, f"{path}.")
        else:
            setattr(strategy, name, _value(kind, content, path, tensors))


def _value(kind: str, content: Any, path: str, tensors: weights.Weights) -> Any:
    if kind == "plain":
        return content
    if kind == "array":
        return tensors.tensor(content)
    items = {key: tensors.tensor(f"{path}/{key}") for key in content}
    if kind == "record":
        return from_numpy(items)
    return items if kind == "dict" else list(items.values())
