"""The edge: the one place where Flower records meet the store."""

from fedipfs.exchange.arrays import (
    StoredArrays,
    as_numpy,
    from_numpy,
    from_torch,
    specs_of,
    store_arrays,
    stored_cid,
    to_dtype,
    to_torch,
)
from fedipfs.exchange.default import default_store, use_store
from fedipfs.exchange.frames import frame, unframe
from fedipfs.exchange.grid import CidGrid
from fedipfs.exchange.heart import Exchange
from fedipfs.exchange.inspect import check_examples, check_finite, check_update
from fedipfs.exchange.mod import cid_mod

__all__ = [
    "CidGrid",
    "Exchange",
    "StoredArrays",
    "as_numpy",
    "check_examples",
    "check_finite",
    "check_update",
    "cid_mod",
    "default_store",
    "frame",
    "from_numpy",
    "from_torch",
    "specs_of",
    "store_arrays",
    "stored_cid",
    "to_dtype",
    "to_torch",
    "unframe",
    "use_store",
]
