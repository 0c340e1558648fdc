"""The Control API of a federation's SuperLink: its nodes and its runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

from fedipfs import flower_deploy
from fedipfs.errors import RunFailed
from fedipfs.flower_deploy import ControlHttpClient, NodeState, RunState

LOOPBACK = "127.0.0.1"


class Where(Protocol):
    """What is needed of a federation's home (server/membership.py)."""

    @property
    def http_port(self) -> int: ...

    @property
    def ca(self) -> Path: ...


class Control:
    """What a coordinator asks of its SuperLink. Raises RunFailed if that refuses or is gone."""

    def __init__(self, client: ControlHttpClient, address: str) -> None:
        self._client, self._address = client, address

    @classmethod
    @contextmanager
    def reach(cls, home: Where) -> Iterator[Control | None]:
        """That of the SuperLink on this machine; None if nothing listens on its port."""
        if not listening(home.http_port):
            yield None
            return
        _no_proxy()
        address = f"{LOOPBACK}:{home.http_port}"
        client = flower_deploy.control_client(address, home.ca.read_bytes())
        try:
            yield cls(client, address)
        finally:
            client.close()

    def register(self, node_key: str, name: str) -> int:
        """Let a node in, by its OpenSSH public key; returns its id."""
        with self._told("register a node"):
            return flower_deploy.register_node(self._client, node_key, name)

    def unregister(self, node_id: int) -> None:
        """Shut a node out, at once and for good: to let it in again, register it anew."""
        with self._told("unregister a node"):
            flower_deploy.unregister_node(self._client, node_id)

    def nodes(self) -> list[NodeState]:
        """All nodes that were ever registered."""
        with self._told("list its nodes"):
            return flower_deploy.list_nodes(self._client)

    def start(self, files: Mapping[str, bytes], run_config: Mapping[str, Any]) -> int:
        """Submit the Flower app that `files` make; returns the run's id."""
        with self._told("start a run"):
            return flower_deploy.start_run(self._client, files, run_config)

    def stop(self, run_id: int) -> None:
        """End a run and its ServerApp; nothing if it has ended."""
        with self._told("stop a run"):
            state = self.state(run_id)
            if state is not None and state.status != "finished":
                flower_deploy.stop_run(self._client, run_id)

    def state(self, run_id: int) -> RunState | None:
        """How a run is; None if the SuperLink does not know it."""
        with self._told("show a run"):
            return flower_deploy.run_state(self._client, run_id)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            reason = error.response.text.strip() or error.response.reason_phrase
            raise RunFailed(
                f"the SuperLink at {self._address} would not {what}: {reason[:300]}"
            ) from error
        except httpx.HTTPError as error:
            raise RunFailed(
                f"the SuperLink at {self._address} did not answer when asked to {what} "
                f"({type(error).__name__}): see its log, or start it anew"
            ) from error


def listening(port: int, host: str = LOOPBACK) -> bool:
    """Whether something listens on a port of this machine, at an address of its own."""
    try:
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _no_proxy() -> None:
    """Keep what is for this machine from a proxy."""
    for name in ("NO_PROXY", "no_proxy"):
        given = os.environ.get(name, "")
        if LOOPBACK not in given.split(","):
            os.environ[name] = ",".join(filter(None, [given, LOOPBACK]))
