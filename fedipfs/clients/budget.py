"""The privacy ledger that a site's policy asks for."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fedipfs.clients.policy import Policy
from fedipfs.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from fedipfs.privacy.ledger import Ledger

log = logging.getLogger(__name__)


def open_ledger(
    policy: Policy, folder: str | os.PathLike[str], fingerprint: str, *, data: str = "these data"
) -> Ledger | None:
    """The ledger of a site's data, as its policy caps it; None where that has no `privacy`.

    It is begun if `folder` has none at all. If there is one with a larger cap, the policy's counts
    from now on. Raises ConfigError if the policy allows more than the ledger, and LedgerError
    if there are ledgers, but none for these records: they may be a new version of others, and what
    those have spent is spent. Both name the command that helps. `data` says what the data are.
    """
    if policy.privacy is None:
        return None
    from fedipfs.privacy.ledger import Cap, Ledger, find, ledgers  # they take SciPy along

    epsilon, delta = policy.privacy
    where = shlex.quote(os.fspath(folder))
    found = find(folder, fingerprint)
    if found is None:
        if others := ledgers(folder):
            command = f"fedipfs privacy {{}} --ledger {where}"
            raise LedgerError(
                f"{where} has a privacy ledger, but not for {data} ({fingerprint}): if they are "
                "another version of what has one, "
                f"`{command.format('adopt')} {others[0].fingerprint} {fingerprint}`; if no record "
                f"is in both, `{command.format('init')} {fingerprint} --epsilon {epsilon:g} "
                f"--delta {delta:g} --unrelated`"
            )
        return Ledger.create(Path(folder), fingerprint, Cap(epsilon, delta))
    cap = found.cap
    if epsilon > cap.epsilon or delta > cap.delta:
        raise ConfigError(
            f"policy.privacy allows epsilon {epsilon:g} at delta {delta:g}, and the ledger of "
            f"{data} only {cap}: lower it, or let the ledger allow more with `fedipfs privacy cap "
            f"--ledger {where} {found.fingerprint} --epsilon {epsilon:g} --delta {delta:g}`"
        )
    if (epsilon, delta) != (cap.epsilon, cap.delta):
        found.set_cap(Cap(epsilon, delta, cap.accountant))
        log.warning("the ledger of %s allows less now: %s (before: %s)", data, found.cap, cap)
    return found
