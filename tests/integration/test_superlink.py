"""The two lines in a plain Flower app, on a SuperLink and two SuperNodes as one deploys them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Context, RecordDict
from grids import DirectGrid
from proxies import CountingProxy, free_ports

from fedipfs.store import FolderStore
from fedipfs.trust import Identity, Member, TrustList

APP = Path(__file__).parent / "app"
NODES = 2
RUN_S, START_S, STOP_S = 90, 30, 10


Environment = dict[str, str]


class Deployment:
    """A SuperLink, and SuperNodes that reach it through one CountingProxy each.

    `server` and `nodes` are what each of them has in its environment besides.
    """

    def __init__(
        self,
        folder: Path,
        server: Environment | None = None,
        nodes: tuple[Environment, ...] = ({},) * NODES,
    ) -> None:
        self.folder, self.home = folder, folder / "flwr-home"
        self.home.mkdir(parents=True)
        self.server, self.nodes = server or {}, nodes
        self.started: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []
        self.proxies: list[CountingProxy] = []
        scripts = Path(sys.executable).parent
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join([str(scripts), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "FEDIPFS_STORE": str(folder / "store"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def start(self) -> None:
        control, fleet, *ports = free_ports(2 + NODES)
        (self.home / "config.toml").write_text(
            f'[superlink.here]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
        )
        self._spawn(
            *("flower-superlink", "--insecure", "--port", str(control)),
            *("--fleet-api-address", f"127.0.0.1:{fleet}"),
            "--disable-runtime-dependency-installation",
            environment=self.server,
        )
        wait_for(control, fleet)
        for partition, port in enumerate(ports):
            self.proxies.append(CountingProxy(fleet))
            self._spawn(
                *("flower-supernode", "--insecure", "--port", str(port)),
                *("--superlink", f"127.0.0.1:{self.proxies[-1].port}"),
                *("--node-config", f"partition-id={partition}"),
                environment=self.nodes[partition],
            )

    def _spawn(
        self, *command: str, environment: Environment | None = None
    ) -> subprocess.Popen[bytes]:
        log = self.folder / f"{len(self.logs)}-{command[0]}.log"
        self.logs.append(log)
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={**self.env, **(environment or {})},
                cwd=self.folder,
                stdout=file,
                stderr=file,
            )
        self.started.append(process)
        return process

    def run(self, app: Path, rounds: int) -> tuple[list[np.ndarray], list[int]]:
        """The final model of `app`, and per client the bytes that crossed while it ran."""
        before = [proxy.bytes for proxy in self.proxies]
        result = app / "result.npz"
        self.flwr("run", str(app), "here", "--stream", "-c", f'rounds={rounds} result="{result}"')
        crossed = [proxy.bytes - old for proxy, old in zip(self.proxies, before, strict=True)]
        assert result.exists(), "the run failed: its log follows, after those of the nodes"
        with np.load(result, allow_pickle=False) as arrays:
            return list(arrays.values()), crossed

    def flwr(self, *arguments: str) -> str:
        """What the command `flwr` prints; `flwr run --stream` ends with the run."""
        code = self._spawn("flwr", *arguments).wait(RUN_S)
        output = self.logs[-1].read_text(errors="replace")
        assert code == 0, f"flwr {arguments[0]} ended with {code}: {output[-500:]}"
        return output

    def processes(self) -> list[psutil.Process]:
        """Whatever lives with this deployment's FLWR_HOME: what it started, and their children."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == str(self.home):
                    found.append(process)
        return found

    def stop(self) -> None:
        for end in (psutil.Process.terminate, psutil.Process.kill):
            alive = self.processes()
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
            psutil.wait_procs(alive, timeout=STOP_S)
        for process in self.started:
            process.wait(STOP_S)
        for proxy in self.proxies:
            proxy.close()
        assert self.processes() == []


@contextlib.contextmanager
def deployed(folder: Path, *environments) -> Iterator[Deployment]:
    deployment = Deployment(folder, *environments)
    try:
        deployment.start()
        yield deployment
    except BaseException:
        for log in deployment.logs:
            print(f"--- {log.name}\n{log.read_text(errors='replace')}")
        raise
    finally:
        deployment.stop()


def wait_for(*ports: int) -> None:
    deadline = time.monotonic() + START_S
    for port in ports:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, f"nothing listens on {port} in {START_S} s"
                time.sleep(0.1)


