"""Names of Flower's that only a deployment needs and that it does not export publicly.

Together with flower_compat.py the only place for them; local runs do not import this one.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

import grpc
import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_ssh_private_key,
    load_ssh_public_key,
)
from flwr.app import Context, Message
from flwr.cli.build import build_fab_from_files
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.grpc import create_channel
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    pull_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionClientInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes
from flwr.supercore.run import RunNotRunningException as RunNotRunning
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message

from fedipfs.flower_compat import set_identity, set_message_id

__all__ = [
    "ControlHttpClient",
    "NodeState",
    "RunNotRunning",
    "RunState",
    "acquire_task",
    "beating",
    "bound_patience",
    "control_client",
    "deactivate_node",
    "finish_task",
    "list_nodes",
    "pull_task",
    "push_reply",
    "register_node",
    "run_serverapp_for",
    "run_state",
    "run_supernode",
    "runtime_client",
    "start_run",
    "stop_run",
    "task_client",
    "unregister_node",
]

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_DEACTIVATE_S = 5.0
_SOON_S = 0.05  # until the next look for an object that is on its way


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


def bound_patience(grid: Any, seconds: float) -> None:
    """Have a ServerApp's grid try for so long at most while the SuperLink is away.

    It would for ever. Then it raises the httpx.TransportError that it met last.
    """
    grid._retry_invoker.max_time = seconds


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


def run_state(client: ControlHttpClient, run_id: int) -> RunState | None:
    """How a run is; None if the SuperLink does not know it."""
    try:
        found = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise
        return None
    if run_id not in found:
        return None
    status = found[run_id].status
    return RunState(status.status, status.sub_status, status.details)


def run_serverapp_for(files: Mapping[str, bytes]) -> None:
    """Be `flwr-serverapp` for the Flower app that `files` make, and for no other.

    What else is submitted is not even unpacked: its run fails.
    """
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    # The package has a function of the same name.
    module: Any = importlib.import_module("flwr.superlink.runtime.run_serverapp")
    install, (wanted, _) = module.install_from_fab, build_fab_from_files(dict(files))

    def install_ours(content: bytes, *given: Any, **named: Any) -> Any:
        if content != wanted:
            raise RuntimeError(
                "this coordinator runs FedIPFS's own Flower app and no other: "
                "`fedipfs-server app DIR` writes it"
            )
        return install(content, *given, **named)

    module.install_from_fab = install_ours
    flwr_serverapp()


def _line(key: bytes) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes_to_public_key(key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


# ---- a partner's machine: the SuperNode, and its Runtime API


def runtime_client(address: str, secret: bytes) -> RuntimeHttpClient:
    """A client that may claim tasks of the SuperNode whose Runtime API is at host:port."""
    proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE])
    return _runtime(address, proof)


def task_client(address: str, token: str) -> RuntimeHttpClient:
    """A client that may do what the task with this token needs."""
    return _runtime(address, RuntimeTokenHttpInterceptor(token))


def _runtime(address: str, proof: Any) -> RuntimeHttpClient:
    # Without Flower's retries: these never end, and a refusal would interrupt this process.
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedipfs"), proof],
    )


def acquire_task(client: RuntimeHttpClient) -> str | None:
    """Claim a ClientApp's task; its token, None if there is none to do. Raises httpx.HTTPError."""
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    return client.AcquireTask(request).token or None


def pull_task(client: RuntimeHttpClient) -> tuple[Message, Context]:
    """The message of a task, and Flower's context for it; the Flower app is left as it came.

    As flwr.supernode.runtime.run_clientapp.pull_task_input, but it looks again at once for what
    the SuperNode has not fetched yet, where that waits for a second or several.
    """
    found = client.PullTaskInput(PullTaskInputRequest())
    context = context_from_proto(found.context)
    run, node = context.run_id, ProtoNode(node_id=context.node_id)
    set_identity(run_id=run, node_id=context.node_id, task_id=found.task_id)
    (tree,) = client.PullMessages(PullAppMessagesRequest()).message_object_trees
    message = pull_and_inflate_object_from_tree(
        tree,
        make_pull_object_fn_protobuf(client.PullObject, node, run),
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run),
        return_type=Message,
        initial_backoff=_SOON_S,
        backoff_cap=1.0,
    )
    set_message_id(message, tree.object_id)
    return message, context


def push_reply(client: RuntimeHttpClient, reply: Message, context: Context) -> None:
    """Hand in a task's reply."""
    push_message(client, reply, context)


def finish_task(client: RuntimeHttpClient, problem: str = "") -> None:
    """Say that a task is done, or what went wrong."""
    status = SubStatus.FAILED if problem else SubStatus.COMPLETED
    client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=problem))


@contextmanager
def beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Keep a task alive meanwhile: SuperNodes give up those that they do not hear of."""

    def beat() -> bool:
        with suppress(httpx.HTTPError):
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


def deactivate_node(address: str, ca: bytes, node_key: bytes, node_id: int) -> bool:
    """Tell the SuperLink at host:port that a SuperNode is gone which could not say so itself.

    What it was asked counts as failed then, at once. Returns whether the SuperLink knows now.
    """
    key = load_ssh_private_key(node_key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    channel = create_channel(
        server_address=address,
        insecure=False,
        root_certificates=ca,
        interceptors=[
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(key, key.public_key()),
        ],
    )
    try:
        request = DeactivateNodeRequest(node_id=node_id)
        FleetStub(channel).DeactivateNode(request, timeout=_DEACTIVATE_S)
    except grpc.RpcError as error:
        away = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return error.code() not in away  # it was gone already, or never there
    finally:
        channel.close()
    return True


def run_supernode(arguments: Sequence[str], poll_s: float | None) -> NoReturn:
    """Be `flower-supernode` with these arguments, to the end of this process.

    With `poll_s` it looks that often for messages and replies, where Flower waits 3 s and 0.5 s.
    """
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    if poll_s is not None:
        start_client_internal.time = _Hasty(poll_s)  # type: ignore[assignment]
        # A message may be seen before all that belongs to it has come.
        hasty = partial(pull_objects, initial_backoff=_SOON_S, backoff_cap=1.0)
        start_client_internal.pull_objects = hasty
    sys.argv = ["flower-supernode", *arguments]
    threading.excepthook = _end_with_thread
    flower_supernode()
    # It returns where a call failed for good, as when a SuperLink that stops cancels one; the
    # thread of its Runtime API would keep the process alive, and no supervisor would see its end.
    sys.stderr.flush()
    os._exit(1)


def _end_with_thread(problem: threading.ExceptHookArgs) -> NoReturn:
    """Without the thread that sends heartbeats, say, a SuperNode would seem to live."""
    threading.__excepthook__(problem)
    sys.stderr.flush()
    os._exit(1)


class _Hasty:
    """The module `time`, with short sleeps."""

    def __init__(self, longest: float) -> None:
        self._longest = longest

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, self._longest))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)
