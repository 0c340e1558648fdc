"""Who may take part, who said what, and bytes that only some may read.

An `Identity` is an organization's two key pairs. A `TrustList` says whose public halves count,
as what and when. A `Statement` about a CID is signed by one of them; an envelope holds bytes
sealed to some of them. Nothing here knows a store, a model or Flower.
"""

from __future__ import annotations

from fedipfs.trust import envelope, statement
from fedipfs.trust.envelope import Opener, is_sealed, open_stream, seal
from fedipfs.trust.identity import Identity, PublicIdentity
from fedipfs.trust.statement import Statement, sign, verify
from fedipfs.trust.swarmkey import new_swarm_key
from fedipfs.trust.trustlist import Member, Role, TrustList

__all__ = [
    "Identity",
    "Member",
    "Opener",
    "PublicIdentity",
    "Role",
    "Statement",
    "TrustList",
    "envelope",
    "is_sealed",
    "new_swarm_key",
    "open_stream",
    "seal",
    "sign",
    "statement",
    "verify",
]
