"""site.yaml: what a partner says of its own data, of what may be done with them, and how.

It is written by `fedipfs-client init`, with a comment beside every value. Relative paths are
relative to its folder. Values may be given on the command line, too: `client.trainer=ddp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedipfs.clients.home import Home
from fedipfs.errors import ConfigError, one_line
from fedipfs.store.spec import is_shared, options_of

if TYPE_CHECKING:
    from fedipfs.clients.policy import Policy
    from fedipfs.data.own import Source
    from fedipfs.trust.joining import Federation

_SECTIONS = ("store", "seal", "data", "client", "policy", "node")
_PATHS = ("path", "credentials")  # of a store's options
MAX_FILE = 1 << 20  # bytes
TRAINERS = ("one", "ddp", "fsdp")
DEVICES = ("cpu", "cuda", "auto")


@dataclass(frozen=True)
class Client:
    """How this machine trains; see `client` in site.yaml."""

    trainer: str = "one"
    processes: int | None = None
    device: str | None = None
    threads: int | None = 1
    timeout_s: float = 600

    def __post_init__(self) -> None:
        _among("client.trainer", self.trainer, TRAINERS)
        if self.device is not None:
            _among("client.device", self.device, DEVICES)
        for name in ("processes", "threads"):
            _number(f"client.{name}", getattr(self, name), least=1, most=4096, whole=True)
        _number("client.timeout_s", self.timeout_s, least=1, most=7 * 86400, optional=False)


@dataclass(frozen=True)
class Node:
    """How the SuperNode runs; see `node` in site.yaml.

    `group`: the users in it may hand messages to the worker, where SuperNode and stub run as
    another user than the worker; null: only the worker's own user.
    """

    poll_s: float | None = None
    port: int | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        _number("node.poll_s", self.poll_s, least=0.05, most=3)
        _number("node.port", self.port, least=1, most=65535, whole=True)
        if self.group is not None and not isinstance(self.group, str):
            raise ConfigError(f"node.group={self.group!r:.80} is not the name of a group")


@dataclass(frozen=True)
class SiteFile:
    """A site's configuration, checked; `store` is as for open_store, with absolute paths."""

    path: Path
    home: Home
    store: dict[str, Any]
    seal: str | None
    client: Client
    node: Node
    sections: Mapping[str, Any]

    @classmethod
    def load(
        cls, path: Path | None = None, home: Home | None = None, overrides: Sequence[str] = ()
    ) -> SiteFile:
        """The file at `path`, by default that in `home`, with `overrides` such as "node.port=9094".

        Raises ConfigError.
        """
        home = home or Home.default()
        path = (path or home.site).absolute()
        return cls.of(_read(path), path, home, overrides)

    @classmethod
    def of(
        cls, found: Mapping[str, Any], path: Path, home: Home, overrides: Sequence[str] = ()
    ) -> SiteFile:
        """As `load`, of what the file at `path` holds."""
        values = _overridden(found, overrides, path)
        _known(values, _SECTIONS, path, "")
        if values.get("store") is None:
            raise ConfigError(f"{path}: store is missing; for a folder: store: {{path: store}}")
        seal = values.get("seal")
        if seal is not None:
            _among("seal", seal, ("none", "updates", "all"))
        return cls(
            path=path,
            home=home,
            store=_with_paths(options_of(values["store"]), path.parent),
            seal=seal,
            client=_section(Client, values, "client", path),
            node=_section(Node, values, "node", path),
            sections=values,
        )

    @cached_property
    def data(self) -> Source:
        """Where the site's own examples are. Raises ConfigError."""
        from fedipfs.data.own import Source

        return Source.of(self._mapping("data"), self.path.parent)

    @cached_property
    def policy(self) -> Policy:
        """What the site allows. Raises ConfigError."""
        from fedipfs.clients.policy import Policy

        policy = Policy.of(self._mapping("policy"))
        for target in policy.tasks:
            # A run names its task by the same words everywhere, and paths differ by machine.
            if target.rpartition(":")[0].endswith(".py"):
                raise ConfigError(
                    f"{self.path}: policy.tasks: {target!r:.120} is a file; install it here as a "
                    "module, and name that: module:Class, as the coordinator does"
                )
        return policy

    @property
    def shared(self) -> bool:
        """Whether others can read what is put into the store."""
        return is_shared(self.store)

    def federation(self) -> Federation:
        """What the coordinator signed when it let the organization in; ConfigError before."""
        from fedipfs.trust.joining import Federation

        if not self.home.federation.exists():
            raise ConfigError(
                f"{self.home.path} has not joined a federation: send the coordinator the join file "
                "that `fedipfs-client init` wrote, and run `fedipfs-client join` with its answer"
            )
        return Federation.load(self.home.federation)

    def _mapping(self, name: str) -> Mapping[str, Any]:
        found = self.sections.get(name)
        if not isinstance(found, Mapping):
            raise ConfigError(f"{self.path}: the section {name} is missing")
        return found


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    from fedipfs.trust import files

    text = files.read(path, ConfigError, limit=MAX_FILE)
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}: not YAML ({one_line(what, 200)})") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{path}: expected the sections {', '.join(_SECTIONS)}")
    return found


def _overridden(
    found: Mapping[str, Any], overrides: Sequence[str], path: Path
) -> Mapping[str, Any]:
    if not overrides:
        return found
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"{word!r:.80} should be section.key=value, as client.trainer=ddp")
    try:
        # Only the words are taken apart here: a "${" in the file is the file's own.
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{' '.join(overrides):.200}: {one_line(error, 200)}") from None
    return _merged(found, given, path, "")


def _merged(
    old: Mapping[str, Any], new: Mapping[str, Any], path: Path, where: str
) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = _merged(before, value, path, f"{where}{key}.")
        elif isinstance(value, Mapping) and before is not None:
            raise ConfigError(f"{where}{key} is {before!r:.80} in {path}: it has no keys below")
        result[key] = value
    return result


def _section(kind: Any, values: Mapping[str, Any], name: str, path: Path) -> Any:
    found = values.get(name)
    if found is None:
        found = {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path}: {name} is not a section with keys of its own")
    _known(found, [field.name for field in fields(kind)], path, f"{name}.")
    return kind(**found)


def _known(found: Mapping[str, Any], known: Sequence[str], path: Path, where: str) -> None:
    for key in found:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"use {', '.join(known)}"
            raise ConfigError(f"{path}: {where}{key!s:.80} is not known; {hint}")


def _with_paths(options: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A store's options, those below included, with paths from `base` on."""
    result = dict(options)
    for key, value in options.items():
        if isinstance(value, Mapping):
            result[key] = _with_paths(value, base)
        elif key in _PATHS and isinstance(value, str):
            result[key] = str(base / Path(value).expanduser())
    return result


def _among(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r:.80} is not one of {', '.join(known)}")


def _number(
    name: str, value: Any, *, least: float, most: float, whole: bool = False, optional: bool = True
) -> None:
    if value is None and optional:
        return
    kinds = int if whole else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
        what = "a whole number" if whole else "a number"
        null = ", or null" if optional else ""
        raise ConfigError(f"{name}={value!r:.80} is not {what} from {least:g} to {most:g}{null}")
