"""A store from what a configuration, an option or an environment variable says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from fedipfs.errors import ConfigError
from fedipfs.store.base import Store
from fedipfs.store.cached import CachedStore
from fedipfs.store.folder import FolderStore
from fedipfs.store.options import check_flag

Spec = str | os.PathLike[str] | Mapping[str, Any]


def open_store(spec: Spec) -> Store:
    """The store that `spec` names.

    Text: a path or "folder:PATH"; "kubo:ADDRESS"; "gateway:URL,URL"; "cached:PATH", which is that
    folder before the node at the default address; or a mapping as JSON. A mapping has `kind` and
    that store's options; of "cached", `path`, and `kubo` and `gateway` with options of their own
    or null. Raises ConfigError for an unknown kind or option, StoreUnusable when a folder cannot
    be opened. A service is not asked for anything yet.
    """
    options = options_of(spec)
    kind = options.pop("kind")
    try:
        return _KINDS[kind](**options)
    except TypeError as error:
        given = ", ".join(map(str, options))
        raise ConfigError(f"store={kind}: its options ({given}) are wrong: {error}") from None


def is_shared(spec: Spec) -> bool:
    """Whether others than this machine's users can read what is put into the store of `spec`."""
    options = options_of(spec)
    kind = options["kind"]
    return kind == "kubo" or (kind == "cached" and options.get("kubo") is not None)


def options_of(spec: Spec) -> dict[str, Any]:
    """`spec` as a mapping with a known kind. Raises ConfigError."""
    given = spec if isinstance(spec, Mapping) else _of_text(os.fspath(spec))
    options = {"kind": "folder", **given}
    kind = options["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"store kind {kind!r:.80} is unknown: use {', '.join(sorted(_KINDS))}")
    if options["kind"] in ("folder", "cached") and not options.get("path"):
        raise ConfigError(f"store={kind} names no path: set store.path")
    return options


def _of_text(text: str) -> dict[str, Any]:
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"a store in braces is JSON, but this is none: {error}") from None
    kind, colon, rest = text.partition(":")
    if not colon or kind not in _KINDS:
        return {"path": text}
    if kind == "kubo":
        return {"kind": kind, **({"address": rest} if rest else {})}
    if kind == "gateway":
        return {"kind": kind, "urls": rest.split(",")}
    return {"kind": kind, "path": rest, **({"kubo": {}} if kind == "cached" else {})}


def _kubo(**options: Any) -> Store:
    from fedipfs.store.kubo import KuboStore  # ipfshttpclient takes its time to import

    return KuboStore(**options)


def _gateway(**options: Any) -> Store:
    from fedipfs.store.gateway import GatewayStore

    return GatewayStore(**options)


def _cached(
    *,
    path: str,
    max_bytes: int | None = None,
    prefetch: bool = False,  # the server's to heed: nodes are told of the next model early
    kubo: Mapping[str, Any] | None = None,
    gateway: Mapping[str, Any] | None = None,
) -> Store:
    check_flag("prefetch", prefetch)
    front = FolderStore(path, durable=False, max_bytes=max_bytes)
    home: Any = None if kubo is None else _kubo(**_without_kind(kubo))
    away = {} if gateway is None else _without_kind(gateway)
    others: Any = [_gateway(**away)] if away.get("urls") else []
    return CachedStore(front, home, others)


def _without_kind(options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigError(f"store.kubo and store.gateway are mappings or null, not {options!r:.80}")
    return {key: value for key, value in options.items() if key != "kind"}


_KINDS: dict[str, Callable[..., Store]] = {
    "folder": FolderStore,
    "kubo": _kubo,
    "gateway": _gateway,
    "cached": _cached,
}
