"""Keys of private IPFS networks (libp2p pre-shared key, version 1)."""

from __future__ import annotations

import secrets


def new_swarm_key() -> str:
    """The text of a fresh `swarm.key`: nodes connect only to nodes that hold the same 32 bytes."""
    return f"/key/swarm/psk/1.0.0/\n/base16/\n{secrets.token_hex(32)}\n"
