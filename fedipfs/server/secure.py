"""Secure aggregation at the coordinator: five stages of messages, and one sum at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedipfs.errors import (
    BadUpdate,
    ConfigError,
    Diverged,
    FormatError,
    RunFailed,
    SecAggFailed,
    SecAggRefused,
    SignatureRefused,
    StoreError,
    one_line,
)
from fedipfs.exchange import (
    CidGrid,
    StoredArrays,
    Vault,
    flat_size,
    moved_by,
    store_arrays,
    stored_cid,
)
from fedipfs.exchange import stages as names
from fedipfs.flower_compat import CLIENT_APP_RAISED_EXCEPTION, error_instead
from fedipfs.ipld import CID
from fedipfs.privacy.base import SKELLAM
from fedipfs.secagg import (
    Advertise,
    Confirm,
    Masked,
    Parameters,
    Record,
    Server,
    Session,
    Share,
    Unmask,
    decode,
)
from fedipfs.secagg.messages import Signed
from fedipfs.server.cohort import Answers, ask
from fedipfs.trust import PublicIdentity, Statement
from fedipfs.weights import TensorSpec

_REFUSED = (BadUpdate, FormatError, SecAggRefused, SignatureRefused, StoreError)
_SLACK = 1 << 12  # bytes of a masked vector's file beside its values
_NOT_FINITE = "not finite"  # in the reason of a client whose training diverged


def secure_metrics(private: bool) -> tuple[str, ...]:
    """What clients tell beside their update, in sums: their loss only without privacy."""
    return (names.STEPS,) if private else (names.STEPS, names.LOSS)


@dataclass
class Sum:
    """What a round of secure aggregation gives."""

    arrays: StoredArrays  # the model moved by the mean, or the mean itself
    metrics: dict[str, float]  # the sum of weights and of steps, the weighted mean of the loss
    vectors: dict[int, CID]  # survivor -> its masked vector
    note: dict[str, Any]  # for the round's record


@dataclass
class Secure:
    """Runs the protocol over `edge`, a round at a time.

    `run` names the run in what everybody signs; it differs for every process that coordinates, as
    a round that was interrupted is begun anew with other keys. `options` are the section `secagg`
    of the configuration, complete; `metrics` names what clients tell beside their update, in sums.
    `relative`: updates are changes of the model. `name_of` gives a node's organization. Fewer
    survivors than `least` are not unmasked. `noise` gives the parameters of a cohort that adds
    noise of its own, by its size and the model's.
    """

    edge: CidGrid
    vault: Vault
    run: str
    options: Mapping[str, Any]
    metrics: tuple[str, ...]
    relative: bool
    name_of: Callable[[int], str]
    now: Callable[[], float]
    deadline_s: float | None = None
    noise: Callable[[int, int], Parameters] | None = None
    least: int = 1
    sum: Sum | None = field(default=None, init=False)

    def parameters(self, clients: int, values: int) -> Parameters:
        """What a cohort of `clients` agrees on. Raises ConfigError for what is not safe."""
        if self.noise is not None:
            return self.noise(clients, values)
        return lasting_parameters(
            self.options, clients, values, metrics=self.metrics, relative=self.relative
        )

    def train(self, number: int, model: StoredArrays, messages: Iterable[Message]) -> Answers:
        """The answers of round `number` to `messages`, which ask a cohort to train `model`.

        Survivors answer with where their masked vectors are; all others with an error. What they
        sum up to is then `sum`. Raises RunFailed if too few are left.
        """
        self.sum = None
        return _Round(self, number, model, list(messages)).play()


def lasting_parameters(
    options: Mapping[str, Any],
    clients: int,
    values: int,
    *,
    metrics: tuple[str, ...],
    relative: bool,
) -> Parameters:
    """What is the same in every round with so many clients; `options` as in Secure."""
    chosen = ("threshold", "colluders", "dropouts", "clip", "bits")
    return Parameters.choose(
        clients,
        values,
        numbers=("weight", *metrics),
        details={names.EXAMPLES: float(options["examples"]), names.RELATIVE: relative},
        **{key: options[key] for key in chosen},
    )


class _Round:
    """One session: what it is asked, stored and signed with.

    What it says to clients names the cohort, and so is sealed wherever updates are; nobody but
    the coordinator needs what it learns in the end.
    """

    def __init__(
        self, secure: Secure, number: int, model: StoredArrays, messages: list[Message]
    ) -> None:
        self._secure, self._number, self._model = secure, number, model
        self._vault, self._shared = secure.vault, secure.vault.sealing_all()
        self._nodes = {secure.name_of(each.metadata.dst_node_id): each for each in messages}
        if len(self._nodes) != len(messages):
            raise RunFailed(
                f"round {number}: secure aggregation: two nodes are of one organization, and in a "
                "sum each signs once"
            )
        self._members: dict[str, PublicIdentity] = {}
        self._failed: dict[int, Message] = {}
        self._arrays, self._ask = _common(secure.vault, number, messages)
        try:
            lasting = secure.parameters(len(self._nodes), flat_size(model))
        except ConfigError as error:  # fewer are left to be asked than the settings allow for
            raise RunFailed(f"round {number}: secure aggregation: {error}") from error
        parameters = names.bound(lasting, stored_cid(self._arrays), self._ask)
        self._session = Session(secure.run, number, tuple(sorted(self._nodes)), parameters)
        self._server = Server(self._session, self._verify)
        self._session_cid = self._put(self._session.to_bytes())

    def play(self) -> Answers:
        server, secure = self._server, self._secure
        try:
            self._collect(Advertise, dict.fromkeys(self._nodes))
            roster = server.close_advertise()
            self._collect(Share, self._same(roster.to_bytes(), server.missing()))
            deliveries = server.close_share()
            told = {
                name: names.put_message(self._shared_with(name), each.to_bytes())
                for name, each in deliveries.items()
            }
            replies = self._collect(Masked, told)
            survivors = server.close_masked()
            if len(survivors.clients) < secure.least:
                raise SecAggFailed(
                    f"{len(survivors.clients)} clients sent vectors, clients.min_successes is "
                    f"{secure.least}"
                )
            self._collect(Confirm, self._same(survivors.to_bytes(), server.missing()))
            request = server.close_confirm()
            self._collect(Unmask, self._same(request.to_bytes(), server.missing()))
            result = server.result()
        except SecAggFailed as error:
            raise self._failure(error) from error
        vectors = {self._node(each.by): CID.parse(each.vector) for each in survivors.clients}
        try:
            secure.sum = self._opened(result.total, result.record, vectors)
        except BadUpdate as error:
            raise RunFailed(f"round {self._number}: secure aggregation: {error}") from error
        answered = [each for each in replies if each.metadata.src_node_id in vectors]
        lost = [each for node, each in self._failed.items() if node not in vectors]
        return Answers(sorted(answered + lost, key=lambda each: each.metadata.src_node_id), [])

    def _failure(self, error: SecAggFailed) -> RunFailed:
        reasons = self._reasons(sorted(self._failed))
        told = "; ".join(f"{name}: {reason}" for name, reason in [*reasons.items()][:3])
        told += f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        infinite = sum(_NOT_FINITE in reason for reason in reasons.values())
        return (Diverged if 2 * infinite > len(reasons) else RunFailed)(
            f"round {self._number}: secure aggregation: {error}; nothing was unmasked"
            f"{f' ({told})' if told else ''}"
        )

    def _reasons(self, nodes: Iterable[int]) -> dict[str, str]:
        """By name, why these failed first."""
        return {
            self._secure.name_of(node): one_line(
                self._failed[node].error.reason or "error without a reason"
            )
            for node in nodes
        }

    def _opened(self, total: np.ndarray, record: Record, vectors: dict[int, CID]) -> Sum:
        secure, parameters = self._secure, self._session.parameters
        spec = TensorSpec("sum", "U32", total.shape)
        cid = self._vault.put_weights([spec], lambda name: total, private=True)
        named = dataclasses.replace(record, total=str(cid))
        note: dict[str, Any] = {
            "protocol": parameters.describe(),
            "record": names.put_message(self._vault, named.to_bytes(), private=True),
            "sum": cid,
            "survivors": len(vectors),
        }
        if absent := self._reasons(sorted(self._failed.keys() & vectors)):
            note["absent"] = absent  # they are in the sum, and did not help to unmask it
        if parameters.encoding == SKELLAM:
            from fedipfs.privacy import masked as noised  # it takes SciPy along

            mean = noised.decode(parameters, total) / len(vectors)
            return Sum(moved_by(self._model, mean), {"weight": 1.0}, vectors, note)
        found = decode(parameters, total, len(vectors), per="weight")
        numbers = found.numbers
        metrics = {name: numbers[name] for name in ("weight", names.STEPS) if name in numbers}
        if names.LOSS in numbers:
            metrics[names.LOSS] = numbers[names.LOSS] / numbers["weight"]
        note["clipped"] = found.clipped
        if found.suggestion is not None:
            note["suggested_clip"] = found.suggestion
        arrays = moved_by(self._model, found.values, relative=secure.relative)
        return Sum(arrays, metrics, vectors, note)

    def _collect(self, kind: type[Signed], told: Mapping[str, CID | None]) -> list[Message]:
        """Ask those in `told` for their answers at a stage, and take those that are good."""
        messages = [self._message(kind, name, cid) for name, cid in told.items()]
        secure = self._secure
        came = ask(secure.edge, messages, now=secure.now, deadline_s=secure.deadline_s).replies
        good = []
        for reply in came:
            try:
                if not reply.has_error():
                    self._take(kind, reply)
                    good.append(reply)
                    continue
            except _REFUSED as error:
                reason = one_line(f"{type(error).__name__}: {error}")
                reply = error_instead(reply, Error(CLIENT_APP_RAISED_EXCEPTION, reason))
            self._failed.setdefault(reply.metadata.src_node_id, reply)
        return good

    def _take(self, kind: type[Signed], reply: Message) -> None:
        record = reply.content.get(names.RECORD)
        if not isinstance(record, ConfigRecord):
            raise BadUpdate("its answer names no message of secure aggregation")
        said = kind.from_bytes(names.get_message(self._vault, record.get(names.ANSWER)))
        expected = self._secure.name_of(reply.metadata.src_node_id)
        if said.by != expected:
            raise BadUpdate(f"{expected} hands in what {said.by!r:.80} has said")
        self._server.take(said, self._vector(said) if isinstance(said, Masked) else None)

    def _vector(self, said: Masked) -> np.ndarray:
        """The vector that a client names, if it has the size and is sealed as it must be."""
        cid, spec = CID.parse(said.vector), names.vector_spec(self._session.parameters)
        sender = self._members.get(said.by)  # whose keys these are, it has shown at ADVERTISE
        file = self._vault.weights(cid, max_bytes=spec.nbytes + _SLACK, sender=sender)
        if list(file.specs.values()) != [spec]:
            raise BadUpdate(f"{cid} is not a masked vector of {spec.elements} coordinates")
        self._vault.store.fetch(cid)
        return file.tensor(spec.name)

    def _verify(self, by: str, statement: Statement, signature: bytes) -> None:
        party = self._vault.party
        assert party is not None
        self._members[by] = party.verify(by, statement, signature).identity

    def _message(self, kind: type[Signed], name: str, told: CID | None) -> Message:
        stage: dict[str, Any] = {names.STAGE: kind.stage, names.SESSION: str(self._session_cid)}
        if told is not None:
            stage[names.ASKED] = str(told)
        if kind is Masked:
            what, ask_for = names.TRAIN, self._ask
            content = RecordDict({"arrays": self._arrays})
        else:
            what, content = names.QUERY, RecordDict()
            # Of which run: a site may not be for it, and says so before others count on it.
            ask_for = {"server-round": self._number}
            if "run-config" in self._ask:
                ask_for["run-config"] = self._ask["run-config"]
        content["config"] = ConfigRecord({**ask_for, **stage})
        # The group tells the stages apart in what is signed.
        return self._secure.edge.create_message(content, what, self._node(name), kind.stage)

    def _node(self, name: str) -> int:
        return int(self._nodes[name].metadata.dst_node_id)

    def _same(self, block: bytes, clients: Iterable[str]) -> dict[str, CID | None]:
        return dict.fromkeys(clients, self._put(block))

    def _put(self, block: bytes) -> CID:
        return names.put_message(self._shared, block)

    def _shared_with(self, name: str) -> Vault:
        return self._vault.only_for(name).sealing_all()


def _common(
    vault: Vault, number: int, messages: list[Message]
) -> tuple[StoredArrays, dict[str, Any]]:
    """The model and the record "config" that are the same in all messages to train.

    Raises RunFailed where they are not: one client's update would stand out in the sum.
    """
    arrays: dict[CID, StoredArrays] = {}
    asks: dict[bytes, dict[str, Any]] = {}
    for message in messages:
        records = message.content
        for model in [each for each in records.values() if isinstance(each, ArrayRecord)]:
            stored = store_arrays(vault, model)
            arrays[stored_cid(stored)] = stored
        for config in records.config_records.values():
            asks[names.terms(config)] = dict(config)
    if len(arrays) != 1 or len(asks) != 1:
        raise RunFailed(
            f"round {number}: secure aggregation: the strategy gives clients {len(arrays)} models "
            f"and {len(asks)} tasks, and under masks all have the same"
        )
    return arrays.popitem()[1], asks.popitem()[1]
