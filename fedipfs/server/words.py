"""The words of a command line as Hydra composes them, and what is wrong with them in our own."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedipfs.errors import ConfigError
from fedipfs.server.known import unknown


def quoted(words: list[str]) -> list[str]:
    """The words, with quotes where Hydra would take a choice for a number: attack=nan."""
    return [
        re.sub(r"(?<=[=,])nan(?=,|$)", "'nan'", word) if word.startswith("attack=") else word
        for word in words
    ]


def resolved(config: DictConfig) -> dict[str, Any]:
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}; correct that value") from None
    return dict(values)


def problem_of(error: Exception) -> str:
    """What Hydra found wrong with the command line, in our words."""
    first = str(error).split(" See https:")[0].splitlines()[0]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = list(error.options or ())
        near = get_close_matches(name, options, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ";"
        known = f"{hint} choose one of: {', '.join(options)}" if options else ""
        return f"unknown {group or 'configuration'} '{name}'{known}"
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read '{error.override}' ({first}); write key=value, and quotes around a "
            "value with special characters: 'key=\"a, b\"'"
        )
    if found := re.search(r"No match in the defaults list.* use (\S+)", str(error), re.S):
        return f"{found[1].lstrip('+').partition('=')[0]} is added, not changed: {found[1]}"
    if found := re.search(r"already at '.*remove \+ prefix: '(.*?)'", str(error), re.S):
        return f"{found[1].partition('=')[0]} is a setting already; leave out the plus: {found[1]}"
    if found := re.match(r"Multiple values for (\S+)\.", str(error)):
        return f"{found[1]} is given more than once; leave one of them"
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", str(error)):
        return unknown(found[1])
    return " ".join(str(error).split())
