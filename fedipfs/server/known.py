"""What settings there are: those of conf/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from fedipfs.errors import ConfigError

# What every choice of a group has.
_GROUPS: dict[str, tuple[str, ...]] = {
    "task": ("name", "target", "options", "metric", "direction"),
    "strategy": ("name",),
    "store": ("kind",),
    "engine": ("name", "timeout_s"),
    "compression": ("name",),
    "attack": ("name",),
    "privacy": ("name",),
    "secagg": ("name",),
}
# Sections whose options are those of a class; conf/ need not list them all.
_OPEN = ("train.optimizer", "train.schedule", "task.options", "strategy", "store")


def whole(config: Mapping[str, Any]) -> None:
    """ConfigError unless the sections and settings of conf/ are there, and no others."""
    expected = {**defaults(), **_GROUPS}
    keys(config, expected, "")
    for section, inside in expected.items():
        if not isinstance(inside, Mapping | tuple):
            continue
        if not isinstance(config[section], Mapping):
            raise ConfigError(
                f"{section}={config[section]} takes the place of a whole section; set what is in "
                f"it, as {section}.{next(iter(inside))}=..."
            )
        keys(config[section], inside, f"{section}.")


def keys(given: Mapping[str, Any], expected: Mapping[str, Any] | tuple[str, ...], at: str) -> None:
    for key in expected:
        if key not in given:
            raise ConfigError(f"the setting {at}{key} is missing; give it a value")
    for key in given if isinstance(expected, Mapping) else ():
        if key not in expected:
            raise ConfigError(unknown(at + key))


def unknown(key: str) -> str:
    """What to say of a setting, dotted, that there is not: the nearest one, or how to add it."""
    known = dict(_known())
    if known.get(key):
        return f"{key} is no setting with these choices; it comes with {known[key]}"
    parent, _, last = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    same_last = [k for k in known if k.rpartition(".")[2] == last and k != key]
    same_last.sort(key=lambda k: known[k] != "")  # those that every run has come first
    near = [beside[name] for name in get_close_matches(last, beside, n=1)] or same_last
    if not beside:
        near = near or get_close_matches(key, known, n=1)
    if near:
        remedy = f"did you mean '{near[0]}'?"
    elif parent in _OPEN:
        remedy = f"to add it as an option: +{key}=VALUE"
    else:
        remedy = "--help lists all"
    return f"unknown setting '{key}'; {remedy}"


def _known() -> Iterator[tuple[str, str]]:
    """Every setting in conf/, dotted, with a choice that has it ("" if it is always there)."""
    for group in _GROUPS:
        for file in sorted(files("fedipfs.conf").joinpath(group).iterdir(), key=lambda f: f.name):
            name = file.name.removesuffix(".yaml")
            for key in _dotted(defaults(f"{group}/{file.name}"), f"{group}."):
                yield key, f"{group}={name}"
    for key in _dotted(defaults()):
        yield key, ""


def _dotted(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@cache
def defaults(name: str = "config.yaml") -> dict[str, Any]:
    """A file of conf/ as it stands, without what is Hydra's own."""
    text = files("fedipfs.conf").joinpath(name).read_text(encoding="utf-8")
    return {k: v for k, v in yaml.safe_load(text).items() if k not in ("defaults", "hydra")}
