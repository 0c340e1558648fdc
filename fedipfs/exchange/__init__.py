"""The edge: the one place where Flower records meet the store."""

from fedipfs.exchange.arrays import (
    StoredArrays,
    as_numpy,
    from_numpy,
    from_torch,
    put_arrays,
    specs_of,
    store_arrays,
    stored_cid,
    to_dtype,
    to_torch,
)
from fedipfs.exchange.compressing import Cost, cost_of
from fedipfs.exchange.default import default_vault, use_store
from fedipfs.exchange.ensemble import Recipe, get_ensemble, put_ensemble, tensors_of
from fedipfs.exchange.flat import flat_size, flatten, moved_by
from fedipfs.exchange.frames import frame, unframe
from fedipfs.exchange.grid import CidGrid
from fedipfs.exchange.heart import Exchange
from fedipfs.exchange.inspect import NOT_FINITE, check_examples, check_finite, check_update
from fedipfs.exchange.loading import load_model
from fedipfs.exchange.mod import cid_mod
from fedipfs.exchange.over import GridOver
from fedipfs.exchange.packing import pack, unpack
from fedipfs.exchange.signing import Stamp, signed_bytes, stamp_of
from fedipfs.exchange.vault import SEALS, Seal, Vault, choose_seal, vault_of

__all__ = [
    "NOT_FINITE",
    "SEALS",
    "CidGrid",
    "Cost",
    "Exchange",
    "GridOver",
    "Recipe",
    "Seal",
    "Stamp",
    "StoredArrays",
    "Vault",
    "as_numpy",
    "check_examples",
    "check_finite",
    "check_update",
    "choose_seal",
    "cid_mod",
    "cost_of",
    "default_vault",
    "flat_size",
    "flatten",
    "frame",
    "from_numpy",
    "from_torch",
    "get_ensemble",
    "load_model",
    "moved_by",
    "pack",
    "put_arrays",
    "put_ensemble",
    "signed_bytes",
    "specs_of",
    "stamp_of",
    "store_arrays",
    "stored_cid",
    "tensors_of",
    "to_dtype",
    "to_torch",
    "unframe",
    "unpack",
    "use_store",
    "vault_of",
]
