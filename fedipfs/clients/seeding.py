"""The seeds of the global random generators, before a client's app is called."""

from __future__ import annotations

import hashlib
import random
import sys

import numpy as np
from flwr.app import Message

from fedipfs.flower_compat import records_to_bytes


def seed_everything(seed: int, node: int, message: Message) -> None:
    """Make an app that draws from the global generators deterministic.

    The seed depends on what is asked of whom, not on when or by which worker. Where the round is
    known that is enough: CIDs of sealed content differ in every run.
    """
    digest = hashlib.sha256(f"{seed}/{node}/{message.metadata.message_type}/".encode())
    records = message.content.config_records.values()
    rounds = [record["server-round"] for record in records if "server-round" in record]
    digest.update(str(rounds).encode() if rounds else records_to_bytes(message.content))
    value = int.from_bytes(digest.digest()[:4], "little")
    random.seed(value)
    np.random.seed(value)
    if (torch := sys.modules.get("torch")) is not None:
        # torch.manual_seed takes 2 ms: it notes a stack trace for each accelerator.
        torch.default_generator.manual_seed(value)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(value)
