"""Flower array records whose arrays stay in the store until somebody asks for one."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from flwr.app import Array, ArrayRecord

from fedipfs.errors import WeightsError
from fedipfs.exchange.vault import Vault, vault_of
from fedipfs.ipld import CID
from fedipfs.store import Store
from fedipfs.trust import PublicIdentity
from fedipfs.weights import Tensors, TensorSpec, Weights, canonical, code_of, spec_of
from fedipfs.weights.compression import decode, is_payload

if TYPE_CHECKING:
    import torch


class LazyArray(Array):
    """A Flower `Array` that fetches its values on each access and keeps none of them."""

    def __init__(self, spec: TensorSpec, load: Callable[[], np.ndarray]) -> None:
        # Not super().__init__: it wants the serialised bytes, which are made only on demand.
        self.dtype = spec.numpy_dtype.name
        self.shape = spec.shape
        self.stype = "numpy.ndarray"
        self._load = load

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in NumPy's .npy format, as Flower defines `Array.data`."""
        buffer = io.BytesIO()
        np.save(buffer, self._load(), allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> np.ndarray:
        """A fresh, writable array."""
        return self._load()


class StoredArrays(ArrayRecord):
    """An ArrayRecord over what is stored under `cid`; arrays are fetched one at a time.

    `order` links the list of tensor names when it differs from the file's canonical order, so
    that apps which zip arrays with positions get them as they were. Changing the record makes it
    an ordinary one: `cid` is then None. What is only derived from something stored (`weights` is
    no stored file) has no `cid` either, unless it is given: that of what was decoded.

    An update knows the record that it answers, `base`, and the round it was asked in, `asked`.
    """

    def __init__(
        self,
        vault: Vault,
        weights: Tensors,
        names: Sequence[str] | None = None,
        order: CID | None = None,
        sender: PublicIdentity | None = None,
        *,
        cid: CID | None = None,
        base: StoredArrays | None = None,
        asked: int | None = None,
    ) -> None:
        super().__init__()
        for name in weights.names if names is None else names:
            super().__setitem__(name, LazyArray(weights.specs[name], partial(weights.tensor, name)))
        if cid is None and isinstance(weights, Weights):
            cid = weights.cid
        self.__dict__.update(cid=cid, order=order, weights=weights, vault=vault)
        self.__dict__.update(sender=sender, base=base, asked=asked)

    @classmethod
    def open(
        cls,
        where: Store | Vault,
        cid: CID,
        order: CID | None = None,
        sender: PublicIdentity | None = None,
    ) -> StoredArrays:
        """The record stored under `cid`; see Vault.leaves for `sender`.

        Where it is sealed its vault seals what is made of it, too (Vault.sealing_as). Raises what
        reading a block does, EnvelopeError, WeightsError, and, for a compressed model, BadPayload
        or, if it is an update, WrongBase.
        """
        vault = vault_of(where)
        weights, vault = _opened(vault, cid, sender)
        if order is None:
            return cls(vault, weights, sender=sender, cid=cid)
        names = vault.get_record(order)
        if (
            not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
            or sorted(names) != sorted(weights.names)
        ):
            raise WeightsError(f"the order {order} does not name the tensors of {cid}")
        return cls(vault, weights, names, order, sender, cid=cid)

    def over(self, weights: Tensors) -> StoredArrays:
        """The same record with other values, of the same names and shapes."""
        vault, base = self.vault, self.base
        return StoredArrays(vault, weights, list(self), self.order, base=base, asked=self.asked)

    @property
    def cid(self) -> CID | None:
        """The CID of what is stored; None once the record was changed."""
        cid: CID | None = self.__dict__["cid"]
        return cid

    @property
    def order(self) -> CID | None:
        """The CID of the list of tensor names, if they are not in file order."""
        order: CID | None = self.__dict__["order"]
        return order

    @property
    def vault(self) -> Vault:
        """Where it is stored, and how what is like it is sealed."""
        vault: Vault = self.__dict__["vault"]
        return vault

    @property
    def weights(self) -> Tensors:
        """The values; read through it to stream in pieces."""
        weights: Tensors = self.__dict__["weights"]
        return weights

    @property
    def sender(self) -> PublicIdentity | None:
        """Whose it is, where it came with a signature."""
        sender: PublicIdentity | None = self.__dict__["sender"]
        return sender

    @property
    def base(self) -> StoredArrays | None:
        """The record that this one answers; None if it is no update."""
        base: StoredArrays | None = self.__dict__["base"]
        return base

    @property
    def asked(self) -> int | None:
        """The round in which this update was asked for, if that is known."""
        asked: int | None = self.__dict__["asked"]
        return asked

    def is_as_in(self, vault: Vault) -> bool:
        """Whether it can be handed on from `vault` by its CID.

        What the other side made is sealed for this one only, or not at all where it must be.
        """
        if self.cid is None or not isinstance(self.weights, Weights):
            return False
        sealed = {self.vault.seal, vault.seal} != {"none"}
        enough = self.vault in (vault, vault.sealing_all())
        return not sealed or (enough and self.__dict__["sender"] is None)

    def __setitem__(self, key: str, value: Array) -> None:
        self.__dict__["cid"] = None
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.__dict__["cid"] = None
        super().__delitem__(key)

    def copy(self) -> ArrayRecord:  # type: ignore[override]
        """An ordinary record with the same, still lazy, arrays."""
        record = ArrayRecord()
        for name, array in self.items():
            record[name] = array
        return record

    def to_torch_state_dict(self, *, keep_input: bool = True) -> Any:
        return to_torch(self)


@lru_cache(maxsize=4)  # the clients of a worker all open the same model
def _opened(vault: Vault, cid: CID, sender: PublicIdentity | None) -> tuple[Tensors, Vault]:
    weights = vault.weights(cid, sender=sender)
    return decode(weights) if is_payload(weights) else weights, vault.sealing_as(weights)


def store_arrays(
    where: Store | Vault, record: ArrayRecord, model: Mapping[str, TensorSpec] | None = None
) -> StoredArrays:
    """`put_arrays`, and the record that is then in the store."""
    if isinstance(record, StoredArrays) and record.is_as_in(vault_of(where)):
        return record
    return StoredArrays.open(where, *put_arrays(where, record, model))


def put_arrays(
    where: Store | Vault,
    record: ArrayRecord,
    model: Mapping[str, TensorSpec] | None = None,
    *,
    private: bool = False,
) -> tuple[CID, CID | None]:
    """Put `record` into the store; what is there already is neither encoded nor written again.

    Returns the CID of its file, and that of the tensors' order if it is not the file's. What is
    `private` is for this party alone.

    With `model`, whose names and shapes the record must share, arrays take the model's dtypes:
    several of Flower's strategies answer in float64 whatever they were given.
    """
    vault = vault_of(where)
    if isinstance(record, StoredArrays) and record.is_as_in(vault):
        return stored_cid(record), record.order
    specs = specs_of(record)
    if model is not None:
        if {n: s.shape for n, s in specs.items()} != {n: s.shape for n, s in model.items()}:
            raise WeightsError("the aggregated tensors have not the model's names and shapes")
        specs = {name: model[name] for name in specs}
    cid = vault.put_weights(
        specs.values(),
        lambda name: to_dtype(as_numpy(record[name]), specs[name]),
        private=private,
    )
    names = list(specs)
    order = None
    if names != [spec.name for spec in canonical(specs.values())]:
        order = vault.put_record(names, private=private)
    return cid, order


def stored_cid(record: ArrayRecord) -> CID:
    """The CID of a record that is known to be in the store as it is."""
    assert isinstance(record, StoredArrays)
    assert record.cid is not None
    return record.cid


def to_dtype(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """`values` in the dtype of `spec`: floats to booleans by majority, to integers rounded.

    What is beyond an integer's range becomes the end of it, and not some other number.
    """
    if values.dtype.kind == "f" and spec.dtype == "BOOL":
        return values >= 0.5
    if values.dtype.kind == "f" and spec.numpy_dtype.kind in "iu":
        ends = np.iinfo(spec.numpy_dtype)
        with np.errstate(invalid="ignore"):
            found = np.rint(values).astype(spec.numpy_dtype)
        # In float64 the largest 64-bit integers round up, to what is just too large.
        for end, beyond in ((ends.min, np.less_equal), (ends.max, np.greater_equal)):
            found = np.where(beyond(values, np.float64(end)), spec.numpy_dtype.type(end), found)
        return found
    return values.astype(spec.numpy_dtype, copy=False)


def specs_of(record: ArrayRecord) -> dict[str, TensorSpec]:
    """Name, dtype and shape of every array, from its own description: no values are decoded."""
    return {
        name: TensorSpec(name, code_of(_dtype(array.dtype), name), tuple(array.shape))
        for name, array in record.items()
    }


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def as_numpy(array: Array) -> np.ndarray:
    """The values of a Flower array; bfloat16, which .npy files do not name, included."""
    values = array.numpy()
    return values.view(_dtype(array.dtype)) if array.dtype == "bfloat16" else values


def from_numpy(tensors: Mapping[str, np.ndarray]) -> ArrayRecord:
    """An ArrayRecord over `tensors` without a copy (Flower's own constructor makes one)."""
    record = ArrayRecord()
    for name, array in tensors.items():
        record[name] = LazyArray(spec_of(name, array), partial(np.asarray, array))
    return record


def from_torch(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """An ArrayRecord over a state_dict, bfloat16 included; shares memory with CPU tensors."""
    return from_numpy({name: _tensor_to_numpy(tensor) for name, tensor in state.items()})


def to_torch(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """A state_dict of `record`, bfloat16 included."""
    import torch

    state = {}
    for name, array in record.items():
        values = as_numpy(array)
        if array.dtype == "bfloat16":
            state[name] = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(values)
    return state


def _tensor_to_numpy(tensor: torch.Tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_dtype("bfloat16"))
    return tensor.numpy()
