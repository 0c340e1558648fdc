"""How much memory this process has needed."""

from __future__ import annotations

import resource
import sys


def peak_rss() -> int:
    """Largest resident size so far, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
