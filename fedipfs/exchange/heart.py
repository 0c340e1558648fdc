"""Arrays in, stored, CID out; and back. Grid and client mod are thin skins over this.

What crosses Flower instead of an `ArrayRecord` is one `ConfigRecord` under the key "fedipfs",
with two short strings an array record: `cid:<key>` and, if the tensors were not in canonical
order, `order:<key>` (the CID of the list of names, the same block in every round); in what is sent
to be trained also `compress:<key>`, if the answer is to be compressed (see compressing.py). Between
parties that have keys it also carries the signature (see signing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedipfs.errors import EdgeError
from fedipfs.exchange import signing
from fedipfs.exchange.arrays import StoredArrays, put_arrays
from fedipfs.exchange.compressing import COMPRESS
from fedipfs.exchange.signing import KEY, Stamp
from fedipfs.exchange.vault import Vault, vault_of
from fedipfs.ipld import CID
from fedipfs.store import Store
from fedipfs.trust import PublicIdentity
from fedipfs.weights.compression import Spec

MAX_VALUE = 1024  # bytes: what is larger belongs in the store
MAX_MESSAGE = 16 * 1024  # bytes of keys and values together

_STAMPED = (*Stamp._fields, signing.ATTEMPT, "signature", "by")

Opener = Callable[[str, CID, CID | None, PublicIdentity | None], StoredArrays]
Put = Callable[[Vault, str, ArrayRecord], tuple[CID, CID | None]]


def _put(vault: Vault, key: str, record: ArrayRecord) -> tuple[CID, CID | None]:
    return put_arrays(vault, record)


class Exchange:
    """Swaps array records and references over one store, or the vault over it."""

    def __init__(self, where: Store | Vault) -> None:
        self.vault = vault_of(where)

    def swap_out(
        self,
        content: RecordDict,
        stamp: Stamp | None = None,
        *,
        reader: str | None = None,
        put: Put = _put,
        compression: Mapping[str, Spec] | None = None,
        attempt: int | None = None,
    ) -> RecordDict:
        """A fresh RecordDict in which references stand for the array records of `content`.

        What they refer to has been published when this returns. A vault with a party signs, for
        the run and round of `stamp`. What is sealed is for all of the other side, or for the
        organization `reader` alone. `put(vault, key, record)` stores an array record and gives
        the CIDs of it and of its order. `compression` says by key in which form array records of
        the answer are asked for. `attempt` is what attempt_of reads. Raises EdgeError if anything
        else is larger than 1 KiB.
        """
        vault = self.vault if reader is None else self.vault.only_for(reader)
        references: dict[str, str] = {}
        slim = RecordDict()
        for key, record in content.items():
            if isinstance(record, ArrayRecord):
                cid, order = put(vault, key, record)
                references[f"cid:{key}"] = str(cid)
                if compression and key in compression:
                    references[f"{COMPRESS}:{key}"] = str(compression[key])
                if order is not None:
                    references[f"order:{key}"] = str(order)
            elif key == KEY:
                raise EdgeError(f"the record key {KEY!r} is reserved for references; rename yours")
            else:
                slim[key] = record
        if references:
            slim[KEY] = ConfigRecord({**references})
        if attempt is not None:
            signing.own_record(slim)[signing.ATTEMPT] = attempt
        if self.vault.party is not None:
            if stamp is None:
                raise EdgeError("a message that is to be signed needs its run and round")
            signing.sign(self.vault, slim, stamp)
        check_small(slim)
        self.vault.store.publish()
        return slim

    def swap_in(
        self,
        content: RecordDict,
        open_arrays: Opener | None = None,
        *,
        expected: Stamp | None = None,
        name: str | None = None,
    ) -> RecordDict:
        """Inverse of `swap_out`: array records that fetch their arrays when asked.

        Headers are read here, and what pays to be fetched at once is. `open_arrays(key, cid,
        order, sender)` makes a record of a reference; by default StoredArrays.open. A vault with
        a party checks the signature first: that it is the other side's, made by the organization
        `name` for what `expected` says, if they are given.

        Raises EdgeError for content that carries arrays or large values itself, SignatureRefused,
        CidError, EnvelopeError, StoreError or WeightsError for bad references.
        """
        open_arrays = open_arrays or self._open
        check_small(content)
        sender = None
        if self.vault.party is not None:
            sender = signing.check(self.vault, content, expected, name).identity
        full = RecordDict()
        for key, record in content.items():
            if key != KEY:
                full[key] = record
        references = content.get(KEY, ConfigRecord())
        for field, text in references.items():
            kind, _, key = field.partition(":")
            if kind == "cid":
                order = references.get(f"order:{key}")
                cid, names = _cid(text), None if order is None else _cid(order)
                full[key] = open_arrays(key, cid, names, sender)
            elif field in _STAMPED:
                continue
            elif kind not in ("order", COMPRESS) or f"cid:{key}" not in references:
                raise EdgeError(f"unknown reference {field[:80]!r}; the peer runs another version")
        return full

    def _open(
        self, key: str, cid: CID, order: CID | None, sender: PublicIdentity | None
    ) -> StoredArrays:
        arrays = StoredArrays.open(self.vault, cid, order, sender)
        self.vault.fetch(cid)
        return arrays


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
