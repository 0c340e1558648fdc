"""What a site demands of every secure aggregation that it takes part in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedipfs.errors import BelowFloor
from fedipfs.secagg.parameters import MIN_CLIENTS, Parameters


@dataclass(frozen=True)
class Floors:
    """Lower limits of a site's own, which no coordinator can change.

    clients, threshold, neighbours, colluders   as in Parameters, at least
    clip, bits                                  from (least) to (most)
    parameters                                  the only hash to accept (32 bytes), or None
    """

    clients: int = MIN_CLIENTS
    threshold: int = 2
    neighbours: int = 2
    colluders: int = 0
    clip: tuple[float, float] = (0.0, math.inf)
    bits: tuple[int, int] = (1, 32)
    parameters: bytes | None = None

    def check(self, found: Parameters) -> None:
        """Raises BelowFloor, naming what is too low and what was demanded."""
        for name in ("clients", "threshold", "neighbours", "colluders"):
            least, value = getattr(self, name), getattr(found, name)
            if value < least:
                raise BelowFloor(f"{name}={value}: this site demands at least {least}")
        for name in ("clip", "bits"):
            (least, most), value = getattr(self, name), getattr(found, name)
            if not least <= value <= most:
                raise BelowFloor(f"{name}={value}: this site demands {least} to {most}")
        if self.parameters is not None and found.digest() != self.parameters:
            raise BelowFloor(
                f"the parameters' hash is {found.digest().hex()}: this site has pinned "
                f"{self.parameters.hex()}"
            )
