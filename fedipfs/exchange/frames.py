"""What goes through the pipe between the local engine and its workers: JSON and bytes."""

from __future__ import annotations

import json
from typing import Any


def frame(header: dict[str, Any], body: bytes) -> bytes:
    """One message: `header` (what JSON holds) on a line, then `body`."""
    return json.dumps(header).encode() + b"\n" + body


def unframe(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Inverse of `frame`."""
    header, _, body = data.partition(b"\n")
    return json.loads(header), body
