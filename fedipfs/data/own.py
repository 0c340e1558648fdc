"""A partner's own data, as the section `data` of its site.yaml describes them.

Files of this machine are read, and nothing is kept of them elsewhere. Rows come in the order of
the files' paths and of the rows in them, so equal files give equal examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedipfs.data import find, section
from fedipfs.data.base import Dataset
from fedipfs.data.filters import Filter
from fedipfs.data.section import Fold
from fedipfs.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedipfs.data.blocks import Block, Wanted

NAME = "own"


@dataclass(frozen=True)
class Reading:
    """What was read. Of `rows` in `files`, `filtered` are left out by the filter, and `unassigned`
    are neither to train nor to test on; `classes` are the labels' names, None for numbers."""

    dataset: Dataset = field(repr=False)
    classes: tuple[str, ...] | None
    files: int
    rows: int
    filtered: int
    unassigned: int


@dataclass(frozen=True)
class Source:
    """The section `data`, checked.

    `train` are absolute paths of files and folders, or patterns; `test` likewise, or None where
    the files in `train` hold both. `inputs` is one column or array as it is, or several columns
    for float32 (N, k). `size` is (height, width), of images.
    """

    format: str
    train: tuple[str, ...]
    test: tuple[str, ...] | None
    inputs: str | tuple[str, ...]
    target: str
    classes: tuple[str, ...] | None = None
    filter: Filter | None = None
    fold: Fold | None = None
    size: tuple[int, int] | None = None
    mode: str | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any], base: Path) -> Source:
        """Relative paths are relative to `base`. Nothing is read. Raises ConfigError."""
        section.known(found, section.KEYS, "data")
        given = {key: value for key, value in found.items() if value is not None}
        form = section.form(given)
        split = given.get("split")
        by_path = isinstance(split, Mapping) and "column" not in split
        train, test = section.places(given, base, by_path)
        inputs, target = section.roles(form, given)
        condition = given.get("filter")
        if not isinstance(condition, str | None):
            raise ConfigError(f'data.filter={condition!r:.80} should be text, as "age >= 18"')
        rows = None if condition is None else Filter.parse(condition)
        if form == "images" and rows is not None and (more := rows.columns - {section.LABEL}):
            raise ConfigError(
                f"data.filter: images have no {min(more)!r}, only {section.LABEL!r}, the name of "
                "the folder"
            )
        return cls(
            format=form,
            train=train,
            test=test,
            inputs=inputs,
            target=target,
            classes=section.classes(given.get("classes")),
            filter=rows,
            fold=None if split is None or by_path else section.fold(form, split),
            size=section.size(form, given),
            mode=section.mode(form, given),
        )

    def load(self) -> Dataset:
        """The examples to train and to test on; of the latter there may be none.

        Raises DataError, with file, row and column where a value cannot be used; ConfigError where
        a library is missing that the format needs.
        """
        return self.read().dataset

    def read(self) -> Reading:
        """As `load`, with what became of the rows."""
        from fedipfs.data.parts import Parts

        key = "data.path" if self.test is None else "data.split.train"
        trained = find.files(key, self.train, self.format)
        tested = find.files("data.split.test", self.test or (), self.format)
        if both := sorted(set(trained) & set(tested)):
            raise DataError(f"{both[0]} is both in data.split.train and in data.split.test")
        names = self.classes
        if names is None and self.format == "images":
            from fedipfs.data import pictures

            names = pictures.classes([*trained, *tested], self.filter)
        parts = Parts(self.inputs, self.target, names, self.filter, self.fold)
        for paths, test in ((trained, False), (tested, True)):
            # Closed at once when something is wrong: it may have a temporary folder.
            with contextlib.closing(self._blocks(paths)) as blocks:
                for block in blocks:
                    parts.add(block, test)
        if not parts.rows:
            more = f" and {len(trained) - 1} other files" if trained[1:] else ""
            raise DataError(f"{key}: there is no row in {trained[0]}{more}")
        train, test_set = parts.examples()
        return Reading(
            dataset=Dataset(NAME, train, test_set),
            classes=names,
            files=len(trained) + len(tested),
            rows=parts.rows,
            filtered=parts.filtered,
            unassigned=parts.unassigned,
        )

    def _blocks(self, paths: Sequence[Path]) -> Generator[Block, None, None]:
        if not paths:
            return
        if self.format == "images":
            from fedipfs.data import pictures

            roots = {Path(each) for each in (*self.train, *(self.test or ()))}
            yield pictures.block(paths, roots, self.size, self.mode)
        elif self.format in ("numpy", "hdf5"):
            from fedipfs.data import arrays

            read = arrays.numpy_blocks if self.format == "numpy" else arrays.hdf5_blocks
            yield from read(paths, self._wanted())
        else:
            from fedipfs.data import tables

            yield from tables.blocks(self.format, paths, self._wanted())

    def _wanted(self) -> Wanted:
        from fedipfs.data.blocks import Wanted

        columns = [self.inputs] if isinstance(self.inputs, str) else list(self.inputs)
        columns.append(self.target)
        text: set[str] = set()
        if section.are_texts(self.classes or ()):
            text.add(self.target)
        if self.fold is not None:
            columns.append(self.fold.column)
            if section.are_texts((*self.fold.train, *self.fold.test)):
                text.add(self.fold.column)
        if self.filter is not None:
            # Where nothing says that it holds numbers, only an empty cell is missing.
            text |= self.filter.as_text | (self.filter.only_missing - set(columns))
            columns += sorted(self.filter.columns)
        return Wanted(tuple(dict.fromkeys(columns)), frozenset(text))
