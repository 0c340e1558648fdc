"""Three sites with keys, each the real ClientApp, and a coordinator that may say what it likes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from parties import NAMES, Parties

from fedipfs import tasks, use_store
from fedipfs.clients.app import app
from fedipfs.exchange import Seal, Stamp, StoredArrays, flat_size, from_torch, stages, store_arrays
from fedipfs.ipld import CID
from fedipfs.secagg import Parameters, Roster, Server, Session
from fedipfs.secagg.messages import Advertise, Share, Signed
from fedipfs.server.secure import Secure, lasting_parameters
from fedipfs.store import Store

TASK = "fedipfs.tasks.small:Digits"
OPTIONS = {
    "threshold": None,
    "colluders": None,
    "dropouts": None,
    "clip": 1.0,
    "bits": 20,
    "examples": 1000,
}
METRICS = ("steps", "train_loss")


class Sites:
    """`alpha`, `beta` and `gamma` (nodes 2 to 4) over one store, and the coordinator's grid.

    `config` changes sections of the run's configuration, `node` adds to every site's own.
    """

    run = "bafyreirun"

    def __init__(
        self, folder: Path, store: Store, seal: Seal = "none", *, node=None, **config: Any
    ) -> None:
        self.parties = Parties(folder, store, seal)
        self.vault = self.parties.coordinator
        self.config = {
            "seed": 1,
            "task": {"target": TASK, "options": {}},
            "data": {
                "partition": "iid",
                "fallback": "digits",
                "alpha": 0.5,
                "shards_per_client": 2,
                "classes_per_client": 2,
                "validation": 0.0,
            },
            "train": {
                "batch_size": 32,
                "epochs": 1,
                "steps": 2,
                "optimizer": {"name": "SGD", "lr": 0.1},
                "schedule": None,
                "clip_norm": None,
                "device": "cpu",
            },
            "evaluate": {"batch_size": 200},
            "privacy": {"name": "none"},
            **config,
        }
        self.run_config = str(self.vault.put_record(self.config))
        self.journals = folder / "journals"
        self.grid = self.parties.grid(self._call)
        self.contexts: dict[str, Context] = {}
        for place, name in enumerate(NAMES):
            context = self.grid._grid.contexts[2 + place]
            context.node_config |= {
                "num-partitions": 3,
                "simulated": True,
                "secagg-journal": str(self.journals),
                **(node or {}),
            }
            self.contexts[name] = context
        torch.manual_seed(1)
        module = tasks.load(TASK, {}, allowed=tasks.ALLOWED).model()
        self.model = store_arrays(self.vault, from_torch(module.state_dict()))
        self.round = 1

    def _call(self, message: Message, context: Context) -> Message:
        use_store(self.parties.vaults[self.parties.name_of(message.metadata.dst_node_id)])
        return app(message, context)

    @property
    def ask(self) -> dict[str, Any]:
        """What a message to train says, besides its stage."""
        return {"run-config": self.run_config, "server-round": self.round}

    @property
    def parameters(self) -> Parameters:
        """Those of a round that do not depend on what is trained."""
        return lasting_parameters(OPTIONS, 3, flat_size(self.model), metrics=METRICS, relative=True)

    def session(self, parameters: Parameters | None = None, **changes: Any) -> Session:
        """What an honest coordinator would announce, with `changes`."""
        found = stages.bound(parameters or self.parameters, self.model.cid, self.ask)
        return dataclasses.replace(Session(self.run, self.round, NAMES, found), **changes)

    def with_details(self, **details: Any) -> Session:
        """A session with other details; None takes one out."""
        session = self.session()
        told = {**dict(session.parameters.details), **details}
        kept = tuple(sorted((key, value) for key, value in told.items() if value is not None))
        parameters = dataclasses.replace(session.parameters, details=kept)
        return dataclasses.replace(session, parameters=parameters)

    def send(
        self, name: str, kind: str, ask: dict[str, Any], model: StoredArrays | None = None
    ) -> Message:
        """A site's reply to a message that the coordinator signs for the round."""
        self.grid.stamp = Stamp(self.run, self.round)
        content = RecordDict({"config": ConfigRecord(ask)})
        if model is not None:
            content["arrays"] = model
        node = 2 + NAMES.index(name)
        (reply,) = self.grid.send_and_receive(
            [self.grid.create_message(content, kind, node, str(ask.get("stage", "")))]
        )
        return reply

    def stage(
        self,
        name: str,
        stage: str,
        session: Session,
        asked: bytes | None = None,
        *,
        train: bool = False,
        model: StoredArrays | None = None,
        **ask: Any,
    ) -> Message:
        """A site's reply at a stage."""
        ask = {**self.ask, **ask} if train else {"server-round": self.round, **ask}
        ask |= {"stage": stage, "session": str(stages.put_message(self.vault, session.to_bytes()))}
        if asked is not None:
            ask["asked"] = str(stages.put_message(self.vault, asked))
        if not train:
            return self.send(name, stages.QUERY, ask)
        return self.send(name, stages.TRAIN, ask, model or self.model)

    def said(self, reply: Message, kind: type[Signed]) -> Any:
        """What a site has said."""
        assert not reply.has_error(), reply.error.reason
        answer = reply.content[stages.RECORD][stages.ANSWER]
        return kind.from_bytes(stages.get_message(self.vault, answer))

    def server(self, session: Session) -> Server:
        """The coordinator's side of a session."""
        return Server(session, self.vault.party.verify)

    def until_masked(self, session: Session) -> tuple[Server, dict[str, bytes]]:
        """All have advertised and shared; what each is to be delivered."""
        server = self.server(session)
        for name in NAMES:
            server.take(self.said(self.stage(name, "advertise", session), Advertise))
        roster: Roster = server.close_advertise()
        for name in NAMES:
            reply = self.stage(name, "share", session, roster.to_bytes())
            server.take(self.said(reply, Share))
        return server, {name: each.to_bytes() for name, each in server.close_share().items()}

    def secure(self, **changes: Any) -> Secure:
        """The coordinator that runs honestly."""
        self.grid.stamp = Stamp(self.run, self.round)
        told = {"options": OPTIONS, "metrics": METRICS, "relative": True, **changes}
        return Secure(
            self.grid,
            self.vault,
            self.run,
            name_of=self.parties.name_of,
            now=time.monotonic,
            **told,
        )

    def play(self, secure: Secure, **ask: Any) -> Any:
        """A whole round; what it sums up to."""
        self.grid.stamp = Stamp(self.run, self.round)
        record = RecordDict({"arrays": self.model, "config": ConfigRecord({**self.ask, **ask})})
        messages = [self.grid.create_message(record, "train", 2 + place, "") for place in range(3)]
        self.answers = secure.train(self.round, self.model, messages)
        return secure.sum


def reason(reply: Message) -> str:
    """Why a site refused; "" if it did not."""
    return reply.error.reason if reply.has_error() else ""


def cid_of(reply: Message) -> CID:
    return CID.parse(reply.content[stages.RECORD][stages.ANSWER])
