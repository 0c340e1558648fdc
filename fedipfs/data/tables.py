"""CSV, Parquet, JSON and Arrow files, through Hugging Face's `datasets`, read as a stream.

So nothing is copied to a cache. Every file is read by itself: types are inferred anew, and a
message can name file and row. The library takes no part in finding files: it would look for
archives and other hosts in their names.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedipfs.data.blocks import Block, Wanted, check_columns
from fedipfs.data.columns import plain
from fedipfs.errors import DataError, one_line

ROWS = 10_000  # at a time, fewer where they are wide
_CELLS = 2**19  # of more, pandas may make numbers of one part of a column and texts of another
_SEPARATORS = ",;\t|"
_MISSING = [  # what stands for no number in a CSV file
    *("", "NA", "N/A", "n/a", "<NA>", "#N/A", "#N/A N/A", "#NA", "NaN", "nan", "-NaN", "-nan"),
    *("NULL", "null", "None", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
]


def blocks(form: str, paths: Sequence[Path], wanted: Wanted) -> Iterator[Block]:
    """All rows of the files, in order. Raises DataError."""
    with tempfile.TemporaryDirectory(prefix="fedipfs-") as cache:  # the library writes a lock there
        for path in paths:
            first = 1
            for table in _guarded(path, form, partial(_READERS[form], path, wanted, cache)):
                check_columns(path, table.column_names, wanted.columns)
                columns = {name: plain(table.column(name)) for name in wanted.columns}
                yield Block(path, first, table.num_rows, columns)
                first += table.num_rows


def _guarded(path: Path, form: str, read: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """The tables that `read` gives; whatever goes wrong meanwhile is a DataError with the path."""
    from pandas.errors import ParserWarning

    if path.is_file() and not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: no permission")
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{path} is empty")
    tables: Iterator[Any] | None = None
    while True:
        try:
            with warnings.catch_warnings(), _quiet():
                warnings.simplefilter("error", ParserWarning)  # more cells in a row than columns
                tables = tables or iter(read())
                table = next(tables, None)
        except DataError:
            raise
        except Exception as error:  # whatever the libraries make of a file
            raise DataError(f"{path} cannot be read as {form} ({_reason(error)})") from error
        if table is None:
            return
        yield table


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text; convert it"
    text = one_line(error, 200)
    if "loss of data with index_col" in text:
        return "a row has more cells than there are columns"
    return text or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own account of an error that is raised anyway."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stream(
    form: str, path: Path, cache: str, *, rows: int = ROWS, **options: Any
) -> Iterator[Any]:
    """Arrow tables of some rows each. The package set HF_DATASETS_OFFLINE when it was imported."""
    from datasets import load_dataset
    from datasets.data_files import DataFilesList

    files = {"train": DataFilesList([str(path)], [()])}
    found = load_dataset(
        form, data_files=files, split="train", streaming=True, cache_dir=cache, **options
    )
    yield from found.with_format("arrow").iter(batch_size=rows)


def _csv(path: Path, wanted: Wanted, cache: str) -> Iterator[Any]:
    header, separator = _header(path, wanted.columns)
    check_columns(path, header, wanted.columns)
    rows = max(1, min(ROWS, _CELLS // len(header)))
    return _stream(
        "csv",
        path,
        cache,
        rows=rows,
        sep=separator,
        # A row that is too long may not shift the others.
        index_col=False,
        chunksize=rows,
        keep_default_na=False,
        na_values={name: [""] if name in wanted.as_text else _MISSING for name in wanted.columns},
        converters=dict.fromkeys(wanted.as_text, str),
    )


def _header(path: Path, wanted: Sequence[str]) -> tuple[list[str], str]:
    """The names of a CSV file's columns, and the separator with which most of `wanted` are there.

    pandas would give the second of two columns with one name another one.
    """
    import pandas as pd

    found = []
    for separator in _SEPARATORS:
        row = pd.read_csv(
            path,
            sep=separator,
            header=None,
            index_col=False,
            nrows=1,
            dtype=str,
            keep_default_na=False,
        )
        names = [str(name) for name in row.iloc[0]]
        found.append((names, separator))
        if set(wanted) <= set(names):
            break
    return max(found, key=lambda each: len(set(wanted) & set(each[0])))


def _parquet(path: Path, wanted: Wanted, cache: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    schema = pq.read_schema(path)
    check_columns(path, schema.names, wanted.columns)
    # Without the metadata: images and class names that it may speak of are no business of ours.
    part = pa.schema([(name, schema.field(name).type) for name in wanted.columns])
    return _stream(
        "parquet",
        path,
        cache,
        batch_size=ROWS,
        columns=list(wanted.columns),
        features=Features.from_arrow_schema(part),
    )


def _json(path: Path, wanted: Wanted, cache: str) -> Iterator[Any]:
    import fsspec

    with fsspec.open(str(path), "rb", compression="infer") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"["):
            stream.seek(0)
            return _array(stream.read())
    # All of it at once: a type that a later part does not have would be an error.
    return _stream("json", path, cache, chunksize=-1, on_mixed_types=None)


def _array(text: bytes) -> Iterator[Any]:
    """A JSON array of objects as a table. The library's way would round to ten decimals."""
    import pyarrow.json

    rows = json.loads(text.decode("utf-8-sig"))
    if not rows:
        return
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    options = pyarrow.json.ReadOptions(block_size=len(lines) + 1)
    yield pyarrow.json.read_json(io.BytesIO(lines), read_options=options)


def _arrow(path: Path, wanted: Wanted, cache: str) -> Iterator[Any]:
    return _stream("arrow", path, cache)


_READERS: dict[str, Callable[[Path, Wanted, str], Iterator[Any]]] = {
    "csv": _csv,
    "parquet": _parquet,
    "json": _json,
    "arrow": _arrow,
}
