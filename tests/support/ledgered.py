"""Sites that keep a privacy ledger, and what a coordinator may say to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fleet import QUADRATIC, Fleet
from flwr.app import ConfigRecord, Message, RecordDict

from fedipfs import data
from fedipfs.privacy.fingerprint import fingerprint
from fedipfs.privacy.ledger import Ledger
from fedipfs.privacy.room import Cap

CAP = Cap(50.0, 1e-5, "rdp")
TRAIN, EVALUATE, CAPABILITIES = "train", "evaluate", "query.capabilities"
SECTION = {
    "name": "dp_sgd",
    "epsilon": 8.0,
    "noise_multiplier": 2.0,
    "clip_norm": 1.0,
    "delta": 1e-5,
    "examples": 100,
    "sample_rate": 0.25,
    "accountant": "rdp",
    "clipping": "auto",
    "physical_batch": 512,
    "replace_layers": False,
    "metrics": "noise",
    "metrics_noise_multiplier": 20.0,
    "metric_bounds": {"loss": 5.0},
    "reproducible": False,
}


class Sites(Fleet):
    """Nodes from 2 on, each with a folder for ledgers and, unless `cap` is None, one for its data.

    `privacy` changes the run's section; None asks for no privacy. They are real sites, unless
    `simulated`. `run` is what messages call the run.
    """

    run = "run"

    def __init__(
        self,
        store,
        folder: Path,
        *,
        task: str = "fedipfs.tasks.small:Digits",
        clients: int = 2,
        privacy: dict[str, Any] | None = SECTION,
        cap: Cap | None = CAP,
        simulated: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(store, task, clients, **{"steps": 3, **options})
        self.folder = folder
        self.reconfigure(privacy)
        self.fingerprints = {node: self._fingerprint(node - 2) for node in self.raw.nodes}
        for node, context in self.raw.contexts.items():
            context.node_config |= {"ledger": str(self.place(node)), "simulated": simulated}
            if cap is not None:
                Ledger.create(self.place(node), self.fingerprints[node], cap)

    def reconfigure(self, privacy: dict[str, Any] | None, **train: Any) -> None:
        """Begin a run with other settings."""
        self.config["privacy"] = {"name": "none"} if privacy is None else {**SECTION, **privacy}
        self.config["train"] = {**self.train, **train}
        self.run_config = str(self.vault.put_record(self.config))

    def place(self, node: int) -> Path:
        """The folder with a site's ledgers."""
        return self.folder / f"site-{node}"

    def ledger(self, node: int = 2) -> Ledger:
        return Ledger.open(self.place(node), self.fingerprints[node])

    def say(self, kind: str, node: int = 2, **ask: Any) -> Message:
        """The answer of `node` to a message."""
        told = {"run-config": self.run_config, "server-round": 1, "run": self.run, **ask}
        content = RecordDict({"config": ConfigRecord(told)})
        if kind != CAPABILITIES:
            content["arrays"] = self.model
        message = self.grid.create_message(content, kind, node, "")
        (reply,) = self.grid.send_and_receive([message])
        return reply

    def refusal(self, kind: str, node: int = 2, **ask: Any) -> str:
        """The error with which it answers."""
        reply = self.say(kind, node, **ask)
        assert reply.has_error()
        return reply.error.reason

    def _fingerprint(self, partition: int) -> str:
        split = self.config["data"]
        examples = self.task.data(root=None, fallback="digits").train
        mine = data.partition(
            examples.targets,
            name=split["partition"],
            clients=self.clients,
            seed=self.config["seed"],
            alpha=split["alpha"],
            shards_per_client=split["shards_per_client"],
            classes_per_client=split["classes_per_client"],
        )[partition]
        return fingerprint(examples.inputs[mine], examples.targets[mine])


__all__ = ["CAP", "CAPABILITIES", "EVALUATE", "QUADRATIC", "SECTION", "TRAIN", "Sites"]
