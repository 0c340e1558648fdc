"""A CID in, a ready torch module out: of a model, or of an ensemble."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from fedipfs.errors import BadUpdate, ConfigError, FedIPFSError, WeightsError, one_line
from fedipfs.exchange.arrays import from_numpy, to_torch
from fedipfs.exchange.default import default_vault
from fedipfs.exchange.ensemble import MAX_BYTES, recipe_in, tensors_of
from fedipfs.exchange.inspect import check_structure
from fedipfs.exchange.vault import Vault, vault_of
from fedipfs.ipld import CID
from fedipfs.store import Store, open_store
from fedipfs.weights import Tensors, TensorSpec, code_of

if TYPE_CHECKING:
    import torch

    from fedipfs.tasks import Task
    from fedipfs.trust import PublicIdentity


def load_model(
    cid: CID | str,
    where: Store | Vault | str | os.PathLike[str] | None = None,
    *,
    task: Task | str | None = None,
    options: Mapping[str, Any] | None = None,
    allowed: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
    sender: PublicIdentity | None = None,
) -> torch.nn.Module:
    """The model or ensemble stored under `cid` as a torch module, on the CPU, ready to evaluate.

        model = fedipfs.load_model("bafy...", "runs/store", task="fedipfs.tasks.small:Digits")
        logits = model(inputs)

    `where` is a store, a vault with the keys that open what is sealed, or a store's address; None
    is what use_store or the environment name. A plain model needs its `task` (a Task, or a target
    with `options`). An ensemble names its task itself; `task` takes that one's place. A target
    outside fedipfs.tasks is refused unless `allowed` names its module or file (see
    fedipfs.tasks.load). An ensemble answers log-probabilities, see fedipfs.tasks.ensemble.

    `max_bytes` bounds the files together. Where the model can be made on torch's meta device, no
    tensor is read, and no parameter takes memory, before all have the shapes that the task gives
    them. An ensemble's options are its record's, a stranger's perhaps, and go to the class that
    makes its members, the caller's `task` included: that must bear any JSON. Where members cannot
    be made there, an ensemble that names its task itself is refused unless its options are those
    in `options`; for the caller's `task` they take what memory they take.

    `sender` is who names the model, where that is not the caller: what is sealed must then be
    sealed by it, and where models are sealed here, nothing else is taken. So nobody has a file
    opened that others, or the caller, had sealed for themselves.

    Raises ConfigError for a task that is missing or refused, WeightsError for what is no model, is
    too large or does not fit the task, CidError, EnvelopeError for what is sealed to others,
    SignatureWrong for what another than `sender` sealed, and StoreError.
    """
    from fedipfs import tasks

    cid = CID.parse(cid) if isinstance(cid, str) else cid
    tensors = tensors_of(_vault(where), cid, max_bytes=max_bytes, sender=sender)
    recipe = recipe_in(tensors)
    permitted = (*tasks.ALLOWED, *allowed)

    def made(named: str | None, given: Mapping[str, Any]) -> Task:
        if isinstance(task, tasks.Task):
            return task if recipe is None else type(task)(**given)
        target = task or named
        if target is None:
            raise ConfigError(f"{cid} is a plain model: say which with task=")
        return tasks.load(target, given, allowed=permitted)

    named = () if recipe is None or task is not None else recipe.options
    vouched = all(dict(each) == dict(options or {}) for each in named)

    def module() -> torch.nn.Module:
        from fedipfs.tasks.ensemble import Ensemble

        if recipe is None:
            return made(None, options or {}).model()
        members = [made(recipe.task, given).model() for given in recipe.options]
        return Ensemble(members, recipe.weights, recipe.voting)

    return _filled(module, tensors, cid, vouched)


def _filled(
    build: Callable[[], torch.nn.Module], tensors: Tensors, cid: CID, vouched: bool
) -> torch.nn.Module:
    """A module of `build` with the values of `tensors`, if these have its structure.

    Where a try without memory fails, WeightsError unless the caller has `vouched` for its options.
    """
    import torch

    try:
        with torch.device("meta"):  # without memory: options may ask for more than there is
            shape = build()
    except FedIPFSError:
        raise
    except Exception as error:
        if not vouched:
            raise WeightsError(
                one_line(
                    f"{cid}: its model cannot be made on torch's meta device ({error}), and its "
                    "options are not those in options=; give its task= if you trust it"
                )
            ) from error
        shape = None  # a task that needs values while it makes its model
    if shape is not None:
        _check(shape, tensors, cid)
    try:
        module = build()
    except FedIPFSError:
        raise
    except Exception as error:  # the options are the record's, and the model any code's
        raise WeightsError(one_line(f"{cid}: its model cannot be made ({error})")) from error
    _check(module, tensors, cid)
    module.load_state_dict(to_torch(from_numpy(tensors.tensors())))
    return module.eval()


def _check(module: torch.nn.Module, tensors: Tensors, cid: CID) -> None:
    specs = {}
    for name, each in module.state_dict().items():
        dtype = str(each.dtype).removeprefix("torch.")
        code = code_of(np.dtype(getattr(ml_dtypes, dtype, dtype)), name)
        specs[name] = TensorSpec(name, code, tuple(each.shape))
    try:
        check_structure(tensors, specs)
    except BadUpdate as error:
        raise WeightsError(one_line(f"{cid} does not fit its task: {error}")) from None


def _vault(where: Store | Vault | str | os.PathLike[str] | None) -> Vault:
    if where is None:
        return default_vault("participant")
    if isinstance(where, str | os.PathLike):
        where = open_store(os.fspath(where))
    return vault_of(where)
