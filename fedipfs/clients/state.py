"""What a client remembers between messages (its `Context.state`), to and from the store.

A DAG-CBOR record {records, arrays}: the other records as Flower writes them, and by key a link to
each array record's safetensors file and to its order. So large states are stored as models are.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, RecordDict

from fedipfs.exchange import StoredArrays, Vault, put_arrays
from fedipfs.flower_compat import records_from_bytes, records_to_bytes
from fedipfs.ipld import CID


def save_state(vault: Vault, state: RecordDict) -> list[CID]:
    """Put a state away, readable by this client alone; its CID, then those of what it links."""
    arrays = {}
    rest = RecordDict()
    for key, record in state.items():
        if isinstance(record, ArrayRecord):
            arrays[key] = list(put_arrays(vault, record, private=True))
        else:
            rest[key] = record
    value = {"records": records_to_bytes(rest), "arrays": arrays}
    root = vault.put_record(value, private=True)
    vault.store.publish()
    return [root, *(cid for pair in arrays.values() for cid in pair if cid is not None)]


def load_state(vault: Vault, cid: CID | None) -> RecordDict:
    """What `save_state` put away; an empty state for None."""
    if cid is None:
        return RecordDict()
    value = vault.get_record(cid)
    state = records_from_bytes(value["records"])
    for key, (arrays, order) in value["arrays"].items():
        state[key] = StoredArrays.open(vault, arrays, order)
    return state
