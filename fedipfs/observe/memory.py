"""How much memory this process has needed."""

from __future__ import annotations

import resource
import sys
import time
from functools import lru_cache


def peak_rss() -> int:
    """Largest resident size so far, in bytes; at most a second old, as asking takes time."""
    return _peak_rss(int(time.monotonic()))


@lru_cache(maxsize=1)
def _peak_rss(second: int) -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
