"""Secure aggregation at the coordinator: five stages of messages, and one sum at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedipfs.errors import (
    BadUpdate,
    FormatError,
    RunFailed,
    SecAggFailed,
    SecAggRefused,
    SignatureRefused,
    StoreError,
    one_line,
)
from fedipfs.exchange import CidGrid, StoredArrays, Vault, flat_size, moved_by
from fedipfs.flower_compat import CLIENT_APP_RAISED_EXCEPTION, error_instead
from fedipfs.ipld import CID
from fedipfs.privacy import masked as noised
from fedipfs.secagg import Advertise, Confirm, Masked, Parameters, Server, Session, Share, Unmask
from fedipfs.secagg.messages import Signed
from fedipfs.secagg.quantize import decode
from fedipfs.server.cohort import Answers, ask
from fedipfs.weights import TensorSpec

# As in clients/secure.py, which this side does not import.
RECORD, STAGE, SESSION, ASKED, ANSWER = "secagg", "stage", "session", "asked", "answer"
VECTOR = "masked"
_QUERY, _TRAIN = "query.secagg", "train.secagg"
_REFUSED = (BadUpdate, FormatError, SecAggRefused, SignatureRefused, StoreError)
_SLACK = 1 << 12  # bytes of a masked vector's file beside its values


def secure_metrics(private: bool) -> tuple[str, ...]:
    """What clients tell beside their update, in sums: their loss only without privacy."""
    return ("steps",) if private else ("steps", "train_loss")


@dataclass
class Sum:
    """What a round of secure aggregation gives."""

    arrays: StoredArrays  # the model moved by the mean, or the mean itself
    metrics: dict[str, float]  # weighted means over the survivors
    vectors: dict[int, CID]  # survivor -> its masked vector
    note: dict[str, Any]  # for the round's record


@dataclass
class Secure:
    """Runs the protocol over `edge`, a round at a time.

    `run` names the run in what everybody signs; it differs for every process that coordinates, as
    a round that was interrupted is begun anew with other keys. `options` are the section `secagg`
    of the configuration, complete; `metrics` names what clients tell beside their update, in sums.
    `relative`: updates are changes of the model. `name_of` gives a node's organization. `noise`
    gives the parameters of a cohort that adds noise of its own, by its size and the model's.
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
    sum: Sum | None = field(default=None, init=False)

    def parameters(self, clients: int, values: int) -> Parameters:
        """What a cohort of `clients` agrees on. Raises ConfigError for what is not safe."""
        chosen = ("threshold", "colluders", "dropouts", "clip", "bits")
        if self.noise is not None:
            return self.noise(clients, values)
        return Parameters.choose(
            clients,
            values,
            numbers=("weight", *self.metrics),
            details={"examples": float(self.options["examples"]), "relative": self.relative},
            **{key: self.options[key] for key in chosen},
        )

    def train(
        self, number: int, model: StoredArrays, messages: Iterable[Message], run_config: CID
    ) -> Answers:
        """The answers of round `number` to `messages`, which ask a cohort to train `model`.

        Survivors answer with where their masked vectors are; all others with an error. What they
        sum up to is then `sum`. Raises RunFailed if too few are left.
        """
        self.sum = None
        return _Round(self, number, model, list(messages), run_config).play()