def copy_app(to: Path, *, two_lines: bool) -> Path:
    shutil.copytree(APP, to, ignore=shutil.ignore_patterns("__pycache__"))
    if two_lines:
        replace(to / "client_app.py", "app = ClientApp()", "app = ClientApp(mods=[cid_mod])")
        replace(to / "client_app.py", "import numpy", "from fedipfs import cid_mod\nimport numpy")
        header = "def main(grid: Grid, context: Context) -> None:\n"
        replace(to / "server_app.py", header, header + "    grid = CidGrid(grid)\n")
        replace(to / "server_app.py", "import numpy", "from fedipfs import CidGrid\nimport numpy")
    return to


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def load(name: str):
    """The `app` of a module of the plain app, in this process."""
    spec = spec_from_file_location(name, APP / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app


def run_here(result: Path, rounds: int) -> list[np.ndarray]:
    """The final model of the plain app, in this process."""
    grid = DirectGrid(load("client_app"), NODES)
    config = {"rounds": rounds, "result": str(result)}
    load("server_app")(grid, Context(1, 1, {}, RecordDict(), config))
    with np.load(result, allow_pickle=False) as arrays:
        return list(arrays.values())


def assert_equal(models: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [array.shape for array in models] == [array.shape for array in expected]
    for mine, theirs in zip(models, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def keyless(tmp_path_factory):
    """Without keys: models and bytes per client, with the two lines and without, and the runs."""
    folder = tmp_path_factory.mktemp("keyless")
    with deployed(folder) as deployment:
        ours, slim = deployment.run(copy_app(folder / "ours", two_lines=True), rounds=2)
        plain, fat = deployment.run(copy_app(folder / "plain", two_lines=False), rounds=1)
        runs = json.loads(deployment.flwr("list", "here", "--format", "json"))["runs"]
    return ours, slim, plain, fat, runs


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_two_lines_on_a_real_superlink(tmp_path, keyless):
    ours, slim, plain, fat, runs = keyless
    per_round = [crossed / 2 for crossed in slim]
    print(f"bytes per client and round: {per_round} with FedIPFS, {fat} without")
    assert [run["status"] for run in runs] == ["finished:completed"] * 2
    assert_equal(ours, run_here(tmp_path / "two.npz", rounds=2))
    assert_equal(plain, run_here(tmp_path / "one.npz", rounds=1))
    assert max(per_round) < 40_000
    assert min(fat) > 4_000_000


def party(folder: Path, name: str, keys: dict[str, Identity], store: Path | str) -> Environment:
    """What one party has for itself: its keys, its trust list, and its way to the store."""
    home = folder / name
    home.mkdir()
    keys[name].save(home / "identity.key")
    TrustList(
        Member(key.public, "coordinator" if other == "hub" else "participant")
        for other, key in keys.items()
    ).save(home / "trust.toml")
    return {
        "FEDIPFS_IDENTITY": str(home / "identity.key"),
        "FEDIPFS_TRUST": str(home / "trust.toml"),
        "FEDIPFS_STORE": str(store),
    }


def parties(folder: Path, store_of) -> tuple[Environment, tuple[Environment, ...]]:
    """The environments of a coordinator and of each node's organization."""
    keys = {name: Identity.new(name) for name in ("hub", "north", "south")}
    folder.mkdir()
    hub, *nodes = (party(folder, name, keys, store_of(folder / name)) for name in keys)
    return hub, tuple(nodes)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_sealed_and_signed_on_a_real_superlink(tmp_path, keyless):
    """Server and nodes each have their own keys and trust list, in a folder all can read."""
    hub, nodes = parties(tmp_path / "parties", lambda home: tmp_path / "store")
    sealed = {"FEDIPFS_SEAL": "all"}
    plain, before, *_ = keyless
    keys = {**hub, **sealed}, tuple({**node, **sealed} for node in nodes)
    with deployed(tmp_path / "sealed", *keys) as deployment:
        ours, after = deployment.run(copy_app(tmp_path / "b", two_lines=True), rounds=2)
    for mine, theirs in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    print(f"bytes per client and round: {[n / 2 for n in after]}, {[n / 2 for n in before]} plain")
    assert max(after) / 2 - min(before) / 2 < 2000
    store = FolderStore(tmp_path / "store")
    held = b"".join(store.get(cid) for cid in store)
    assert ours[0].tobytes()[:64] not in held and b"num-examples" not in held


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_parties_that_share_nothing_but_a_daemon(tmp_path, ipfs_daemon):
    """Each has a cache folder of its own; a shared store is sealed without being asked to."""

    def store_of(home: Path) -> str:
        kubo = {"address": ipfs_daemon.address}
        return json.dumps({"kind": "cached", "path": str(home / "cache"), "kubo": kubo})

    environments = parties(tmp_path / "parties", store_of)
    with deployed(tmp_path / "deployment", *environments) as deployment:
        ours, _ = deployment.run(copy_app(tmp_path / "app", two_lines=True), rounds=2)
    assert_equal(ours, run_here(tmp_path / "two.npz", rounds=2))
    for name in ("hub", "north", "south"):
        store = FolderStore(tmp_path / "parties" / name / "cache", create=False)
        held = b"".join(store.get(cid) for cid in store)
        assert len(held) > 4_000_000
        assert ours[0].tobytes()[:64] not in held
