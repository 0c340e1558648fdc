"""The resident worker: it alone has the keys and reads the data.

It imports torch and loads the data once, and then answers the messages that come by its socket
(see serving.py and stub.py): checks the coordinator's signature and the site's policy, trains, and
answers CIDs. Nothing that a coordinator sends is run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message

from fedipfs.clients.activity import Activity
from fedipfs.clients.app import app, count_examples, use_data
from fedipfs.clients.budget import open_ledger
from fedipfs.clients.gate import Gate, use_gate
from fedipfs.clients.home import alone
from fedipfs.clients.memory import Memory
from fedipfs.clients.replay import Positions
from fedipfs.clients.serving import Server
from fedipfs.clients.site import SiteFile
from fedipfs.errors import ConfigError
from fedipfs.exchange import Vault, choose_seal, pack, stamp_of, unpack, use_store
from fedipfs.exchange.signing import signer_of
from fedipfs.flower_compat import (
    flower_logger,
    message_from_bytes,
    message_to_bytes,
    set_identity,
)
from fedipfs.privacy.fingerprint import fingerprint
from fedipfs.store import open_store
from fedipfs.trust import Identity
from fedipfs.trust.party import Party

log = logging.getLogger(__name__)

FIRST_NODE = 2  # what coordinators call the member with the number 0; see server/engine/local.py


class Worker:
    """Answers the messages of one site. Raises what is wrong with its files, keys, data or store.

    It sets what the whole process uses: the store, the data, the gate, torch's threads.
    """

    def __init__(self, site: SiteFile) -> None:
        import torch

        flower_logger().setLevel(logging.WARNING)
        if site.client.threads is not None:
            torch.set_num_threads(site.client.threads)
        federation = site.federation()
        identity = Identity.unlock(site.home.identity)
        self.organization = identity.public.organization
        if identity.public != federation.own:
            raise ConfigError(
                f"{site.home.identity} holds other keys of {self.organization} than those that "
                "the federation knows: `fedipfs-client init` and join anew"
            )
        site.home.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.node = FIRST_NODE + federation.number
        because = os.environ.get("FEDIPFS_UNSEALED_BECAUSE")
        seal = choose_seal(site.seal, shared=site.shared, because=because)
        policy = site.policy
        party = Party(identity, "participant", site.home.trust)
        vault = Vault(open_store(site.store), party, seal, limit=policy.max_bytes)
        use_store(vault)
        self.dataset = site.data.load()
        use_data(self.dataset)
        records = self.dataset.train
        if policy.privacy is not None:
            own = fingerprint(records.inputs, records.targets)
            open_ledger(policy, site.home.ledger, own, data=self.dataset.name)
        self.activity = Activity(site.home.activity)
        positions = Positions(site.home.state / "positions")
        # Its own files are no other side's choice: they may be larger than a model.
        self._memory = Memory(
            site.home.state / "memory.json", Vault(vault.store, party, seal), self.organization
        )
        self._gate = Gate(
            policy, self.activity, positions, examples=count_examples, keep=self._memory.save
        )
        use_gate(self._gate)
        self.node_config = _node_config(site, federation.number, len(federation.members))

    def answer(self, wire: bytes) -> bytes:
        """The reply to a Flower message, both in Flower's wire format. Raises what went wrong."""
        with self._gate.noting() as told:
            message = message_from_bytes(wire)
            told["kind"] = message.metadata.message_type
            return message_to_bytes(self._answer(message))

    def _answer(self, message: Message) -> Message:
        run_id = message.metadata.run_id
        set_identity(run_id=run_id, node_id=message.metadata.dst_node_id)
        message.content = unpack(message.content)
        # What this says is not checked yet; if it is not so, nothing comes of it.
        stamp = stamp_of(message.content)
        run, number = (stamp.run, stamp.round) if stamp else ("", 0)
        by = signer_of(message.content) or ""
        context = Context(
            run_id=run_id,
            node_id=self.node,
            node_config=dict(self.node_config),
            state=self._memory.load(by, run, number),
            run_config={},
        )
        reply = app(message, context)
        if reply.has_content():
            reply.content = pack(reply.content)
        return reply


def _node_config(site: SiteFile, number: int, members: int) -> Mapping[str, Any]:
    found: dict[str, bool | int | float | str] = {
        **site.policy.node_config(),
        "partition-id": number,
        "num-partitions": members,
        "own-data": True,
        "allowed-targets": ",".join(site.policy.tasks),
        "ledger": str(site.home.ledger),
        "secagg-journal": str(site.home.state / "secagg"),
        "trainer": site.client.trainer,
        "trainer-processes": site.client.processes or 0,
        "trainer-timeout": 0.9 * site.client.timeout_s,  # before the worker itself is given up
    }
    if site.client.device is not None:
        found["device"] = site.client.device
    return found


def serve(site: SiteFile) -> None:
    """Be the worker of `site` until a signal raises something here."""
    with alone(site.home.state / "worker.lock", "its worker"):
        worker = Worker(site)
        from fedipfs.clients import preload  # noqa: F401  (what else takes long to import)

        server = Server(
            site.home.socket,
            worker.answer,
            timeout_s=site.client.timeout_s,
            group=site.node.group,
        )
        count, tests = len(worker.dataset.train), len(worker.dataset.test)
        worker.activity.note("started", organization=worker.organization)
        log.info("ready: %d examples of %s, and %d to test", count, worker.dataset.name, tests)
        try:
            server.serve()
        finally:
            server.close()
            worker.activity.note("stopped")
