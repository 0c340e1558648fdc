"""`fedipfs store` and `runs show` over every kind of store, and what is sealed in them."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import JsIpfs, Remote
from hostile_http import HostileServer, silence
from interrupts import interrupt_upload
from runs import play

from fedipfs.cli import main
from fedipfs.exchange import Vault
from fedipfs.ipld import CID, car, unixfs
from fedipfs.observe import transfer
from fedipfs.store import FolderStore, dag, open_store
from fedipfs.trust import Identity, Member, TrustList
from fedipfs.trust.party import Party

Output = pytest.CaptureFixture[str]
TEXT = b"the same bytes, the same name\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file, and nothing in the environment."""
    for name in ("STORE", "IDENTITY", "TRUST", "PASSPHRASE", "KUBO_CREDENTIALS"):
        monkeypatch.delenv(f"FEDIPFS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "a.txt").write_bytes(TEXT)
    return tmp_path


@pytest.fixture
def node() -> Iterator[HostileServer]:
    """An honest Kubo."""
    with HostileServer() as server:
        yield server


def out(capsysbinary: pytest.CaptureFixture[bytes], *argv: str) -> bytes:
    """What a command that succeeds prints."""
    code = main(argv)
    captured = capsysbinary.readouterr()
    assert (code, captured.err) == (0, b"")
    return captured.out


def refused(capsys: Output, *argv: str) -> str:
    """The one line of a command that is refused."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fedipfs: ")
    return captured.err


def specs(node: HostileServer) -> dict[str, str]:
    home = {"address": node.address}
    cached = {"kind": "cached", "path": "cache", "kubo": home}
    return {
        "kubo": f"kubo:{node.address}",
        "folder": "folder:one",
        "cached": json.dumps(cached),
        "json": json.dumps({"kind": "kubo", **home}),
    }


@pytest.mark.parametrize("kind", ["kubo", "folder", "cached", "json"])
def test_the_commands_do_the_same_on_every_store(
    node: HostileServer, folder: Path, capsysbinary: Any, kind: str
) -> None:
    store = ("--store", specs(node)[kind])
    data = os.urandom(2 * unixfs.CHUNK + 7)
    (folder / "big").write_bytes(data)
    name = out(capsysbinary, "store", "add", "big", *store).decode().strip()
    assert name == str(unixfs.cid_of(data))
    assert out(capsysbinary, "store", "cat", name, *store) == data
    sizes = [
        line.split()[1] for line in out(capsysbinary, "store", "ls", name, *store).splitlines()
    ]
    assert list(map(int, sizes)) == [unixfs.CHUNK, unixfs.CHUNK, 7]
    out(capsysbinary, "store", "pin", name, "--name", "again", *store)
    pins = out(capsysbinary, "store", "ls", "--pins", *store).decode()
    assert pins == f"{name}  again\n{name}  big\n"
    out(capsysbinary, "store", "unpin", name, *store)
    assert out(capsysbinary, "store", "ls", "--pins", *store) == b""
    told = json.loads(out(capsysbinary, "store", "stat", "--json", *store))
    assert told["kind"] == {"json": "kubo"}.get(kind, kind)
    assert told.get("address") == (None if kind == "folder" else node.address)
    assert told["bytes"] > len(data)
    assert out(capsysbinary, "store", "gc", "--grace", "0", *store).startswith(b"removed ")
    assert str(told["blocks"]) not in out(capsysbinary, "store", "stat", *store).decode().split()
    assert main(["store", "cat", name, *store]) == 2


@pytest.mark.parametrize("kind", ["kubo", "folder", "cached"])
def test_cars_go_from_store_to_store(
    node: HostileServer, folder: Path, capsysbinary: Any, kind: str
) -> None:
    store = ("--store", specs(node)[kind])
    data = os.urandom(unixfs.CHUNK + 1)
    (folder / "big").write_bytes(data)
    name = out(capsysbinary, "store", "add", "big", "--store", "first").decode().strip()
    out(capsysbinary, "store", "export", name, "one.car", "--store", "first")
    assert out(capsysbinary, "store", "import", "one.car", *store).decode().split() == [name]
    assert out(capsysbinary, "store", "cat", name, *store) == data
    out(capsysbinary, "store", "export", name, "two.car", *store)
    assert (folder / "two.car").read_bytes() == (folder / "one.car").read_bytes()


def test_gateways_are_read(node: HostileServer, folder: Path, capsysbinary: Any) -> None:
    data = os.urandom(unixfs.CHUNK + 1)
    (root,) = node.hold(unixfs.chunk(data))
    gateway = f"gateway:http://127.0.0.1:9,{node.url}"
    assert out(capsysbinary, "store", "cat", str(root), "--store", gateway) == data
    spec = json.dumps({"kind": "cached", "path": "c", "gateway": {"urls": [node.url]}})
    assert out(capsysbinary, "store", "cat", str(root), "--store", spec) == data
    asked = len(node.requests)
    assert out(capsysbinary, "store", "cat", str(root), "--store", spec) == data
    assert len(node.requests) == asked, "it is in the folder now"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("ls",), "ipfs refs local"),
        (("verify",), "ipfs repo verify"),
    ],
)
def test_what_a_node_cannot_do(
    node: HostileServer, capsys: Output, argv: tuple[str, ...], says: str
) -> None:
    assert says in refused(capsys, "store", *argv, "--store", f"kubo:{node.address}")


@pytest.mark.parametrize("verb", ["add", "stat", "gc", "verify", "ls", "import", "pin", "unpin"])
def test_what_a_gateway_cannot_do(folder: Path, capsys: Output, verb: str) -> None:
    (folder / "a.car").write_bytes(b"".join(car.write([CID.of(TEXT)], [(CID.of(TEXT), TEXT)])))
    about = {"add": ["a.txt"], "import": ["a.car"], "pin": [str(CID.of(TEXT))]}
    about["unpin"] = about["pin"]
    argv = ["store", verb, *about.get(verb, []), "--store", "gateway:http://127.0.0.1:9"]
    assert "gateway" in refused(capsys, *argv)


def test_verify_and_ls_of_a_cached_store_are_its_folder_s(
    node: HostileServer, folder: Path, capsys: Output
) -> None:
    spec = specs(node)["cached"]
    assert main(["store", "add", "a.txt", "--store", spec]) == 0
    assert main(["store", "verify", "--store", spec]) == 0
    assert main(["store", "ls", "--store", spec]) == 0
    cid = CID.of(TEXT)
    assert capsys.readouterr().out == f"{cid}\n1 blocks, all whole\n{cid}  {len(TEXT)}\n"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("kubo:/ip4/127.0.0.1/tcp/9", "does not answer (Connection refused)"),
        ("kubo:nonsense", "no address of an IPFS RPC"),
        ("kubo:http://192.0.2.1:5001", "SSH tunnel"),
        ("gateway:ftp://host", "https://HOST"),
        ('{"kind": "kubo", "foo": 1}', "foo"),
        ('{"kind": "ftp"}', "'ftp' is unknown"),
        ("{", "JSON"),
    ],
)
def test_stores_that_are_away_or_none(capsys: Output, spec: str, says: str) -> None:
    for argv in (["cat", str(CID.of(TEXT))], ["add", "a.txt"], ["ls", "--pins"]):
        if not (spec.startswith("gateway") and argv[0] != "cat"):
            assert says in refused(capsys, "store", *argv, "--store", spec)


def test_kinds_of_stores_are_completed(folder: Path) -> None:
    (folder / "runs").mkdir()
    environ = {**os.environ, "_FEDIPFS_COMPLETE": "bash_complete", "COMP_CWORD": "4"}
    for start, offered in (("k", {"plain,kubo:", "dir,k"}), ("", {"dir,"})):
        done = subprocess.run(
            [sys.executable, "-m", "fedipfs"],
            env={**environ, "COMP_WORDS": f"fedipfs store cat --store {start}"},
            capture_output=True,
            text=True,
        )
        assert set(done.stdout.split()) == offered


# ---- a real daemon


def call(url: str, path: str, body: bytes | None = None) -> bytes:
    """One call of an RPC; `body` goes as a file of a form, whose parts have a content type."""
    request = urllib.request.Request(f"{url}/api/v0{path}", method="POST")
    if body is not None:
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        request.data = (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.car"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\n" + body + b"\r\n--x--\r\n"
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        return response.read()


@pytest.mark.slow
def test_our_cars_are_the_daemon_s_and_its_cars_ours(
    ipfs_daemon: JsIpfs | Remote, folder: Path, capsysbinary: Any
) -> None:
    data = os.urandom(3 * unixfs.CHUNK + 7)
    (folder / "big").write_bytes(data)
    blocks = FolderStore(folder / "one")
    out(capsysbinary, "store", "add", "big", "--store", "one")
    root = unixfs.cid_of(data)
    record = dag.put_record(blocks, {"file": root, "round": 3})
    out(capsysbinary, "store", "export", str(record), "ours.car", "--store", "one")

    told = call(ipfs_daemon.url, "/dag/import?pin-roots=true", (folder / "ours.car").read_bytes())
    line = json.loads(told.splitlines()[0])
    assert CID.parse(line["Root"]["Cid"]["/"]) == record
    assert call(ipfs_daemon.url, f"/cat?arg={root}") == data

    theirs = call(ipfs_daemon.url, f"/dag/export?arg={record}")
    (folder / "theirs.car").write_bytes(theirs)
    printed = out(capsysbinary, "store", "import", "theirs.car", "--store", "two")
    assert printed.decode().split() == [str(record)]
    assert sorted(FolderStore(folder / "two")) == sorted(blocks)
    assert out(capsysbinary, "store", "cat", str(root), "--store", "two") == data
    call(ipfs_daemon.url, f"/pin/rm?arg={record}")


@pytest.mark.slow
def test_the_commands_work_on_a_real_daemon(
    own_daemon: JsIpfs, folder: Path, capsysbinary: Any
) -> None:
    store = ("--store", f"kubo:{own_daemon.address}")
    data = os.urandom(3 * unixfs.CHUNK + 7)
    (folder / "big").write_bytes(data)
    name = out(capsysbinary, "store", "add", "big", *store).decode().strip()
    assert out(capsysbinary, "store", "cat", name, *store) == data
    assert f"{name}  big\n" in out(capsysbinary, "store", "ls", "--pins", *store).decode()
    out(capsysbinary, "store", "export", name, "a.car", *store)
    assert out(capsysbinary, "store", "import", "a.car", *store).decode().split() == [name]
    out(capsysbinary, "store", "unpin", name, *store)
    assert json.loads(out(capsysbinary, "store", "stat", "--json", *store))["blocks"] > 0
    assert out(capsysbinary, "store", "gc", "--grace", "0", *store).startswith(b"removed ")
    assert name not in out(capsysbinary, "store", "ls", "--pins", *store).decode()


# ---- what is sealed


@pytest.fixture
def sealed(folder: Path) -> tuple[Vault, Path]:
    """A vault that seals all, over the default store, and its owner's key file."""
    own = Identity.new("coordinator")
    own.save(folder / "own.key")
    party = Party(own, "coordinator", TrustList([Member(own.public, "coordinator")]))
    return Vault(open_store("runs/store"), party, "all"), folder / "own.key"


def test_a_sealed_file_is_opened_with_its_key_only(
    sealed: tuple[Vault, Path], capsysbinary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault, key = sealed
    data = os.urandom(2 * unixfs.CHUNK + 5)
    name = str(vault.put_bytes(data))
    assert out(capsysbinary, "store", "cat", name, "--identity", str(key)) == data
    raw = out(capsysbinary, "store", "cat", name, "--raw")
    assert raw == b"".join(dag.cat(vault.store, CID.parse(name)))
    assert data[:100] not in raw
    assert main(["store", "cat", name]) == 2
    captured = capsysbinary.readouterr()
    assert captured.out == b""
    assert b"--identity runs/RUN/keys/coordinator.key" in captured.err
    assert captured.err.count(b"\n") == 1
    monkeypatch.setenv("FEDIPFS_IDENTITY", str(key))
    assert out(capsysbinary, "store", "cat", name) == data
    assert out(capsysbinary, "store", "cat", str(vault.put_bytes(b""))) == b""


def test_a_sealed_record_is_shown_as_json(sealed: tuple[Vault, Path], capsysbinary: Any) -> None:
    vault, key = sealed
    link = CID.of(TEXT)
    name = str(vault.put_record({"updates": [link], "blob": b"x" * (3 << 19)}, private=True))
    shown = json.loads(out(capsysbinary, "store", "cat", name, "--identity", str(key)))
    assert shown["updates"] == [{"/": str(link)}]
    for almost in (b"\xa1\x61x", b"\xa1" * 2000, b"{}"):  # begin as a map does, or as JSON
        name = str(vault.put_bytes(almost))
        assert out(capsysbinary, "store", "cat", name, "--identity", str(key)) == almost


def test_keys_that_do_not_open(
    sealed: tuple[Vault, Path], folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault, key = sealed
    name = str(vault.put_bytes(TEXT))
    Identity.new("other").save(folder / "other.key")
    argv = ("store", "cat", name, "--identity")
    assert "not sealed to other" in refused(capsys, *argv, "other.key")
    assert "No such file" in refused(capsys, *argv, "absent.key")
    key.chmod(0o644)
    assert "chmod 600" in refused(capsys, *argv, str(key))
    Identity.new("locked").save(folder / "locked.key", b"correct horse")
    assert main([*argv, "locked.key"]) == 2
    assert "FEDIPFS_PASSPHRASE" in capsys.readouterr().err
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "battery staple")
    assert "passphrase" in refused(capsys, *argv, "locked.key")


def test_a_plain_file_needs_no_key(folder: Path, capsys: Output) -> None:
    assert main(["store", "add", "a.txt"]) == 0
    name = capsys.readouterr().out.strip()
    assert main(["store", "cat", name, "--identity", "absent.key"]) == 0
    assert capsys.readouterr().out == TEXT.decode()


# ---- runs


def run_of(folder: Path, *words: str) -> None:
    play(folder / "runs", "+experiment=digits", "rounds=2", "clients.total=2", "run_id=r", *words)


def shown(capsys: Output, *argv: str) -> tuple[str, dict[str, Any]]:
    """The text of `runs show r`, and its JSON."""
    assert main(["runs", "show", "r", *argv]) == 0
    text = capsys.readouterr().out
    assert main(["runs", "show", "r", "--json", *argv]) == 0
    return text, json.loads(capsys.readouterr().out)


def test_a_sealed_run_is_shown_with_its_keys_and_without(folder: Path, capsys: Output) -> None:
    run_of(folder, "seal=all")
    text, told = shown(capsys)
    assert "signed by coordinator (" in text
    assert "all 3 signatures are good" in text
    assert (told["signed_by"], told["signatures_checked"]) == (["coordinator"], True)
    assert len(told["records"][0]["record"]["updates"]) == 2

    keys = folder / "runs" / "r" / "keys"
    keys.rename(folder / "kept")
    text, told = shown(capsys)
    assert "signed by 'coordinator'; not checked" in text
    assert "details of 2 rounds are sealed" in text
    assert told["signatures_checked"] is False
    assert "updates" not in told["records"][0]["record"]

    keys.mkdir(mode=0o700)
    for name in ("coordinator.key", "trust.toml"):
        (keys / name).write_bytes((folder / "kept" / name).read_bytes())
    (keys / "coordinator.key").chmod(0o644)
    assert "cannot be used" in shown(capsys)[0]


def test_a_chain_is_not_checked_with_a_key_that_the_run_did_not_begin_with(
    folder: Path, capsys: Output
) -> None:
    run_of(folder, "seal=all")
    key = folder / "runs" / "r" / "keys" / "coordinator.key"
    key.unlink()
    Identity.new("coordinator").save(key)
    text, told = shown(capsys)
    assert "not checked, as the run's keys cannot be used" in text
    assert "another key than the run began with" in text
    assert told["signatures_checked"] is False
    assert all("updates" not in entry["record"] for entry in told["records"])


def test_a_plain_run_is_not_signed(folder: Path, capsys: Output) -> None:
    run_of(folder)
    text, told = shown(capsys)
    assert text.rstrip().endswith("not signed")
    assert (told["signed_by"], told["signatures_checked"]) == ([], False)


def test_a_run_in_a_node_is_shown_from_there(
    node: HostileServer, folder: Path, capsys: Output
) -> None:
    run_of(folder, "store=kubo", f"store.address={node.address}")
    text, told = shown(capsys)
    assert "all 3 signatures are good" in text
    assert len(told["records"]) == 3
    text, _ = shown(capsys, "--store", "elsewhere")
    assert "there is no store at elsewhere" in text
    node.__exit__()
    text, told = shown(capsys)
    assert "the chain cannot be followed further" in text
    assert "Connection refused" in text
    assert told["rounds"]


# ---- the bar


def bytes_on_a_terminal(argv: list[str], folder: Path, **options: Any) -> bytes:
    """What `fedipfs ARGV` writes to stderr when that is a terminal."""
    main_end, other_end = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-m", "fedipfs", *argv],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stderr=other_end,
        **options,
    ) as process:
        os.close(other_end)
        seen = b""
        try:
            while piece := os.read(main_end, 4096):
                seen += piece
        except OSError:  # so a terminal ends
            pass
        os.close(main_end)
    assert process.returncode == 0
    return seen


def test_large_files_show_a_bar_on_a_terminal(folder: Path) -> None:
    quiet = {"stdout": subprocess.DEVNULL}
    data = os.urandom(transfer.LEAST)
    (folder / "big[1]").write_bytes(data)
    (folder / "small").write_bytes(bytes(transfer.LEAST - 1))
    seen = bytes_on_a_terminal(["store", "add", "big[1]"], folder, **quiet)
    assert b"add big[1]" in seen
    assert b"20.0 MB" in seen
    assert bytes_on_a_terminal(["store", "add", "small"], folder, **quiet) == b""
    name = str(unixfs.cid_of(data))
    assert b"read" in bytes_on_a_terminal(["store", "cat", name], folder, **quiet)
    assert b"export" in bytes_on_a_terminal(["store", "export", name, "a.car"], folder)
    seen = bytes_on_a_terminal(["store", "import", "a.car", "--store", "two"], folder, **quiet)
    assert b"import a.car" in seen


def test_there_is_no_bar_without_a_terminal(folder: Path) -> None:
    with (folder / "big").open("wb") as file:
        file.truncate(transfer.LEAST)
    done = subprocess.run(
        [sys.executable, "-m", "fedipfs", "store", "add", "big"], cwd=folder, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


# ---- interrupts


@pytest.mark.parametrize("size", [10, 40 << 20])
def test_an_interrupt_does_not_wait_for_the_node(
    node: HostileServer, folder: Path, size: int
) -> None:
    node.plan("/dag/import", silence)
    (folder / "big").write_bytes(os.urandom(size))
    # less than the node is waited for
    words = ("store", "add", "big", "--store", f"kubo:{node.address}")
    ended = interrupt_upload(node, *words, within_s=40)
    assert (ended.returncode, ended.stderr.strip()) == (130, b"")
