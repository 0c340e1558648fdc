"""A resident worker: serves any number of clients, one message after another."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp

from fedipfs.clients.seeding import seed_everything
from fedipfs.clients.state import load_state, save_state
from fedipfs.errors import ConfigError, EdgeError, one_line
from fedipfs.exchange import Vault, frame, unframe, use_store
from fedipfs.flower_compat import (
    flower_logger,
    message_from_bytes,
    message_to_bytes,
    set_identity,
)
from fedipfs.ipld import CID
from fedipfs.observe.memory import peak_rss
from fedipfs.store import open_store
from fedipfs.trust import Identity
from fedipfs.trust.party import Party

_MAX_ANSWER = 1 << 20  # bytes; with cid_mod an answer has less than 16 KiB


def serve(options: Mapping[str, Any]) -> Callable[[bytes], bytes]:
    """The function that answers requests (frames of the local engine, see exchange/frames.py).

    `options`: `app` ("module:attribute" of a ClientApp), `store` (as for open_store), `keys` (null,
    or the folder with `client-<partition>.key` for each client and their `trust.toml`), `seal`,
    `run_id`, `seed`, `run_config`, `node_config`, `threads` (torch's, or null to leave them), and
    `offline` (true where the server has downloaded what there was to download).
    """
    if options["offline"]:
        os.environ["FEDIPFS_OFFLINE"] = "1"
    flower_logger().setLevel(logging.WARNING)
    if options["threads"] is not None:
        import torch

        torch.set_num_threads(options["threads"])
    return _Worker(options).handle


class _Worker:
    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._store = open_store(options["store"])
        self._vaults: dict[int | None, Vault] = {}
        self._app: ClientApp | None = None

    def handle(self, request: bytes) -> bytes:
        call, wire = unframe(request)
        before = self._store.counters.copy()
        answer, error = b"", None
        state: list[CID] | None = None
        try:
            vault = self._vault(call["partition"])
            use_store(vault)
            answer, state = self._call(call, wire, vault)
            if len(answer) > _MAX_ANSWER:
                raise EdgeError(f"its answer of {len(answer)} bytes is more than {_MAX_ANSWER}")
        except (Exception, SystemExit) as problem:
            logging.getLogger(__name__).debug(traceback.format_exc())
            answer, error = b"", one_line(f"{type(problem).__name__}: {problem}")
        after = self._store.counters
        header = {
            "state": None if state is None else [str(cid) for cid in state],
            "error": error,
            "put": after.put_bytes - before.put_bytes,
            "get": after.get_bytes - before.get_bytes,
            "sent": after.sent_bytes - before.sent_bytes,
            "fetched": after.fetched_bytes - before.fetched_bytes,
            "rss": peak_rss(),
        }
        return frame(header, answer)

    def _vault(self, partition: int) -> Vault:
        """The store as this client sees it, with its own keys if there are any."""
        keys = self._options["keys"]
        owner = None if keys is None else partition
        if owner not in self._vaults:
            party = None
            if keys is not None:
                identity = Identity.load(f"{keys}/client-{partition}.key")
                party = Party(identity, "participant", f"{keys}/trust.toml")
            self._vaults[owner] = Vault(self._store, party, self._options["seal"])
        return self._vaults[owner]

    def _call(
        self, call: Mapping[str, Any], wire: bytes, vault: Vault
    ) -> tuple[bytes, list[CID] | None]:
        node, options = call["node"], self._options
        set_identity(run_id=options["run_id"], node_id=node)
        message = message_from_bytes(wire)
        seed_everything(options["seed"], node, message)
        context = Context(
            run_id=options["run_id"],
            node_id=node,
            node_config={
                **options["node_config"],
                **call["config"],
                "partition-id": call["partition"],
                "num-partitions": call["partitions"],
            },
            state=load_state(vault, call["state"] and CID.parse(call["state"])),
            run_config=dict(options["run_config"]),
        )
        if self._app is None:
            self._app = _load_app(options["app"])
        reply = self._app(message, context)
        kept = context.state or call["state"]
        return message_to_bytes(reply), save_state(vault, context.state) if kept else None


def _load_app(reference: str) -> ClientApp:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, name = reference.partition(":")
    app = getattr(importlib.import_module(module), name)
    if not isinstance(app, ClientApp):
        raise ConfigError(f"{reference!r} is a {type(app).__name__}, not a flwr ClientApp")
    return app
