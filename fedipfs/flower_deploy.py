"""Names of Flower's that only a deployment needs and that it does not export publicly.

Together with flower_compat.py the only place for them; local runs do not import this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes
from flwr.supercore.run import RunNotRunningException as RunNotRunning

__all__ = [
    "ControlHttpClient",
    "NodeState",
    "RunNotRunning",
    "RunState",
    "control_client",
    "list_nodes",
    "register_node",
    "run_state",
    "start_run",
    "stop_run",
    "stream_log",
    "unregister_node",
]


class NodeState(NamedTuple):
    """A SuperNode as the SuperLink knows it; `public_key` is the line of its OpenSSH file."""

    node_id: int
    name: str
    public_key: str
    status: str  # "registered", "online", "offline", "unregistered"


class RunState(NamedTuple):
    """A run as the SuperLink knows it: "finished" has a `sub_status` such as "completed"."""

    status: str  # "pending", "starting", "running", "finished"
    sub_status: str
    details: str


def control_client(address: str, ca: bytes) -> ControlHttpClient:
    """A client of the Control API at host:port, whose certificate `ca` (PEM) must vouch for."""
    return ControlHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=ca,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedipfs")],
    )


def register_node(client: ControlHttpClient, node_key: str, name: str) -> int:
    """Let the node with this public key (an OpenSSH line) in; returns its id."""
    key = load_ssh_public_key(node_key.encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name)
    return int(client.RegisterNode(request).node_id)


def unregister_node(client: ControlHttpClient, node_id: int) -> None:
    """Shut a node out."""
    client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def list_nodes(client: ControlHttpClient) -> list[NodeState]:
    """All nodes that were ever registered."""
    found = client.ListNodes(ListNodesRequest()).nodes_info
    return [
        NodeState(each.node_id, each.name, _line(each.public_key), each.status) for each in found
    ]


def start_run(
    client: ControlHttpClient, files: Mapping[str, bytes], run_config: Mapping[str, Any]
) -> int:
    """Submit the Flower app that `files` make, with values for its run config; returns its id."""
    import hashlib

    content, _ = build_fab_from_files(dict(files))
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    request = StartRunRequest(
        fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config)), federation=""
    )
    return int(client.StartRun(request).run_id)


def stop_run(client: ControlHttpClient, run_id: int) -> None:
    """End a run, and its ServerApp's process with it."""
    client.StopRun(StopRunRequest(run_id=run_id))


def run_state(client: ControlHttpClient, run_id: int) -> RunState:
    """How a run is; KeyError if the SuperLink does not know it."""
    run = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
    return RunState(run.status.status, run.status.sub_status, run.status.details)


def stream_log(client: ControlHttpClient, run_id: int) -> Any:
    """What the ServerApp's process logs, piece by piece, to its end."""
    for piece in client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=0.0)):
        yield piece.log_output


def _line(key: bytes) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes_to_public_key(key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
