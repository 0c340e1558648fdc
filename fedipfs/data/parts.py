"""Examples to train and to test on, put together from the rows that the readers give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedipfs.data import columns
from fedipfs.data.base import Examples, Labels
from fedipfs.data.blocks import Block
from fedipfs.data.columns import BadValue
from fedipfs.data.filters import Filter
from fedipfs.data.pictures import Pictures
from fedipfs.data.section import Fold
from fedipfs.errors import DataError

Mask = NDArray[np.bool_]


class Parts:
    """Give it blocks in order; `rows`, `filtered` and `unassigned` count their rows.

    `classes`: the labels' names, None for whole numbers; otherwise as in Source.
    """

    def __init__(
        self,
        inputs: str | tuple[str, ...],
        target: str,
        classes: tuple[str, ...] | None,
        condition: Filter | None,
        fold: Fold | None,
    ) -> None:
        self._names, self._target, self._classes = inputs, target, classes
        self._filter, self._fold = condition, fold
        self._inputs: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
        self._targets: tuple[list[Labels], list[Labels]] = ([], [])
        self._shape: tuple[tuple[int, ...], Path] | None = None
        self.rows = self.filtered = self.unassigned = 0

    def add(self, block: Block, test: bool) -> None:
        """The rows of `block` that the filter keeps; `test`: to test on, where no column says it.

        Raises DataError. Values of rows that are not used may be anything.
        """
        if not block.count:
            return
        for which, chosen in enumerate(self._chosen(block, test)):
            rows = np.flatnonzero(chosen)
            if len(rows):
                self._inputs[which].append(self._converted(block, rows))
                self._targets[which].append(self._labelled(block, rows))

    def examples(self) -> tuple[Examples, Examples]:
        """Those to train and those to test on. Raises DataError where there is none to train on."""
        if not self._targets[0]:
            raise DataError(
                f"there are no examples to train on: of {self.rows} rows, data.filter leaves out "
                f"{self.filtered}, {sum(map(len, self._targets[1]))} are to test on, and "
                f"{self.unassigned} in no part of data.split"
            )
        kind = np.result_type(*(each.dtype for part in self._inputs for each in part))
        if kind == np.float64:  # of whole numbers in some files, and others elsewhere
            kind = np.dtype(np.float32)
        train, test = (
            Examples(_joined(inputs, kind), np.concatenate(targets)) if targets else None
            for inputs, targets in zip(self._inputs, self._targets, strict=True)
        )
        assert train is not None
        return train, test or Examples(train.inputs[:0], train.targets[:0])

    def _chosen(self, block: Block, test: bool) -> tuple[Mask, Mask]:
        """The rows to train and to test on."""
        self.rows += block.count
        keep = np.ones(block.count, np.bool_)
        if self._filter is not None:
            try:
                keep = self._filter.keep(block.columns.__getitem__)
            except DataError as error:
                raise DataError(f"{block.path}: {error}") from None
            self.filtered += int((~keep).sum())
        if self._fold is None:
            nothing = np.zeros_like(keep)
            return (nothing, keep) if test else (keep, nothing)
        name = self._fold.column
        try:
            column = block.columns[name]
            train = keep & columns.among(column, self._fold.train)
            tested = keep & columns.among(column, self._fold.test)
        except BadValue as error:
            raise _refused(block, error.row, name, error) from None
        self.unassigned += int((keep & ~train & ~tested).sum())
        return train, tested

    def _converted(self, block: Block, rows: NDArray[np.int64]) -> NDArray[Any]:
        name = ""
        try:
            if isinstance(self._names, str):
                name = self._names
                column = block.columns[name]
                if isinstance(column, Pictures):
                    found = column.read(rows)
                else:
                    found = columns.values(columns.take(column, rows))
            else:
                found = np.empty((len(rows), len(self._names)), np.float32)
                for i, each in enumerate(self._names):
                    name = each
                    found[:, i] = columns.numbers(columns.take(block.columns[name], rows))
        except BadValue as error:
            raise _refused(block, int(rows[error.row]), name, error) from error
        shape = found.shape[1:]
        if self._shape is None:
            self._shape = shape, block.path
        elif shape != self._shape[0]:
            raise DataError(
                f"{block.path}: {name} has the shape {shape} a row, and in {self._shape[1]} "
                f"{self._shape[0]}; all rows must have the same"
            )
        return found

    def _labelled(self, block: Block, rows: NDArray[np.int64]) -> Labels:
        name = self._target
        try:
            return columns.labels(columns.take(block.columns[name], rows), self._classes)
        except BadValue as error:
            raise _refused(block, int(rows[error.row]), name, error) from error


def _refused(block: Block, row: int, name: str, error: Exception) -> DataError:
    where = block.where(row)
    return DataError(f"{where}: {error}" if block.names else f"{where}, {name}: {error}")


def _joined(parts: list[NDArray[Any]], kind: Any) -> NDArray[Any]:
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    parts.clear()
    return np.ascontiguousarray(whole, dtype=kind)
