"""Arrays in, stored, CID out; and back. Grid and client mod are thin skins over this.

What crosses Flower instead of an `ArrayRecord` is one `ConfigRecord` under the key "fedipfs",
with two short strings an array record: `cid:<key>` and, if the tensors were not in canonical
order, `order:<key>` (the CID of the list of names, the same block in every round).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedipfs.errors import EdgeError
from fedipfs.exchange.arrays import StoredArrays, put_arrays
from fedipfs.ipld import CID
from fedipfs.store import Store

KEY = "fedipfs"
MAX_VALUE = 1024  # bytes: what is larger belongs in the store
MAX_MESSAGE = 16 * 1024  # bytes of keys and values together

Opener = Callable[[str, CID, CID | None], StoredArrays]


class Exchange:
    """Swaps array records and references over one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def swap_out(self, content: RecordDict) -> RecordDict:
        """A fresh RecordDict in which references stand for the array records of `content`.

        Raises EdgeError if anything else in it is larger than 1 KiB.
        """
        references: dict[str, str] = {}
        slim = RecordDict()
        for key, record in content.items():
            if isinstance(record, ArrayRecord):
                cid, order = put_arrays(self.store, record)
                references[f"cid:{key}"] = str(cid)
                if order is not None:
                    references[f"order:{key}"] = str(order)
            elif key == KEY:
                raise EdgeError(f"the record key {KEY!r} is reserved for references; rename yours")
            else:
                slim[key] = record
        if references:
            slim[KEY] = ConfigRecord({**references})
        check_small(slim)
        return slim

    def swap_in(self, content: RecordDict, open_arrays: Opener | None = None) -> RecordDict:
        """Inverse of `swap_out`: array records that fetch their arrays when asked.

        Only headers are read here. `open_arrays(key, cid, order)` makes a record of a reference;
        by default StoredArrays.open. Raises EdgeError for content that carries arrays or large
        values itself, CidError, BlockNotFound, BlockCorrupt or WeightsError for bad references.
        """
        open_arrays = open_arrays or self._open
        check_small(content)
        full = RecordDict()
        for key, record in content.items():
            if key != KEY:
                full[key] = record
        references = content.get(KEY, ConfigRecord())
        for name, text in references.items():
            kind, _, key = name.partition(":")
            if kind == "cid":
                order = references.get(f"order:{key}")
                full[key] = open_arrays(key, _cid(text), None if order is None else _cid(order))
            elif kind != "order" or f"cid:{key}" not in references:
                raise EdgeError(f"unknown reference {name[:80]!r}; the peer runs another version")
        return full

    def _open(self, key: str, cid: CID, order: CID | None) -> StoredArrays:
        return StoredArrays.open(self.store, cid, order)


def _cid(value: object) -> CID:
    if not isinstance(value, str):
        raise EdgeError(f"a reference is a string, not {type(value).__name__}")
    return CID.parse(value)


def check_small(content: RecordDict) -> None:
    """Raise EdgeError unless `content` holds only values that may cross Flower."""
    total = 0
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            raise EdgeError(
                f"record {key!r} carries {len(record)} arrays through Flower; "
                "arrays travel by CID: use CidGrid on the server and cid_mod on the client"
            )
        for name, value in record.items():
            if (size := _size(value)) > MAX_VALUE:
                raise EdgeError(
                    f"value {name[:80]!r} of record {key!r} has {size} bytes, at most {MAX_VALUE} "
                    "cross Flower; put it into the store and send its CID"
                )
            total += size + _size(name) + _size(key)
    if total > MAX_MESSAGE:
        raise EdgeError(
            f"the message holds {total} bytes, at most {MAX_MESSAGE} cross Flower; put them into "
            "the store and send their CID"
        )


def _size(value: object) -> int:
    """Bytes of a record's value; numbers count eight."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, Iterable):
        return sum(map(_size, value))
    return 8
