"""What an engine gives a run: nodes to ask, and the coordinator's keys among them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedipfs.exchange import Vault
from fedipfs.flower_compat import SERVER_NODE_ID
from fedipfs.ipld import CID
from fedipfs.trust.party import Party

FIRST_NODE = SERVER_NODE_ID + 1  # the node of client, or member, number 0


@dataclass
class Traffic:
    """What has passed: bytes of Flower messages, bytes that workers put and got, and so on."""

    flower: int = 0
    store_put: int = 0
    store_get: int = 0
    sent: int = 0  # of that, to a service
    fetched: int = 0
    peak_rss: int = 0  # bytes, of the largest worker

    def copy(self) -> Traffic:
        return replace(self)


class NodeGrid(Grid):
    """A Flower Grid that knows how to wait, and what its nodes are called.

    `states` has the CIDs of what nodes remember, by node, as far as they are kept on this side.
    """

    states: dict[int, list[CID]]
    traffic: Traffic

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @abstractmethod
    def name_of(self, node_id: int) -> str:
        """The name of a node in logs and records, and the organization that signs for it."""

    @abstractmethod
    def receive(self, message_ids: Iterable[str], timeout: float | None) -> list[Message]:
        """At least one reply; [] if none came within `timeout` seconds or none can come."""

    @abstractmethod
    def cancel(self, message_ids: Iterable[str]) -> None:
        """Give these up: what comes all the same is dropped."""

    @abstractmethod
    def now(self) -> float:
        """Seconds, from an unknown beginning."""


class Nodes(Protocol):
    """Where a run's clients are: simulated on this machine, or at partners."""

    @property
    def remote(self) -> bool:
        """Whether they have data of their own, which the configuration does not divide."""
        ...

    def party(self, config: Mapping[str, Any], folder: Path) -> Party | None:
        """The coordinator of the run in `folder`; None if nothing is to be signed."""
        ...

    def open(
        self,
        config: Mapping[str, Any],
        vault: Vault,
        states: dict[int, list[CID]],
        on_reply: Callable[[str, bool], None],
    ) -> AbstractContextManager[NodeGrid]:
        """The nodes, until the context ends. `on_reply(name, ok)` is called as replies come in."""
        ...
