"""DAG-JSON's view of a record, for people and scripts (https://ipld.io/specs/codecs/dag-json/)."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from fedipfs.ipld.cid import CID


def view(value: Any) -> Any:
    """`value` as `json.dumps` takes it: links as {"/": CID}, bytes as {"/": {"bytes": base64}}."""
    if isinstance(value, CID):
        return {"/": str(value)}
    if isinstance(value, bytes):
        return {"/": {"bytes": b64encode(value).decode().rstrip("=")}}
    if isinstance(value, dict):
        return {key: view(item) for key, item in value.items()}
    return [view(item) for item in value] if isinstance(value, list) else value
