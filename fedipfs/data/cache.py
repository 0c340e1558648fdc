"""The user's cache folder, and arrays kept in it.

A cache is never needed: whatever is missing, damaged or cannot be written is computed again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def folder() -> Path:
    """`$XDG_CACHE_HOME/fedipfs`, or `~/.cache/fedipfs`; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "fedipfs"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` only when the block ends well; otherwise nothing stays.

    Raises OSError where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def arrays(path: Path, names: Iterable[str], compute: Callable[[], Arrays]) -> Arrays:
    """The arrays called `names`, from the `.npz` file at `path`, else computed and kept there."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    made: dict[str, Any] = dict(compute())
    with contextlib.suppress(OSError), replacing(path) as stream:
        np.savez(stream, **made)
    return made
