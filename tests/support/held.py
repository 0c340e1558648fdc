"""A task whose training a test can hold, so that it knows when a round is under way."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from sized import Sized
from torch import Tensor

_LOOK_S = 0.02


class Held(Sized):
    """As Sized. A party trains as long as there is a file `hold` in its folder: see Hold."""

    def inputs(self, array: NDArray[Any]) -> Tensor:
        """As Sized, when the party may go on."""
        if "FEDIPFS_HOME" in os.environ:
            Hold(Path(os.environ["FEDIPFS_HOME"])).wait()
        return super().inputs(array)


class Hold:
    """Holds what trains for the party whose FEDIPFS_HOME is `home`."""

    def __init__(self, home: Path) -> None:
        self._order, self._state = home / "hold", home / "held"

    def begin(self, after: int = 0) -> None:
        """Hold training, after it was done `after` times more."""
        self._state.unlink(missing_ok=True)
        self._write(after)

    def end(self) -> None:
        """Let it go on."""
        self._order.unlink(missing_ok=True)

    @property
    def reached(self) -> bool:
        """Whether something is held."""
        return self._state.exists()

    def wait(self) -> None:
        """At the party: return when it may go on."""
        try:
            left = int(self._order.read_text())
        except FileNotFoundError:
            return
        if left > 0:
            self._write(left - 1)
            return
        self._state.touch()
        while self._order.exists():
            time.sleep(_LOOK_S)
        self._state.unlink(missing_ok=True)

    def _write(self, count: int) -> None:
        new = self._order.with_suffix(".new")
        new.write_text(str(count))
        new.replace(self._order)
