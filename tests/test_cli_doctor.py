"""`fedipfs doctor`: what it examines, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hostile_http import HostileServer, reply, silence
from interrupts import interrupt_upload

from fedipfs.cli import main
from fedipfs.store import FolderStore
from fedipfs.trust import Identity, Member, TrustList

Output = pytest.CaptureFixture[str]
RUN = ("+experiment=digits", "rounds=1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and nothing in the environment."""
    for name in [name for name in os.environ if name.startswith("FEDIPFS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def node() -> Iterator[HostileServer]:
    """An honest Kubo without peers."""
    with HostileServer() as server:
        told = json.dumps({"Version": "0.35.0", "Golang": "go1.24"})
        server.plan("/version", reply(told, Date=formatdate(time.time(), usegmt=True)))
        server.plan("/swarm/peers", reply('{"Peers": null}'))
        server.plan("/bootstrap/list", reply('{"Peers": []}'))
        yield server


def examined(capsys: Output, *words: str, code: int = 0) -> list[dict[str, str]]:
    """The findings as JSON."""
    assert main(["doctor", "--json", *words]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    told = json.loads(captured.out)
    found: list[dict[str, str]] = told["findings"]
    for level in ("problem", "warning"):
        assert told[f"{level}s"] == sum(finding["level"] == level for finding in found)
    assert bool(code) == bool(told["problems"])
    return found


def faults(capsys: Output, *words: str, code: int = 2) -> list[tuple[str, str, str]]:
    """(level, part and check, text and remedy) of what is not ok, but for the machine's disk."""
    return [
        (f["level"], f"{f['part']} {f['check']}", f"{f['text']}; {f['remedy']}")
        for f in examined(capsys, *words, code=code)
        if f["level"] != "ok" and f["check"] != "files"
    ]


def test_the_default_store_is_examined_and_not_made(folder: Path, capsys: Output) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [
        ["ok", "run", "sealing"],
        ["ok", "folder", "usable"],
    ]
    assert "runs/store" in lines[1]
    assert lines[-1].startswith("no problems")
    assert list(folder.iterdir()) == []


def test_the_environment_or_an_option_names_the_store(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDIPFS_STORE", "/proc/nowhere")
    assert faults(capsys)[0][1] == "folder usable"
    assert faults(capsys, "--store", str(folder / "here"), code=0) == []


def test_a_problem_is_a_line_that_says_what_to_do(capsys: Output) -> None:
    assert main(["doctor", "--store", "kubo:/ip4/127.0.0.1/tcp/9"]) == 2
    captured = capsys.readouterr()
    sealing, line, last = captured.out.splitlines()
    assert sealing.startswith("warning") and "FEDIPFS_IDENTITY" in sealing  # no keys are named
    assert line.startswith("problem  node reached")
    assert "start it with `ipfs daemon`" in line
    assert last == "1 problem, 1 warning"
    assert captured.err == ""


def test_the_words_of_a_run(node: HostileServer, folder: Path, capsys: Output) -> None:
    words = (*RUN, "store=cached", f"store.kubo.address={node.address}", "store.path=cache")
    found = examined(capsys, *words)
    assert {f["part"] for f in found} == {"run", "folder", "node"}
    assert next(f["text"] for f in found if f["check"] == "sealing").startswith("seal=all")
    assert [f["check"] for f in found if f["level"] == "warning" and f["part"] == "node"] == [
        "peers"
    ]
    assert node.pins == set()
    assert not (folder / "cache").exists()


def test_settings_that_are_refused_are_a_problem_and_the_store_is_examined(
    node: HostileServer, capsys: Output
) -> None:
    kubo = ("store=kubo", f"store.address={node.address}", f"store.peers=[{'/ip4/192.0.2.1'}]")
    ((level, check, says),) = faults(capsys, *RUN, *kubo, "seal=none")
    assert (level, check) == ("problem", "run settings")
    assert "unsealed_because" in says
    assert node.calls("/dag/import")
    because = 'unsealed_because="the data are public"'
    assert faults(capsys, *RUN, *kubo, "seal=none", because, code=0) == []
    ((level, check, says),) = faults(capsys, *RUN, "rounds=0")
    assert (level, check) == ("problem", "run settings")
    assert "rounds=0" in says


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("+experiment=mnits",), "did you mean 'mnist'?"),
        (("rouns=3",), "did you mean 'rounds'?"),
        (("store=kubo", "store.path=x"), "store.path"),
        (("a b",), "a b"),
        ((*RUN, "--store", "x"), "not both"),
        (("--stoer",), "--stoer"),
    ],
)
def test_words_that_are_no_run(capsys: Output, words: tuple[str, ...], says: str) -> None:
    assert main(["doctor", *words]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_the_environment_says_what_is_sealed(
    node: HostileServer, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDIPFS_SEAL", "none")
    found = faults(capsys, "--store", f"kubo:{node.address}")
    ((check, says),) = [tuple(rest) for level, *rest in found if level == "problem"]
    assert check == "run sealing"
    assert "because" in says
    monkeypatch.setenv("FEDIPFS_SEAL", "some")
    assert [check for _, check, _ in faults(capsys)] == ["run sealing"]


# ---- keys


def make_keys(folder: Path, monkeypatch: pytest.MonkeyPatch, **dates: Any) -> tuple[Path, Path]:
    """A key file and a trust list with one coordinator, named by the environment."""
    key, trust = folder / "own.key", folder / "trust.toml"
    own, other = Identity.new("us"), Identity.new("acme")
    own.save(key)
    TrustList([Member(other.public, "coordinator", **dates)]).save(trust)
    monkeypatch.setenv("FEDIPFS_IDENTITY", str(key))
    monkeypatch.setenv("FEDIPFS_TRUST", str(trust))
    return key, trust


def test_good_keys(folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(folder, monkeypatch, valid_to=datetime.now(UTC) + timedelta(days=60))
    found = {f["check"]: f for f in examined(capsys) if f["part"] == "keys"}
    assert {f["level"] for f in found.values()} == {"ok"}
    assert "the keys of us (" in found["identity"]["text"]
    assert "1 coordinators and 0 participants" in found["trust"]["text"]


def test_a_key_file_that_others_can_read(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = make_keys(folder, monkeypatch)
    key.chmod(0o644)
    ((level, check, says),) = faults(capsys)
    assert (level, check) == ("problem", "keys identity")
    assert "chmod 600" in says
    ((_, check, _),) = faults(capsys, *RUN, f"identity={key}")
    assert check == "keys identity"
    key.unlink()
    assert "No such file" in faults(capsys)[0][2]


def test_a_key_file_with_a_passphrase(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = make_keys(folder, monkeypatch)
    key.unlink()
    Identity.new("us").save(key, b"correct horse")
    ((level, check, says),) = faults(capsys, code=0)
    assert (level, check) == ("warning", "keys identity")
    assert "FEDIPFS_PASSPHRASE" in says
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "battery staple")
    ((level, check, says),) = faults(capsys)
    assert level == "problem"
    assert "passphrase" in says
    assert "battery" not in says
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "correct horse")
    assert faults(capsys, code=0) == []


@pytest.mark.parametrize(
    ("days", "levels", "says"),
    [
        ((-60, -1), ["warning", "problem"], "ended at"),
        ((-60, 10), ["warning"], "ends at"),
        ((10, 60), ["warning", "problem"], "counts only from"),
    ],
)
def test_members_whose_dates_are_over_or_soon_will_be(
    folder: Path,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
    days: tuple[int, int],
    levels: list[str],
    says: str,
) -> None:
    begin, end = (datetime.now(UTC) + timedelta(days=day) for day in days)
    _, path = make_keys(folder, monkeypatch, valid_from=begin, valid_to=end)
    found = faults(capsys, code=2 if "problem" in levels else 0)
    assert [level for level, _, _ in found] == levels
    assert says in found[0][2]
    assert "acme" in found[0][2]
    longer = TrustList.load(path).trust(Member(Identity.new("acme").public, "coordinator"))
    longer.save(path)
    assert faults(capsys, code=0) == [], "the next key is there already"


def test_a_trust_list_that_cannot_be_used(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trust = make_keys(folder, monkeypatch)
    trust.chmod(0o666)
    assert "chmod go-w" in faults(capsys)[0][2]
    trust.chmod(0o644)
    TrustList().save(trust)
    assert "nobody else" in faults(capsys)[0][2]
    trust.write_text("format = 7")
    assert faults(capsys)[0][1] == "keys trust"
    monkeypatch.delenv("FEDIPFS_TRUST")
    ((_, check, says),) = faults(capsys)
    assert check == "keys settings"
    assert "only one is set" in says
    assert faults(capsys, *RUN, code=0) == [], "a run keeps a list of its own"


# ---- the end


def test_an_interrupt_ends_it_at_once(node: HostileServer, folder: Path) -> None:
    node.plan("/dag/import", silence)  # in a thread that Python would wait for
    # less than the node is waited for
    ended = interrupt_upload(node, "doctor", "--store", f"kubo:{node.address}", within_s=12)
    assert ended.returncode == 130
    assert ended.stderr.strip() == b""
    assert b"node clock" in ended.stdout


def test_nothing_heavy_is_loaded_for_a_folder() -> None:
    script = (
        "import sys\nfrom fedipfs.cli import main\nmain(['doctor', '--help'])\n"
        "sys.exit('hydra' in sys.modules or 'flwr' in sys.modules or 'ipfshttpclient' in "
        "sys.modules or 'cryptography' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


def test_a_store_that_is_used_stays_as_it_is(folder: Path, capsys: Output) -> None:
    store = FolderStore(folder / "runs" / "store")
    cid = store.put(b"mine")
    examined(capsys)
    assert list(store) == [cid]
