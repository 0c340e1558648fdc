"""The section `data` of a site.yaml: its keys, checked one by one. Nothing is read here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from fedipfs.data import find
from fedipfs.errors import ConfigError, one_line

FORMATS = tuple(find.SUFFIXES)
KEYS = ("format", "path", "inputs", "target", "classes", "filter", "split", "size", "mode")
IMAGE, LABEL = "image", "label"  # what the columns are called where there are none: of images
MODES = ("L", "RGB")
_MOST_PIXELS = 16384  # a side
_INFERRED = re.compile(r"-?(0|[1-9][0-9]*)|true|false")  # what a CSV file does not hold as text


class Fold(NamedTuple):
    """Rows by what is in `column`: `train` and `test` are values as text, "3" for 3."""

    column: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def known(found: object, keys: Sequence[str], where: str) -> None:
    """ConfigError unless `found` is a mapping with no other keys than `keys`."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}={found!r:.80} should be a section with keys of its own")
    for key in found:
        if key not in keys:
            near = get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {where}.{near[0]}?" if near else f"use {', '.join(keys)}"
            raise ConfigError(f"{where}.{one_line(key, 80)} is not known; {hint}")


def form(given: Mapping[str, Any]) -> str:
    """One of FORMATS."""
    found = given.get("format")
    if found not in FORMATS:
        near = get_close_matches(str(found), FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(FORMATS)}"
        raise ConfigError(f"data.format={found!r:.80} is unknown; {hint}")
    return str(found)


def places(
    given: Mapping[str, Any], base: Path, by_path: bool
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Where the files to train and to test on are; None: among the former."""
    if by_path == ("path" in given):
        raise ConfigError(
            "data.path and the paths in data.split exclude each other; set one of them to null"
            if by_path
            else "data.path is missing; name a file, a folder or a pattern, as data/*.csv"
        )
    if not by_path:
        return find.place("data.path", given["path"], base), None
    split = given["split"]
    known(split, ("column", "train", "test"), "data.split")
    if split.get("train") is None:
        raise ConfigError("data.split.train is missing; name the files to train on")
    train = find.place("data.split.train", split["train"], base)
    if split.get("test") is None:
        return train, None
    return train, find.place("data.split.test", split["test"], base)


def roles(form: str, given: Mapping[str, Any]) -> tuple[str | tuple[str, ...], str]:
    """The columns that are inputs, and the one with the label."""
    if form == "images":
        for key in ("inputs", "target"):
            if key in given:
                raise ConfigError(
                    f"data.{key} should be null for images: the label is the folder's name"
                )
        return IMAGE, LABEL
    for key in ("inputs", "target"):
        if key not in given:
            raise ConfigError(f"data.{key} is missing; name the column or array")
    target = _name("data.target", given["target"])
    if not isinstance(given["inputs"], list | tuple):
        inputs: str | tuple[str, ...] = _name("data.inputs", given["inputs"])
    else:
        inputs = tuple(_name("data.inputs", each) for each in given["inputs"])
        if not inputs:
            raise ConfigError("data.inputs is an empty list; name the columns")
        if twice := next((each for each in inputs if inputs.count(each) > 1), None):
            raise ConfigError(f"data.inputs names {twice!r} twice")
    if target == inputs or (isinstance(inputs, tuple) and target in inputs):
        raise ConfigError(f"data.target={target}: the label is among data.inputs, too")
    return inputs, target


def _name(key: str, value: object) -> str:
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value:
        hint = "; write it in quotes" if isinstance(value, bool) else ""
        raise ConfigError(f"{key}={value!r:.80} should be the name of a column{hint}")
    return value


def _texts(key: str, value: object) -> tuple[str, ...]:
    """Labels as texts: YAML has numbers and truth values among them."""
    found = []
    for each in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(each, str | int):
            raise ConfigError(f"{key}: {each!r:.80} should be a name or a whole number")
        found.append(str(each).lower() if isinstance(each, bool) else str(each))
    if not found:
        raise ConfigError(f"{key} is an empty list")
    if twice := next((each for each in found if found.count(each) > 1), None):
        raise ConfigError(f"{key} names {twice!r:.80} twice")
    return tuple(found)


def classes(value: object) -> tuple[str, ...] | None:
    """The labels' names, as texts."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ConfigError(f"data.classes={value!r:.80} should be a list, as [benign, malignant]")
    return _texts("data.classes", value)


def fold(form: str, split: object) -> Fold:
    """The column that divides the rows."""
    if form == "images":
        raise ConfigError("data.split: images have no columns; use {train: PATH, test: PATH}")
    known(split, Fold._fields, "data.split")
    assert isinstance(split, Mapping)
    if split.get("train") is None:
        raise ConfigError("data.split.train is missing; list the values of the rows to train on")
    train = _texts("data.split.train", split["train"])
    test = () if split.get("test") is None else _texts("data.split.test", split["test"])
    if both := sorted(set(train) & set(test)):
        raise ConfigError(f"data.split: {both[0]!r:.80} is both in train and in test")
    return Fold(_name("data.split.column", split["column"]), train, test)


def size(form: str, given: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of images, None as they are."""
    found = given.get("size")
    if found is None:
        return None
    if form != "images":
        raise ConfigError(f"data.size is for images, not for {form}")
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise ConfigError(f"data.size={found!r:.80} should be [height, width] in pixels")
    for each in found:
        if type(each) is not int or not 1 <= each <= _MOST_PIXELS:
            raise ConfigError(f"data.size: {each!r:.80} should be from 1 to {_MOST_PIXELS} pixels")
    return found[0], found[1]


def mode(form: str, given: Mapping[str, Any]) -> str | None:
    """One of MODES, None as the images are."""
    found = given.get("mode")
    if found is not None and form != "images":
        raise ConfigError(f"data.mode is for images, not for {form}")
    if found is not None and found not in MODES:
        raise ConfigError(f"data.mode={found!r:.80} should be L (grey) or RGB (colour)")
    return found


def are_texts(values: Sequence[str]) -> bool:
    """Whether one of `values` is what a CSV file can only hold as text."""
    return not all(map(_INFERRED.fullmatch, values))
