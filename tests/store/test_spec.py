"""Stores by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.errors import ConfigError, FedIPFSError
from fedipfs.store import CachedStore, FolderStore, is_shared, open_store
from fedipfs.store.gateway import GatewayStore
from fedipfs.store.kubo import KuboStore

KUBO = "/ip4/127.0.0.1/tcp/5009"


def test_a_path_is_a_folder(tmp_path: Path) -> None:
    for spec in (tmp_path / "a", str(tmp_path / "b"), f"folder:{tmp_path / 'c'}"):
        store = open_store(spec)
        assert isinstance(store, FolderStore) and store.path.is_relative_to(tmp_path)
        assert not is_shared(spec)
    options: dict[str, Any] = {"path": str(tmp_path / "d"), "durable": False, "max_bytes": 7}
    store = open_store(options)
    assert isinstance(store, FolderStore) and not store.durable
    assert options == {"path": str(tmp_path / "d"), "durable": False, "max_bytes": 7}


def test_a_kubo_node() -> None:
    store = open_store(f"kubo:{KUBO}")
    assert isinstance(store, KuboStore) and store.address.text == KUBO
    store = open_store({"kind": "kubo", "address": KUBO, "timeout_s": 5})
    assert isinstance(store, KuboStore) and store.rpc.timeout_s == 5
    store = open_store("kubo:")
    assert isinstance(store, KuboStore) and store.address.text == "/ip4/127.0.0.1/tcp/5001"


def test_gateways() -> None:
    store = open_store("gateway:https://a.example,https://b.example/x/")
    assert isinstance(store, GatewayStore)
    assert store.urls == ["https://a.example", "https://b.example/x"]
    assert not is_shared("gateway:https://a.example")  # nothing is put there


def test_a_folder_in_front(tmp_path: Path) -> None:
    for spec in (
        f"cached:{tmp_path / 'a'}",
        {"kind": "cached", "path": str(tmp_path / "b"), "kubo": {}},
        {"kind": "cached", "path": str(tmp_path / "c"), "kubo": {"kind": "kubo", "address": KUBO}},
        json.dumps({"kind": "cached", "path": str(tmp_path / "d"), "kubo": {"timeout_s": 3}}),
    ):
        store = open_store(spec)
        assert isinstance(store, CachedStore) and isinstance(store.home, KuboStore)
        assert is_shared(spec), spec
    alone = {
        "kind": "cached",
        "path": str(tmp_path / "e"),
        "kubo": None,
        "gateway": {"urls": ["https://a.example"]},
    }
    store = open_store(alone)
    assert isinstance(store, CachedStore) and store.home is None
    assert isinstance(store.sources[0], GatewayStore) and not is_shared(alone)
    store = open_store({**alone, "gateway": {"kind": "gateway", "urls": [], "timeout_s": 30}})
    assert isinstance(store, CachedStore) and store.sources == []


def test_whatever_is_a_kubo_is_shared() -> None:
    assert is_shared("kubo:") and is_shared({"kind": "kubo"}) and is_shared('{"kind": "kubo"}')


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("", "names no path"),
        ("folder:", "names no path"),
        ("cached:", "names no path"),
        ({}, "names no path"),
        ({"kind": "s3"}, "cached, folder, gateway, kubo"),
        ({"kind": None}, "unknown"),
        ({"kind": []}, "unknown"),
        ({"kind": "kubo", "adress": "x"}, "adress"),
        ({"kind": "kubo", "timeout_s": "60"}, "timeout_s"),
        ({"kind": "kubo", "timeout_s": 0}, "timeout_s"),
        ({"kind": "kubo", "timeout_s": float("nan")}, "timeout_s"),
        ({"kind": "kubo", "timeout_s": float("inf")}, "timeout_s"),
        ({"kind": "kubo", "retries": -1}, "retries"),
        ({"kind": "kubo", "retries": True}, "retries"),
        ({"kind": "kubo", "lease_s": None}, "lease_s"),
        ({"kind": "kubo", "address": 5}, "address"),
        ({"kind": "kubo", "address": None}, "address"),
        ({"kind": "kubo", "peers": "/ip4/1.2.3.4/tcp/1"}, "peers"),
        ({"kind": "kubo", "peers": [5]}, "peers"),
        ({"kind": "kubo", "peers": None}, "peers"),
        ({"kind": "gateway"}, "urls"),
        ({"kind": "gateway", "urls": []}, "urls"),
        ({"kind": "gateway", "urls": "https://a"}, "urls"),
        ({"kind": "gateway", "urls": 5}, "urls"),
        ({"kind": "gateway", "urls": [5]}, "urls"),
        ({"kind": "gateway", "urls": ["https://a"], "timeout_s": 0}, "timeout_s"),
        ({"kind": "gateway", "urls": ["https://a"], "timeout_s": float("inf")}, "timeout_s"),
        ("gateway:ftp://a", "URL"),
        ("gateway:", "URL"),
        ("gateway:https://a?x=y", "URL"),
        ("gateway:https://[::1", "URL"),
        ("{", "JSON"),
        ("{" * 100_000, "JSON"),
        ('{"a":' * 100_000, "JSON"),
        ({"kind": "cached", "path": "P", "kubo": 5}, "mapping"),
        ({"kind": "cached", "path": "P", "kubo": True}, "mapping"),
        ({"kind": "cached", "path": "P", "gateway": [1]}, "mapping"),
        ({"kind": "cached", "path": "P", "kubo": {"x": 1}}, "x"),
        ({"kind": "folder", "path": "P", "max_bytes": 0}, "max_bytes"),
        ({"kind": "folder", "path": "P", "max_bytes": "1GB"}, "store.max_bytes='1GB' is not"),
        ({"kind": "folder", "path": "P", "durable": "no"}, "store.durable='no' is neither"),
        ({"kind": "cached", "path": "P", "max_bytes": True}, "store.max_bytes=True is not"),
        ({"kind": "cached", "path": "P", "prefetch": "no"}, "store.prefetch='no' is neither"),
        ({"kind": "kubo", "open_rpc": "no", "address": "http://192.0.2.1"}, "store.open_rpc='no'"),
        ({"kind": "kubo", "pin": 1}, "store.pin=1 is neither"),
        ({"kind": "kubo", "credentials": 5}, "store.credentials=5 is no file"),
        ({"path": "P", "x": 1}, "x"),
        ({"path": 5}, "path"),
    ],
)
def test_what_is_wrong_is_named(
    spec: Any, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=word) as caught:
        open_store(spec)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "kubo", "address": "https://u:hush@a.example", "x": 1},
        {"kind": "kubo", "address": "https://u:hush@a.example"},
        "kubo:https://u:hush@a.example",
        "gateway:https://u:hush@a.example",
        "gateway:https://:hush@a.example",
        '{"kind": "kubo", "address": "https://u:hush@a.example"',
    ],
)
def test_secrets_are_not_shown(spec: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(spec)
    assert "hush" not in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    kind=st.sampled_from(["kubo", "gateway"]),
    options=st.dictionaries(
        st.sampled_from(
            ["address", "timeout_s", "retries", "credentials", "pin", "lease_s", "peers", "urls"]
        ),
        values,
        max_size=3,
    ),
)
def test_any_options_make_a_store_or_a_named_error(kind: str, options: dict[str, Any]) -> None:
    try:
        open_store({"kind": kind, **options})
    except FedIPFSError as error:
        assert "\n" not in str(error)