class _Round:
    def __init__(
        self,
        secure: Secure,
        number: int,
        model: StoredArrays,
        messages: list[Message],
        run_config: CID,
    ) -> None:
        self._secure, self._number, self._model = secure, number, model
        self._training = {each.metadata.dst_node_id: each for each in messages}
        self._nodes = {secure.name_of(node): node for node in self._training}
        self._config: dict[str, Any] = {"run-config": str(run_config), "server-round": number}
        self._failed: dict[int, Message] = {}
        self._party = secure.vault.party
        assert self._party is not None
        parameters = secure.parameters(len(self._nodes), flat_size(model))
        self._session = Session(secure.run, number, tuple(sorted(self._nodes)), parameters)
        self._server = Server(self._session, self._party.verify)
        self._session_cid = self._put(self._session.to_bytes())

    def play(self) -> Answers:
        server = self._server
        try:
            self._collect(Advertise, dict.fromkeys(self._nodes))
            roster = server.close_advertise()
            self._collect(Share, self._same(roster.to_bytes(), server.missing()))
            deliveries = server.close_share()
            told = {name: self._put(each.to_bytes()) for name, each in deliveries.items()}
            replies = self._collect(Masked, told, train=True)
            survivors = server.close_masked()
            self._collect(Confirm, self._same(survivors.to_bytes(), server.missing()))
            request = server.close_confirm()
            self._collect(Unmask, self._same(request.to_bytes(), server.missing()))
            result = server.result()
        except (SecAggFailed, BadUpdate) as error:
            why = "; ".join(
                f"{self._secure.name_of(node)}: {reply.error.reason}"
                for node, reply in sorted(self._failed.items())[:3]
            )
            raise RunFailed(
                f"round {self._number}: secure aggregation: {error}; nothing was unmasked"
                f"{f' ({why})' if why else ''}"
            ) from error
        vectors = {self._nodes[each.by]: CID.parse(each.vector) for each in survivors.clients}
        self._secure.sum = self._opened(result.total, result.record, vectors)
        answered = [each for each in replies if each.metadata.src_node_id in vectors]
        lost = [each for node, each in self._failed.items() if node not in vectors]
        return Answers(sorted(answered + lost, key=lambda each: each.metadata.src_node_id), [])

    def _opened(self, total: np.ndarray, record: Any, vectors: dict[int, CID]) -> Sum:
        secure, parameters = self._secure, self._session.parameters
        spec = TensorSpec("sum", "U32", total.shape)
        cid = secure.vault.put_weights([spec], lambda name: total)
        kept = self._put(dataclasses.replace(record, total=str(cid)).to_bytes())
        note: dict[str, Any] = {
            "protocol": parameters.describe(),
            "record": kept,
            "sum": cid,
            "survivors": len(vectors),
        }
        if parameters.encoding == noised.ENCODING:
            mean = noised.decode(parameters, total) / len(vectors)
            return Sum(moved_by(self._model, mean), {"weight": 1.0}, vectors, note)
        found = decode(parameters, total, len(vectors), per="weight")
        weight = found.numbers["weight"]
        means = {name: found.numbers[name] / weight for name in secure.metrics}
        note["clipped"] = found.clipped
        if found.suggestion is not None:
            note["suggested_clip"] = found.suggestion
        arrays = moved_by(self._model, found.values, relative=secure.relative)
        return Sum(arrays, {"weight": weight, **means}, vectors, note)

    def _collect(
        self, kind: type[Signed], told: Mapping[str, CID | None], *, train: bool = False
    ) -> list[Message]:
        """Ask those in `told` for their answers at a stage, and take those that are good."""
        messages = [self._message(kind, name, cid, train) for name, cid in told.items()]
        secure = self._secure
        came = ask(secure.edge, messages, now=secure.now, deadline_s=secure.deadline_s).replies
        good = []
        for reply in came:
            node = reply.metadata.src_node_id
            try:
                if not reply.has_error():
                    self._take(kind, reply)
                    good.append(reply)
                    continue
            except _REFUSED as error:
                reason = one_line(f"{type(error).__name__}: {error}")
                reply = error_instead(reply, Error(CLIENT_APP_RAISED_EXCEPTION, reason))
            self._failed.setdefault(node, reply)
        return good

    def _take(self, kind: type[Signed], reply: Message) -> None:
        record = reply.content.get(RECORD)
        if not isinstance(record, ConfigRecord) or not isinstance(record.get(ANSWER), str):
            raise BadUpdate("its answer names no message of secure aggregation")
        said = kind.from_bytes(self._get(CID.parse(str(record[ANSWER]))))
        expected = self._secure.name_of(reply.metadata.src_node_id)
        if said.by != expected:
            raise BadUpdate(f"{expected} hands in what {said.by!r:.80} has said")
        if isinstance(said, Masked):
            self._server.take(said, self._vector(CID.parse(said.vector)))
        else:
            self._server.take(said)

    def _vector(self, cid: CID) -> np.ndarray:
        wanted = self._session.parameters.dimension
        file = self._secure.vault.weights(cid, max_bytes=4 * wanted + _SLACK)
        if list(file.specs.values()) != [TensorSpec(VECTOR, "U32", (wanted,))]:
            raise BadUpdate(f"{cid} is not a masked vector of {wanted} coordinates")
        return file.tensor(VECTOR)

    def _message(self, kind: type[Signed], name: str, told: CID | None, train: bool) -> Message:
        node = self._nodes[name]
        terms: dict[str, Any] = {STAGE: kind.stage, SESSION: str(self._session_cid)}
        if told is not None:
            terms[ASKED] = str(told)
        if train:
            content = self._training[node].content.copy()
            (own,) = content.config_records.values()
            content["config"] = ConfigRecord({**own, **terms})
        else:
            content = RecordDict({"config": ConfigRecord({**self._config, **terms})})
        what = _TRAIN if train else _QUERY
        return self._secure.edge.create_message(content, what, node, "")

    def _same(self, block: bytes, names: Iterable[str]) -> dict[str, CID | None]:
        return dict.fromkeys(names, self._put(block))

    def _put(self, block: bytes) -> CID:
        return self._secure.vault.put_record({"message": block})

    def _get(self, cid: CID) -> bytes:
        found = self._secure.vault.get_record(cid)
        if not isinstance(found, dict) or type(found.get("message")) is not bytes:
            raise BadUpdate(f"{cid} is no message of secure aggregation")
        data: bytes = found["message"]
        return data
