"""What is sealed in a store, opened for whoever has a key."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedipfs.cli.keys import load_identity
from fedipfs.errors import DagCborError, EnvelopeError
from fedipfs.ipld import CID, dagcbor
from fedipfs.trust import is_sealed, open_stream


def opened(cid: CID, pieces: Iterator[bytes], identity: Path | None) -> tuple[Iterator[bytes], Any]:
    """A file's content, opened if it is sealed; of a sealed record, its value, too."""
    first = next(pieces, b"")
    pieces = itertools.chain((first,), pieces)
    if not is_sealed(first):
        return pieces, None
    if identity is None:
        raise EnvelopeError(
            f"{cid} is sealed: name the key file of one who may read it (--identity "
            "runs/RUN/keys/coordinator.key opens what a run sealed), or take the sealed bytes "
            "with --raw"
        )
    return _record_in(open_stream(pieces, load_identity(identity)))


def _record_in(content: Iterator[bytes]) -> tuple[Iterator[bytes], Any]:
    """The same content, and the record that it is, if it is one: a whole DAG-CBOR map."""
    held = bytearray()
    for piece in content:
        held += piece
        is_map = not held or held[0] >> 5 == 5  # RFC 8949
        if not is_map or len(held) > dagcbor.MAX_BLOCK:
            return itertools.chain((bytes(held),), content), None
    try:
        return iter((bytes(held),)), dagcbor.decode(bytes(held))
    except DagCborError:
        return iter((bytes(held),)), None
