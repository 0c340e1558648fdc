"""The clients of a run on this machine, as its configuration describes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedipfs.exchange import Vault
from fedipfs.ipld import CID
from fedipfs.secagg.parameters import MIN_CLIENTS
from fedipfs.server import parties
from fedipfs.server.attack import Adversary, malicious, node_config
from fedipfs.server.engine.base import FIRST_NODE, NodeGrid
from fedipfs.server.engine.clock import SimulatedGrid, durations
from fedipfs.server.engine.local import RUN_ID, LocalGrid, client_name
from fedipfs.server.engine.pool import Pool, ProcessPool, SerialPool
from fedipfs.server.selection import Selection
from fedipfs.store import is_shared
from fedipfs.trust.party import Party

CLIENT_APP = "fedipfs.clients.app:app"
WORKER = "fedipfs.clients.worker:serve"


class Simulated:
    """Nodes (see engine/base.py) on this machine, with a partition of the data set each."""

    remote = False

    def party(self, config: Mapping[str, Any], folder: Path) -> Party | None:
        """The coordinator, where it has keys, something is sealed or others read the store."""
        private = config["seal"] == "none" and not is_shared(config["store"])
        if private and config["identity"] is None and config["secagg"]["name"] == "off":
            return None
        names = [client_name(number) for number in range(config["clients"]["total"])]
        return parties.coordinator(folder, config["identity"], names)

    @contextmanager
    def open(
        self,
        config: Mapping[str, Any],
        vault: Vault,
        states: dict[int, list[CID]],
        on_reply: Callable[[str, bool], None],
    ) -> Iterator[NodeGrid]:
        """Their workers run until the context ends."""
        workers = pool(config, vault)
        try:
            yield grid(config, workers, states, on_reply)
        finally:
            workers.close()


def pool(config: Mapping[str, Any], vault: Vault) -> Pool:
    """The workers that `engine` asks for, with the run's data, store and keys."""
    root, engine = config["data"]["root"], config["engine"]
    keys = Path(config["runs_dir"]) / config["run_id"] / parties.FOLDER
    options = {
        "app": CLIENT_APP,
        "store": dict(config["store"]),
        "keys": None if vault.party is None else str(keys.absolute()),
        "seal": vault.seal,
        "run_id": RUN_ID,
        "seed": config["seed"],
        "run_config": {},
        "node_config": {
            "data-root": str(Path(root).absolute()) if root else "",
            "allowed-tasks": config["task"]["target"].rpartition(":")[0],
            "simulated": True,
            "secagg-journal": str(Path(config["runs_dir"], config["run_id"], "secagg").absolute()),
            **_budget(config),
        },
        "threads": 1,
        "offline": engine["name"] != "serial",  # the server has downloaded what there was
    }
    if engine["name"] == "serial":
        return SerialPool(WORKER, options)
    return ProcessPool(WORKER, options, workers=engine["workers"], timeout_s=engine["timeout_s"])


def _budget(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the simulated sites keep their privacy ledgers, and what they allow."""
    privacy = config["privacy"]
    if privacy["name"] != "dp_sgd":
        return {}
    own = Path(config["runs_dir"]) / config["run_id"] / "ledgers"
    return {
        "ledger": str(Path(privacy["ledger"] or own).absolute()),
        "ledger-epsilon": privacy["cap"]["epsilon"] or privacy["epsilon"],
        "ledger-delta": privacy["cap"]["delta"] or privacy["delta"],
    }


def grid(
    config: Mapping[str, Any],
    pool: Pool,
    states: dict[int, list[CID]],
    on_reply: Callable[[str, bool], None],
) -> LocalGrid:
    """The nodes, on the real or the simulated clock; attackers know of it where they must."""
    clients, attack = config["clients"], config["attack"]
    total = clients["total"]
    nodes: dict[str, Any] = {
        "states": states,
        "on_reply": on_reply,
        "config_of": lambda partition: node_config(attack, partition, total),
    }
    if clients["clock"] == "real":
        return LocalGrid(pool, total, **nodes)
    pace = durations(clients["spread"], config["seed"])
    return SimulatedGrid(pool, total, duration=pace, **nodes)


def adversary(config: Mapping[str, Any], strategy: Strategy) -> Adversary | None:
    """The attack that the experiment simulates, if it does."""
    attack = config["attack"]
    if attack["name"] == "none":
        return None
    partitions = malicious(attack, config["clients"]["total"])
    screens = getattr(strategy, "screens_replies", False)
    return Adversary(
        attack,
        {FIRST_NODE + partition for partition in partitions},
        read=not screens,
        extra=getattr(strategy, "extra_arrays", ()),
    )


def selection(config: Mapping[str, Any], least: int, name_of: Callable[[int], str]) -> Selection:
    """Who is asked; `least` good updates are needed in a round."""
    clients = config["clients"]
    if config["secagg"]["name"] != "off":  # of fewer nothing is summed
        least = max(least, MIN_CLIENTS)
    names = ("per_round", "extra", "select", "requires", "exclude_after", "rest_rounds")
    return Selection(
        **{name: clients[name] for name in names},
        least=least,
        seed=config["seed"],
        name_of=name_of,
    )
