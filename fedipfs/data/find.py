"""From what `data.path` names, files, folders and patterns, to the files to read."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedipfs.errors import ConfigError, DataError

_PACKED = ("", ".gz", ".bz2", ".xz", ".zst", ".zip")
SUFFIXES = {
    "csv": tuple(f"{name}{packed}" for name in (".csv", ".tsv") for packed in _PACKED),
    "parquet": (".parquet", ".pq"),
    "json": tuple(f"{name}{pack}" for name in (".json", ".jsonl", ".ndjson") for pack in _PACKED),
    "arrow": (".arrow", ".feather", ".ipc"),
    "numpy": (".npz", ".npy"),
    "hdf5": (".h5", ".hdf5", ".hdf"),
    "images": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"),
}


def place(key: str, value: object, base: Path) -> tuple[str, ...]:
    """The files, folders or patterns that the setting `key` names, as absolute paths.

    Raises ConfigError, also for whatever is not on this machine: nothing is fetched.
    """
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ConfigError(f"{key} is an empty list; name a file, a folder or a pattern")
    found = []
    for entry in entries:
        if not isinstance(entry, str) or not entry.strip() or "\0" in entry:
            raise ConfigError(f"{key}={entry!r:.80} should be a path, or a list of them")
        if "://" in entry or "::" in entry:
            raise ConfigError(f"{key}={entry!r:.200}: only files of this machine are read")
        try:
            found.append(str(base / Path(entry).expanduser()))
        except RuntimeError as error:  # ~somebody
            raise ConfigError(f"{key}={entry!r:.80}: {error}") from None
    return tuple(found)


def files(key: str, places: Sequence[str], form: str) -> list[Path]:
    """The files at `places`, each once, in the order of their paths.

    Of a folder they are those with a suffix of the format `form`, however deep; names that begin
    with a dot are left out. Raises DataError where there is none.
    """
    found: set[Path] = set()
    for each in places:
        matches = [each] if os.path.exists(each) else glob.glob(each, recursive=True)
        chosen = [path for match in matches for path in _below(Path(match), form)]
        if not chosen:
            what = "there is no such file or folder"
            if matches:
                what = f"it holds no file of the format {form} ({', '.join(SUFFIXES[form])})"
            raise DataError(f"{key}: {each}: {what}")
        found.update(chosen)
    for path in found:
        if "::" in str(path):  # which the libraries below take for a path within an archive
            raise DataError(f"{path}: '::' in the path of a file is not supported; rename it")
    return sorted(found)


def _below(path: Path, form: str) -> Iterable[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, names, leaves in os.walk(path):
        names[:] = [name for name in names if not name.startswith(".")]
        for leaf in leaves:
            if leaf.lower().endswith(SUFFIXES[form]) and not leaf.startswith("."):
                yield Path(folder, leaf)
