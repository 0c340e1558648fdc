"""Secure aggregation at a client: a message a stage, and what it learnt leaves masked only.

The coordinator is believed nothing that this client can check: see `_Stage`, secagg/client.py and
exchange/stages.py, which says what crosses Flower. What a site demands is in demands.py.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedipfs.clients.demands import Demands
from fedipfs.clients.private import RECORD as PRIVACY
from fedipfs.errors import BadMessage, BadUpdate, BelowFloor, ConfigError, TooLate, WrongSession
from fedipfs.exchange import (
    StoredArrays,
    Vault,
    as_numpy,
    check_examples,
    default_vault,
    flat_size,
    flatten,
)
from fedipfs.exchange import stages as names
from fedipfs.exchange.mod import answering
from fedipfs.privacy.base import SKELLAM
from fedipfs.secagg import (
    Client,
    Delivery,
    Journal,
    Masked,
    Parameters,
    Request,
    Roster,
    Session,
    Share,
    Survivors,
    encode,
)
from fedipfs.secagg.messages import Signed
from fedipfs.secagg.parameters import CLIPPED, UNIFORM
from fedipfs.weights import TensorSpec

if TYPE_CHECKING:
    from fedipfs.privacy.rdp import Event

log = logging.getLogger(__name__)

# What a message may ask for that is trained under masks: no measurements, no layers that stay.
_ASKS = {"run-config", "server-round", "cohort", "proximal-mu", "answer", "run"}
_ASKS |= {names.STAGE, names.SESSION, names.ASKED}
_WEIGHT = "weight"
_MOST_EXAMPLES = 2.0**53


def answer(message: Message, context: Context) -> Message:
    """The answer to a stage at which nothing is trained."""
    stage = _Stage(message, context)
    match stage.name:
        case "advertise":
            said: Signed = stage.begin()
        case "share":
            said = stage.client.share(Roster.from_bytes(stage.asked()))
        case "confirm":
            said = stage.client.confirm(Survivors.from_bytes(stage.asked()))
        case "unmask":
            said = stage.client.unmask(Request.from_bytes(stage.asked()))
        case other:
            raise BadMessage(f"there is no stage {other!r:.80} without training")
    return Message(stage.content(said), reply_to=message)


def masked(
    message: Message,
    context: Context,
    *,
    private: bool,
    train: Callable[[Event | None], RecordDict],
) -> Message:
    """The answer to the stage MASKED: where the masked vector is, and no metrics.

    `train` gives what is answered to a plain message to train; it is told what the noise that
    clients add leaves for the site's ledger to pay, if they do. `private`: to keep records private.
    Asked the same again, after an answer that was lost, the client says the same again: it neither
    trains nor pays once more.
    """
    stage = _Stage(message, context)
    if stage.name != Masked.stage:
        raise BadMessage(f"{stage.name!r:.80} is no stage that trains")
    delivery = Delivery.from_bytes(stage.asked())
    if (said := stage.client.masked(delivery)) is not None:
        return Message(stage.content(said), reply_to=message)
    stage.journal.need(Share.stage)
    base = stage.check_training(message, private)
    trained = train(_price(stage.parameters))
    vector = _encoded(stage.parameters, base, trained)
    put = partial(put_vector, stage.vault, stage.parameters)
    content = stage.content(stage.client.mask(delivery, vector, put))
    if isinstance(spent := trained.get(PRIVACY), ConfigRecord):
        content[PRIVACY] = spent
    return Message(content, reply_to=message)


def _price(parameters: Parameters) -> Event | None:
    """What a part in the sum costs the records, where clients add noise."""
    if parameters.encoding != SKELLAM:
        return None
    from fedipfs.privacy import masked as noised  # it takes SciPy along

    return noised.event(parameters)


def put_vector(vault: Vault, parameters: Parameters, vector: np.ndarray) -> str:
    """Store a masked vector for those who may read what is in `vault`; its CID."""
    return str(vault.put_weights([names.vector_spec(parameters)], lambda name: vector))


class _Stage:
    """What a message asks of this client, after all has been checked that is known at every stage.

    The session must be of the run and the round that the coordinator has signed the message for;
    its parameters what this site permits; and the numbers that are told beside the update no
    others than a client tells. Raises WrongSession, BelowFloor, TooLate, BadMessage.
    """

    def __init__(self, message: Message, context: Context) -> None:
        vault, signed, ask = default_vault("participant"), answering(), message.content["config"]
        if vault.party is None or signed is None:
            raise ConfigError(
                "secure aggregation needs this client's keys: set FEDIPFS_IDENTITY and "
                "FEDIPFS_TRUST"
            )
        assert isinstance(ask, ConfigRecord)
        self.ask, self.vault = ask, vault.only_for(signed.by)  # nobody else is to read it
        session = Session.from_bytes(names.get_message(vault, ask.get(names.SESSION)))
        if not session.round == signed.stamp.round == ask.get("server-round"):
            raise WrongSession(f"a message of round {signed.stamp.round} about {session}")
        self._process = names.process_of(session.run, signed.stamp.run)
        self.parameters = session.parameters
        demands = Demands.of(context.node_config)
        demands.floors.check(names.lasting(self.parameters))
        _check(self.parameters, demands.floors.colluders)
        party = vault.party
        run = sha256(signed.stamp.run.encode()).hexdigest()[:32]
        self._home = demands.journals / party.name / signed.by / run
        if (newest := max(self._processes(), default=0)) > self._process:
            raise TooLate(f"{session} has ended here: its coordinator has begun anew ({newest})")
        durable = not context.node_config.get("simulated")
        self.journal = Journal(self._home / str(self._process), session, durable)
        floors = replace(demands.floors, parameters=None)  # what lasts was compared above
        self.client = Client(
            session, party.name, party.sign, party.verify_own, floors, self.journal
        )

    @property
    def name(self) -> object:
        """The stage."""
        return self.ask.get(names.STAGE)

    def asked(self) -> bytes:
        """What the stage answers to."""
        return names.get_message(self.vault, self.ask.get(names.ASKED))

    def begin(self) -> Signed:
        """ADVERTISE; what an earlier process of the coordinator has begun is over, secrets too."""
        said = self.client.advertise()
        for process, folder in self._processes().items():
            if process < self._process:
                shutil.rmtree(folder)
        if self._process:
            log.warning(
                "%s: its coordinator says that it was interrupted, %d times so far; who was asked "
                "for a round before is asked for it again",
                *(self.client.session, self._process),
            )
        return said

    def check_training(self, message: Message, private: bool) -> StoredArrays:
        """The model that came, if it and what is to be done with it are what all have agreed on."""
        if unknown := sorted(self.ask.keys() - _ASKS):
            raise WrongSession(f"{unknown[0][:80]} is nothing that is asked for under masks")
        base, details = message.content.get("arrays"), dict(self.parameters.details)
        if not isinstance(base, StoredArrays):
            raise BadMessage("no model came with the message to train")
        if str(base.cid) != details[names.MODEL] or names.terms(self.ask) != details[names.TERMS]:
            raise WrongSession(
                f"asked to train {base.cid} on terms that are not those of {self.client.session}: "
                "others are given another model, or another task"
            )
        if details[names.RELATIVE] is (self.ask.get("answer") == "gradient"):
            raise WrongSession("a gradient is no change of the model, and a model is no gradient")
        values = self.parameters.values
        if self.parameters.encoding == SKELLAM:
            from fedipfs.privacy import masked as noised  # it takes SciPy along

            values = noised.agreed(self.parameters)[0].dimension
        if flat_size(base) != values:
            raise WrongSession(f"{values} values are to be masked of a model of {flat_size(base)}")
        if private and names.LOSS in self.parameters.numbers:
            raise BelowFloor("the loss on this client's records is kept private, in sums, too")
        return base

    def content(self, said: Signed) -> RecordDict:
        """What is answered."""
        cid = names.put_message(self.vault, said.to_bytes())
        return RecordDict({names.RECORD: ConfigRecord({names.ANSWER: str(cid)})})

    def _processes(self) -> dict[int, Path]:
        """Those of the coordinator that this client has journals of, and the folders of these."""
        return {int(folder.name): folder for folder in self._home.glob("[0-9]*")}


def _check(parameters: Parameters, pooling: int) -> None:
    """Raises BelowFloor for numbers that a client does not tell, WrongSession for odd details."""
    details, told = dict(parameters.details), set(parameters.numbers)
    known, needed = {_WEIGHT, *CLIPPED, names.STEPS, names.LOSS}, {_WEIGHT, *CLIPPED}
    if parameters.encoding == SKELLAM:
        from fedipfs.privacy import masked as noised  # it takes SciPy along

        noised.agreed(parameters, pooling)
        known, needed = set(), set()
    elif parameters.encoding != UNIFORM:
        raise BelowFloor(f"encoding={parameters.encoding!r:.80} is not known here")
    elif not _is_number(details.get(names.EXAMPLES), 0.0, _MOST_EXAMPLES):
        raise WrongSession(f"{names.EXAMPLES}={details.get(names.EXAMPLES)!r:.80}")
    if unknown := sorted(told - known):
        raise BelowFloor(f"{unknown[0]!r:.80} is nothing that this client tells")
    if missing := sorted(needed - told):
        raise WrongSession(f"{missing[0]!r:.80} is missing among what clients tell")
    kinds = {names.RELATIVE: bool, names.MODEL: str, names.TERMS: bytes}
    for name, kind in kinds.items():
        if type(details.get(name)) is not kind:
            raise WrongSession(f"{name} is missing in the session's details")


def _encoded(parameters: Parameters, base: StoredArrays, trained: Mapping[str, Any]) -> np.ndarray:
    """The vector to mask: of the change, or the gradient, and with it the numbers."""
    arrays, metrics = trained["arrays"], trained["metrics"]
    assert isinstance(arrays, ArrayRecord) and isinstance(metrics, MetricRecord)
    details: dict[str, Any] = dict(parameters.details)

    def change(name: str, spec: TensorSpec) -> np.ndarray:
        values = as_numpy(arrays[name])
        if not details[names.RELATIVE]:
            return values
        known = base.weights.tensor(name)
        if spec.numpy_dtype.itemsize < 4:
            return values.astype(np.float32) - known.astype(np.float32)
        return np.subtract(values, known)

    values = flatten(base, change)
    if parameters.encoding == SKELLAM:
        from fedipfs.privacy import masked as noised  # it takes SciPy along

        return noised.encode(parameters, values)
    examples = check_examples(metrics.get("num-examples"))
    most = float(details[names.EXAMPLES])
    weight = min(1.0, examples / most) if most else 1.0
    numbers = {_WEIGHT: weight}
    if names.STEPS in parameters.numbers:
        numbers[names.STEPS] = _finite(metrics, names.STEPS)
    if names.LOSS in parameters.numbers:
        numbers[names.LOSS] = weight * _finite(metrics, names.LOSS)
    return encode(parameters, values, numbers, weight).vector


def _finite(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    if not _is_number(value, -math.inf, math.inf):
        what = "missing" if value is None else f"{value!r:.80}, not finite"
        raise BadUpdate(f"its {name} is {what}, and a sum needs a number")
    return float(value)


def _is_number(value: Any, least: float, below: float) -> TypeGuard[float]:
    """Whether it is a number, not a truth, and finite."""
    return type(value) in (int, float) and math.isfinite(value) and least <= value < below
