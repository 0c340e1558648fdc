"""The store of this process, and the keys with it, for apps that name none.

$FEDIPFS_STORE        the store (see open_store); ./runs/store without it
$FEDIPFS_IDENTITY     this party's file of private keys; its passphrase is $FEDIPFS_PASSPHRASE
$FEDIPFS_TRUST        its trust list
$FEDIPFS_SEAL         what is sealed: none, updates or all; by default all where the store is shared
$FEDIPFS_UNSEALED_BECAUSE   why nothing is sealed in a shared store, if nothing is
"""

from __future__ import annotations

import os
from functools import lru_cache

from fedipfs.errors import ConfigError
from fedipfs.exchange.vault import Vault, choose_seal, explicit
from fedipfs.store import Store, is_shared, open_store
from fedipfs.trust import Identity, Role
from fedipfs.trust.party import Party

DEFAULT = "runs/store"
_chosen: list[Vault] = []


def use_store(store: Store | Vault) -> None:
    """Make `store`, or a vault over it, the one that CidGrid and cid_mod use in this process.

    Raises ConfigError for a bare store that others can read.
    """
    _chosen[:] = [explicit(store)]


def default_vault(role: Role) -> Vault:
    """What was given to `use_store`, else what the environment names."""
    return _chosen[0] if _chosen else _open(role, *map(os.environ.get, _VARIABLES))


_VARIABLES = (
    "FEDIPFS_STORE",
    "FEDIPFS_IDENTITY",
    "FEDIPFS_TRUST",
    "FEDIPFS_SEAL",
    "FEDIPFS_UNSEALED_BECAUSE",
)


@lru_cache(maxsize=8)
def _open(
    role: Role,
    spec: str | None,
    identity: str | None,
    trust: str | None,
    seal: str | None,
    because: str | None,
) -> Vault:
    spec = spec or DEFAULT
    mode = choose_seal(seal, shared=is_shared(spec), because=because)
    if not identity or not trust:
        if identity or trust or mode != "none":
            raise ConfigError(
                f"seal={mode} for the store {spec} needs the keys of this party: set "
                "FEDIPFS_IDENTITY and FEDIPFS_TRUST (`fedipfs keys new`, `fedipfs keys trust`)"
            )
        return Vault(open_store(spec))
    return Vault(open_store(spec), Party(Identity.unlock(identity), role, trust), mode)
