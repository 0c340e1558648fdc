"""Several records as one, on their way through a SuperLink.

Flower fetches and pushes every record of a message by a call of its own, each signed, of about
800 bytes: between a coordinator and its partners a message holds a single record of bytes.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from fedipfs.errors import EdgeError
from fedipfs.exchange.heart import MAX_MESSAGE
from fedipfs.flower_compat import records_from_bytes, records_to_bytes

_KEY, _FIELD = "packed", "records"
_MOST = 2 * MAX_MESSAGE  # bytes, with Flower's own around names and values


def pack(content: RecordDict) -> RecordDict:
    """One record that holds `content`."""
    return RecordDict({_KEY: ConfigRecord({_FIELD: records_to_bytes(content)})})


def unpack(content: RecordDict) -> RecordDict:
    """Inverse of `pack`; what is not packed as it is. Raises EdgeError."""
    record = content.get(_KEY)
    if len(content) != 1 or not isinstance(record, ConfigRecord):
        return content
    data = record.get(_FIELD)
    if not isinstance(data, bytes) or len(data) > _MOST:
        raise EdgeError("the message's only record is not one of packed records")
    try:
        return records_from_bytes(data)
    except Exception as error:  # protobuf and Flower have no one class for what may be wrong
        raise EdgeError(f"packed records cannot be read ({type(error).__name__})") from error
