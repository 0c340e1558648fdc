"""Partners with homes of their own, each a worker in a process, and their coordinator's grid.

No SuperLink: messages go straight to the workers' sockets, as a stub takes them there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from flwr.app import ConfigRecord, Message, RecordDict
from grids import DirectGrid

from fedipfs import CidGrid, FolderStore, tasks
from fedipfs.clients import joining, wire
from fedipfs.clients.home import Home
from fedipfs.clients.stub import forward
from fedipfs.data import Examples
from fedipfs.exchange import Stamp, Vault, from_torch, pack, store_arrays, unpack
from fedipfs.server.home import Home as CoordinatorHome
from fedipfs.server.membership import Registry, federation_of
from fedipfs.trust import Identity
from fedipfs.trust.joining import JoinRequest
from fedipfs.trust.party import Party

START_S, STOP_S = 90, 20
SUPPORT = Path(__file__).parent
TASK = "drawing:Noisy"
CONFIG: dict[str, Any] = {
    "seed": 7,
    "task": {"target": TASK, "options": {}},
    "data": {
        "partition": "iid",
        "fallback": "digits",
        "alpha": 0.5,
        "shards_per_client": 2,
        "classes_per_client": 2,
        "validation": 0.2,
    },
    "train": {
        "batch_size": 32,
        "epochs": 1,
        "steps": 3,
        "optimizer": {"name": "SGD", "lr": 0.1},
        "schedule": None,
        "clip_norm": None,
        "device": "cpu",
    },
    "evaluate": {"batch_size": 200},
    "privacy": {"name": "none"},
}


def environment(home: Path) -> dict[str, str]:
    """What a partner's processes have in their environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FEDIPFS_", "PYTEST_"))}
    return {
        **kept,
        "FEDIPFS_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SUPPORT),
        "PYTHONUNBUFFERED": "1",
    }


class Partners:
    """`names` have joined, with `data` each; all use one folder as their store."""

    def __init__(
        self, folder: Path, names: Sequence[str], data: Sequence[Examples], **hub: Any
    ) -> None:
        self.folder, self.names = folder, tuple(names)
        self.store = FolderStore(folder / "store", durable=False)
        options = {"host": "localhost", "organization": "hub", "bind": "127.0.0.1", **hub}
        self.hub = CoordinatorHome.create(folder / "hub", **options)
        self.key = Identity.load(self.hub.identity)
        self.registry = Registry.open(self.hub)
        self.homes = {name: Home(folder / name) for name in names}
        for name, home in self.homes.items():
            path = joining.init(home.path, name, folder)
            self.registry.admit(JoinRequest.load(path))
        for entry, examples in zip(self.registry.active, data, strict=True):
            file = folder / f"{entry.organization}.federation.json"
            file.write_text(federation_of(self.registry, entry, self.key.public).dumps(self.key))
            home = self.homes[entry.organization]
            joining.join(home.path, file, fingerprint=self.key.public.fingerprint)
            np.savez(home.path / "own.npz", x=examples.inputs, y=examples.targets)
            self.configure(entry.organization)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.vault = Vault(self.store, Party(self.key, "coordinator", self.hub.trust))

    def configure(self, name: str, **sections: Mapping[str, Any]) -> None:
        """Give a partner's site.yaml these values, beside those that the tests need."""
        home = self.homes[name]
        values = yaml.safe_load(home.site.read_text())
        values["store"] = {"kind": "folder", "path": str(self.store.path), "durable": False}
        values["data"] = {"format": "numpy", "path": "own.npz", "inputs": "x", "target": "y"}
        values["policy"] |= {"tasks": [TASK]}
        for section, changes in sections.items():
            values[section] |= changes
        home.site.write_text(yaml.safe_dump(values))

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """A partner's worker, without waiting for it."""
        home = self.homes[name]
        home.logs.mkdir(exist_ok=True)
        with open(home.logs / "worker.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedipfs.clients", *(words or ("worker",))],
                env=environment(home.path),
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def said(self, name: str) -> str:
        """What a partner's worker has printed."""
        return (self.homes[name].logs / "worker.log").read_text()

    def ready(self, *names: str) -> None:
        """Wait until the workers answer."""
        deadline = time.monotonic() + START_S
        for name in names:
            while not self.answers(name):
                assert time.monotonic() < deadline, self.said(name)
                time.sleep(0.1)

    def answers(self, name: str) -> bool:
        """Whether a worker answers a ping."""
        try:
            with wire.connect(self.homes[name].socket, 5) as connection:
                wire.send(connection, {"kind": "ping"})
                return wire.receive(connection, 5)[0] == {"kind": "ready"}
        except OSError:
            return False

    def stop(self) -> None:
        """End what `start` has started."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(STOP_S)

    def grid(self, **options: Any) -> CidGrid:
        """The coordinator's grid over the workers."""
        link = SocketGrid([home.socket for home in self.homes.values()], **options)
        return CidGrid(link, self.vault, name_of=lambda node: self.names[node - 2])

    def config(self, **changes: Any) -> str:
        """The CID of a run's configuration."""
        return str(self.vault.put_record({**CONFIG, **changes}))

    def model(self) -> Any:
        """A model of the task, stored."""
        torch.manual_seed(1)
        module = tasks.load(TASK, {}, allowed=("drawing",)).model()
        return store_arrays(self.vault, from_torch(module.state_dict()))

    def ask(
        self,
        grid: CidGrid,
        number: int,
        *,
        kind: str = "train",
        model: Any = None,
        attempt: int = 0,
        run: str = "bafyreirun",
        nodes: Sequence[int] | None = None,
        **ask: Any,
    ) -> dict[str, Message]:
        """What the partners answer to a round's message, by name."""
        grid.stamp, grid.attempt = Stamp(run, number), attempt
        told = {"run-config": self.config(), "server-round": number, "cohort": 2, **ask}
        content = RecordDict({"config": ConfigRecord(told)})
        if kind != "query.capabilities":
            content["arrays"] = model or self.model()
        nodes = range(2, 2 + len(self.names)) if nodes is None else nodes
        messages = [grid.create_message(content, kind, node, "") for node in nodes]
        replies = grid.send_and_receive(messages)
        return {self.names[reply.metadata.src_node_id - 2]: reply for reply in replies}


class SocketGrid(DirectGrid):
    """Nodes from 2 on are workers that listen at `sockets`."""

    def __init__(self, sockets: Sequence[Path], *, timeout_s: float = 60) -> None:
        super().__init__(None, len(sockets))
        self._sockets, self._timeout_s = list(sockets), timeout_s

    def _call(self, message: Message) -> Message:
        message = self._wire(message)
        message.content = pack(message.content)
        path = self._sockets[message.metadata.dst_node_id - 2]
        reply = forward(message, path, self._timeout_s, patience_s=5)
        if reply.has_content():
            reply.content = unpack(reply.content)
        return self._wire(reply)
