"""Some rows of a file, as every reader gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from fedipfs.errors import DataError, one_line


class Wanted(NamedTuple):
    """The columns to read, and those of them whose cells are text whatever they look like."""

    columns: tuple[str, ...]
    as_text: frozenset[str]


@dataclass(frozen=True, eq=False)
class Block:
    """`count` rows, the file's `first` (from 1) and those after it.

    `columns` holds by name: an Arrow array with a value a row, a NumPy array (count, ...), or
    Pictures. `names`: where each row is a file of its own, these.
    """

    path: Path
    first: int
    count: int
    columns: Mapping[str, Any]
    names: Sequence[Path] | None = None

    def where(self, row: int) -> str:
        """What messages call the row at the index `row` of this block."""
        return str(self.names[row]) if self.names else f"{self.path}, row {self.first + row}"


def check_columns(path: Path, there: Sequence[str], wanted: Iterable[str]) -> None:
    """DataError unless each of the `wanted` columns is there once."""
    counts = Counter(there)
    for name in wanted:
        if counts[name] > 1:
            raise DataError(f"{path} has {counts[name]} columns called {name!r}; rename them")
        if not counts[name]:
            near = get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {listed(there)}"
            raise DataError(f"{path} has no column {name!r}; {hint}")


def listed(names: Collection[str], most: int = 12) -> str:
    """`names` for a message."""
    some = ", ".join(one_line(name, 40) for name in list(names)[:most])
    return (some or "none") + (f" and {len(names) - most} more" if len(names) > most else "")
