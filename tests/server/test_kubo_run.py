"""Whole runs over a real IPFS daemon: the same model, also when the daemon dies in the middle."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import pytest
from daemons import JsIpfs, collect_garbage
from runs import command, lines, play, start, summary

from fedipfs.exchange import Vault
from fedipfs.ipld import CID
from fedipfs.server import parties, records
from fedipfs.store.kubo import KuboStore

pytestmark = pytest.mark.slow

MNIST = ("+experiment=mnist", "rounds=2", "clients.total=4", "train.steps=15", "run_id=one")
DIGITS = ("+experiment=digits", "clients.total=2", "strategy=fedadam", "run_id=one")
OPEN = ("seal=none", "unsealed_because=the digits are public")


def over(daemon, kind: str = "kubo") -> tuple[str, str]:
    key = "store.address" if kind == "kubo" else "store.kubo.address"
    return f"store={kind}", f"{key}={daemon.address}"


def model(runs_dir: Path) -> bytes:
    return (runs_dir / "one" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """That run over a folder: its runs_dir and its summary."""
    folder = tmp_path_factory.mktemp("mnist")
    return folder, play(folder, *MNIST)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The model of the other run over a folder, after some number of rounds."""
    folders = {}

    def after(rounds: int) -> bytes:
        if rounds not in folders:
            folders[rounds] = tmp_path_factory.mktemp("digits")
            play(folders[rounds], *DIGITS, f"rounds={rounds}")
        return model(folders[rounds])

    return after


@pytest.mark.parametrize("kind", ["kubo", "cached"])
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_a_run_over_a_daemon_gives_the_model_of_the_folder(
    tmp_path, ipfs_daemon, mnist, kind, sealed
):
    done = command(*MNIST, *over(ipfs_daemon, kind), *(() if sealed else OPEN), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, plain = mnist
    runs, left = tmp_path / "runs", summary(tmp_path / "runs" / "one")
    assert model(runs) == model(folder)
    assert (left["final_model_cid"] == plain["final_model_cid"]) is not sealed
    assert left["metrics"] == plain["metrics"]
    text = (runs / "one" / "config.yaml").read_text()
    assert ("seal: all" if sealed else "seal: none") in text
    assert ("the digits are public" in text) is not sealed
    assert left["bytes"]["sent"] > 0
    assert (left["bytes"]["fetched"] > 0) is (kind == "kubo")  # all here share one cache
    assert (runs / "store").exists() is (kind == "cached")

    vault = Vault(
        KuboStore(ipfs_daemon.address),
        parties.reader(runs / "one"),
        "all" if sealed else "none",
    )
    head = CID.parse(left["head_cid"])
    chain = [record for _, record in records.chain(vault, head)]
    assert [record.get("round") for record in chain] == [2, 1, None]
    assert all(len(update["signature"]) == 64 for update in chain[0]["updates"])


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def rounds_of(tmp_path: Path) -> int:
    path = tmp_path / "runs" / "one"
    return len(lines(path)) if (path / "metrics.jsonl").exists() else 0


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, list[str]]:
    """Its exit code, and its own lines on stderr."""
    _, stderr = process.communicate(timeout=seconds)
    assert "Traceback" not in stderr
    return process.returncode, [
        line for line in stderr.splitlines() if line.startswith("fedipfs-server: ")
    ]


@pytest.mark.parametrize("kind", ["kubo", "cached"])
def test_a_daemon_that_comes_back_is_waited_for(tmp_path, own_daemon: JsIpfs, digits, kind):
    process = start(*DIGITS, "rounds=5", *over(own_daemon, kind), cwd=tmp_path)
    wait_for(lambda: rounds_of(tmp_path) >= 2, process)
    own_daemon.kill()
    time.sleep(1)
    own_daemon.start()
    code, said = ended(process)
    assert (code, said) == (0, [])
    assert model(tmp_path / "runs") == digits(5)
    assert [line["clients"]["failed"] for line in lines(tmp_path / "runs" / "one")] == [[]] * 5


@pytest.mark.parametrize("kind", ["kubo", "cached"])
def test_a_daemon_that_stays_away_ends_the_run_which_can_go_on(
    tmp_path, own_daemon: JsIpfs, digits, kind
):
    retries = "store.retries=2" if kind == "kubo" else "store.kubo.retries=2"
    process = start(*DIGITS, "rounds=5", *over(own_daemon, kind), retries, cwd=tmp_path)
    wait_for(lambda: rounds_of(tmp_path) >= 2, process)
    own_daemon.kill()
    code, said = ended(process)
    assert code in (2, 3)
    (line,) = said
    assert own_daemon.address in line
    assert "start" in line
    assert summary(tmp_path / "runs" / "one")["status"] == "failed"

    own_daemon.start()
    done = command("resume=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert model(tmp_path / "runs") == digits(5)


def test_without_a_daemon_nothing_is_begun(tmp_path, own_daemon: JsIpfs, digits):
    own_daemon.kill()
    words = (*DIGITS, "rounds=1", *over(own_daemon), "store.retries=1")
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert own_daemon.address in done.stderr
    assert not (tmp_path / "runs" / "one").exists()
    own_daemon.start()
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert model(tmp_path / "runs") == digits(1)


def test_garbage_collection_on_the_daemon_takes_nothing_from_a_run(
    tmp_path, own_daemon: JsIpfs, digits
):
    """Leases keep what is not pinned yet; pins keep what a resumed run needs."""
    process = start(*DIGITS, "rounds=4", "keep.models=1", *over(own_daemon), cwd=tmp_path)
    collected, problems = [], []

    def collect() -> None:
        while process.poll() is None:
            try:
                collected.append(collect_garbage(own_daemon))
            except Exception as error:
                problems.append(error)
                return

    thread = threading.Thread(target=collect)
    thread.start()
    code, said = ended(process, 200)
    thread.join(120)
    assert (code, said, problems) == (0, [], [])
    assert len(collected) >= 1
    assert model(tmp_path / "runs") == digits(4)
    assert [line["clients"]["failed"] for line in lines(tmp_path / "runs" / "one")] == [[]] * 4

    store = KuboStore(own_daemon.address)
    assert store.gc(0).removed > 0
    done = command("resume=one", "rounds=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert model(tmp_path / "runs") == digits(5)
