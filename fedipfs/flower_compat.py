"""The only file that touches a name Flower does not export publicly."""

from __future__ import annotations

import logging

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CLIENT_APP_CRASHED",
    "CLIENT_APP_RAISED_EXCEPTION",
    "NODE_UNAVAILABLE",
    "SERVER_NODE_ID",
    "error_instead",
    "flower_logger",
    "message_from_bytes",
    "message_to_bytes",
    "records_from_bytes",
    "records_to_bytes",
    "set_identity",
    "set_message_id",
]

SERVER_NODE_ID = 1  # the SuperLink's own
CLIENT_APP_RAISED_EXCEPTION = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
NODE_UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)
CLIENT_APP_CRASHED = int(ErrorCode.CLIENT_APP_CRASHED)


def set_identity(*, run_id: int, node_id: int, task_id: int = 0) -> None:
    """Say who this process is; needed before it can make a `Message` (since Flower 1.37)."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which in a deployment the SuperLink does."""
    message.metadata.__dict__["_message_id"] = message_id


def error_instead(message: Message, error: Error) -> Message:
    """A message with the same metadata that carries `error` instead of its content."""
    return Message(error=error, metadata=message.metadata)  # type: ignore[call-overload]


def message_to_bytes(message: Message) -> bytes:
    """The message in Flower's own wire format (protobuf); its length is what crosses Flower."""
    return message_to_proto(message).SerializeToString(deterministic=True)


def message_from_bytes(data: bytes) -> Message:
    """Inverse of `message_to_bytes`."""
    return message_from_proto(ProtoMessage.FromString(data))


def records_to_bytes(records: RecordDict) -> bytes:
    """A RecordDict in Flower's own wire format; equal records give equal bytes."""
    return recorddict_to_proto(records).SerializeToString(deterministic=True)


def records_from_bytes(data: bytes) -> RecordDict:
    """Inverse of `records_to_bytes`."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def flower_logger() -> logging.Logger:
    """Flower's logger, so that a run can send it to its log file instead of the terminal."""
    return logging.getLogger("flwr")
