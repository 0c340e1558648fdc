"""What a site demands of secure aggregation, in its node's configuration: out of others' reach.

secagg-required         true: what this site learns leaves under masks, or not at all
secagg-min-clients      of a cohort; as the next three: of its parameters, at least
secagg-min-threshold
secagg-min-neighbours
secagg-min-colluders
secagg-clip-min         what a value may change by, from
secagg-clip-max         to
secagg-parameters       the hash of the only terms to accept: the coordinator shows it
secagg-journal          folder of this client's journals; $XDG_STATE_HOME/fedipfs/secagg without
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedipfs.errors import BelowFloor, ConfigError
from fedipfs.secagg import Floors

_HASH = re.compile("[0-9a-f]{64}")
_LEAST = ("clients", "threshold", "neighbours", "colluders")
_KEYS = {
    "secagg-required": (bool,),
    **{f"secagg-min-{name}": (int,) for name in _LEAST},
    "secagg-clip-min": (int, float),
    "secagg-clip-max": (int, float),
    "secagg-parameters": (str,),
    "secagg-journal": (str,),
}


@dataclass(frozen=True)
class Demands:
    """`floors` of sessions, whether an update may leave without one, and where journals are."""

    required: bool
    floors: Floors
    journals: Path

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Demands:
        """Raises ConfigError for what is not as above: a demand that is misspelt is not dropped."""
        given = {key: node[key] for key in node if key.startswith("secagg-")}
        for key, value in given.items():
            if key not in _KEYS:
                raise ConfigError(f"node configuration: {key} is no demand; use {', '.join(_KEYS)}")
            if type(value) not in _KEYS[key]:
                kinds = " or ".join(kind.__name__ for kind in _KEYS[key])
                raise ConfigError(f"node configuration: {key}={value!r:.80} should be {kinds}")
        pinned = given.get("secagg-parameters")
        if pinned is not None and not _HASH.fullmatch(pinned):
            raise ConfigError(
                f"node configuration: secagg-parameters={pinned!r:.80} should be 64 digits of "
                "lower-case hex"
            )
        clip = (given.get("secagg-clip-min", 0.0), given.get("secagg-clip-max", math.inf))
        least = {
            name: given[f"secagg-min-{name}"] for name in _LEAST if f"secagg-min-{name}" in given
        }
        floors = Floors(
            **least, clip=clip, parameters=None if pinned is None else bytes.fromhex(pinned)
        )
        return cls(
            bool(given.get("secagg-required")), floors, Path(given.get("secagg-journal") or _home())
        )

    def refuse_plain(self, what: str) -> None:
        """BelowFloor where `what` would leave this site as it is."""
        if self.required:
            raise BelowFloor(f"{what} leaves this site under masks or not at all: use secagg=on")


def _home() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "fedipfs" / "secagg"
