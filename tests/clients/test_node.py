"""SuperNodes and stubs of two partners on a real SuperLink, with TLS and the nodes' own keys."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from flwr.app import Message, RecordDict
from partner import Partners, environment
from proxies import free_ports

from fedipfs.clients.serving import Server
from fedipfs.data import Examples
from fedipfs.flower_compat import message_from_bytes, message_to_bytes, set_identity
from fedipfs.server.engine import superlink as module
from fedipfs.server.engine.superlink import superlink
from fedipfs.trust import nodekey, tls

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NAMES = ("north", "south")
START_S, RUN_S, STOP_S = 60, 120, 20
RNG = np.random.default_rng(0)

APP = {
    "pyproject.toml": b"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "trivial"
version = "1.0.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
out = ""
rounds = 1
""",
    # What a coordinator could send: nobody is to import it.
    "client_app.py": b"import no_such_module\napp = None\n",
    "server_app.py": b"""
import json
import time
import flwr.app
import flwr.serverapp
app = flwr.serverapp.ServerApp()
@app.main()
def main(grid, context):
    nodes = []
    while len(nodes) < 2:
        nodes = list(grid.get_node_ids())
        time.sleep(0.2)
    for number in range(context.run_config["rounds"]):
        began, reasons = time.time(), []
        content = flwr.app.RecordDict({"config": flwr.app.ConfigRecord({"round": number})})
        ids = set(grid.push_messages([flwr.app.Message(content, node, "train") for node in nodes]))
        while ids:
            for reply in grid.pull_messages(ids):
                ids.discard(reply.metadata.reply_to_message_id)
                reasons.append(reply.error.reason if reply.has_error() else "")
            time.sleep(0.1)
        with open(context.run_config["out"], "a") as file:
            file.write(json.dumps([time.time() - began, reasons]) + "\\n")
""",
}


class Site:
    """`fedipfs-client` of a partner, and what it prints."""

    def __init__(self, partners: Partners, name: str, *words: str, cwd: Path | None = None) -> None:
        self.home = partners.homes[name]
        self.out = self.home.path / f"{words[0]}-{time.monotonic_ns()}.out"
        with open(self.out, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedipfs.clients", *words],
                env=environment(self.home.path),
                cwd=cwd,
                stdout=out,
                stderr=out,
            )

    @property
    def text(self) -> str:
        return self.out.read_text()

    def expect(self, words: str, within: float = START_S) -> None:
        deadline = time.monotonic() + within
        while words not in self.text:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text
            time.sleep(0.05)

    def children(self) -> dict[str, psutil.Process]:
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error, IndexError):
                found[child.cmdline()[5]] = child
        return found

    def stop(self, end: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(end)
        return self.process.wait(STOP_S)


class Link:
    """A SuperLink, and the sites that a test starts."""

    def __init__(self, folder, control, partners: Partners) -> None:
        self.folder, self.control, self.partners = folder, control, partners
        self.sites: list[Site] = []
        self.runs = 0

    def site(self, name: str, *words: str) -> Site:
        self.sites.append(Site(self.partners, name, *words))
        return self.sites[-1]

    def nodes(self, *words: str) -> list[Site]:
        sites = [self.site(name, "node", *words) for name in NAMES]
        for site in sites:
            site.expect("connected to localhost")
        return sites

    def begin(self, rounds: int):
        """Start a run; its rounds so far are what the result returns: seconds and reasons."""
        self.runs += 1
        out = self.folder / f"out-{self.runs}.json"
        run = self.control.start(APP, {"out": str(out), "rounds": rounds})

        def result():
            lines = out.read_text().split("\n")[:-1] if out.exists() else []
            return [json.loads(line) for line in lines]

        return run, result

    def run(self, rounds: int):
        run, result = self.begin(rounds)
        deadline = time.monotonic() + RUN_S
        while self.control.state(run).status != "finished":
            assert time.monotonic() < deadline, [site.text for site in self.sites]
            time.sleep(0.2)
        assert len(result()) == rounds, self.control.state(run)
        return result()


@pytest.fixture(scope="module")
def partners(tmp_path_factory):
    fleet, http = free_ports(2)
    data = [Examples(RNG.integers(0, 16, (40, 8, 8), np.uint8), RNG.integers(0, 10, 40))] * 2
    folder = tmp_path_factory.mktemp("link")
    return Partners(folder, NAMES, data, fleet_port=fleet, http_port=http)


@pytest.fixture(scope="module")
def control(partners):
    """A SuperLink that takes any Flower app, as FedIPFS's own does not: the tests bring theirs."""

    def any_app(home, others):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**module._environment(home), "PATH": path}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_exec_environment", any_app)
        with superlink(partners.hub, start=True) as link:
            yield link.control


@pytest.fixture
def link(partners, control, tmp_path):
    found = Link(tmp_path, control, partners)
    try:
        yield found
    except BaseException:
        for site in found.sites:
            print(site.text)
        raise
    finally:
        for site in found.sites:
            site.stop()
    left = [p for name in NAMES for p in processes(str(partners.homes[name].path))]
    assert left == []


def processes(home: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FEDIPFS_HOME") == home:
                found.append(process)
    return found


@pytest.fixture
def workers(partners):
    """Workers that echo, after `pause` seconds; `asked` counts what came to north's."""
    found = SimpleNamespace(pause=0.0, asked=0)

    def norths(wire: bytes) -> bytes:
        found.asked += 1
        return answer(wire)

    def answer(wire: bytes) -> bytes:
        message = message_from_bytes(wire)
        time.sleep(found.pause)
        set_identity(run_id=1, node_id=2)
        return message_to_bytes(Message(RecordDict(), reply_to=message))

    servers = [
        Server(partners.homes[name].socket, each, timeout_s=60)
        for name, each in zip(NAMES, (norths, answer), strict=True)
    ]
    for server in servers:
        threading.Thread(target=server.serve, daemon=True).start()
    yield found
    for server in servers:
        server.close()


@pytest.mark.parametrize("words", [(), ("node.poll_s=0.1",)])
def test_rounds_one_after_the_other_and_what_an_idle_site_costs(link, workers, words):
    """How long they take is for benchmarks/deploy.py to say."""
    sites = link.nodes(*words)
    rounds = link.run(8)
    seconds = [round(each, 2) for each, _ in rounds]
    assert all(reasons == ["", ""] for _, reasons in rounds)
    time.sleep(16)  # after a message the stub looks more often for a while
    cost = max(idle(site, 10) for site in sites)
    print(f"seconds a round {words}: {seconds}; an idle site takes {cost:.1%} of a core")
    if words:  # not to be had with Flower's own poll, every 3 s
        assert min(seconds) < 3
    assert cost < 0.3  # nobody waits by spinning


def idle(site: Site, seconds: float) -> float:
    """The share of a core that a site's processes take."""
    found = [psutil.Process(site.process.pid), *site.children().values()]
    assert len(found) == 3
    before = [sum(process.cpu_times()[:2]) for process in found]
    time.sleep(seconds)
    after = [sum(process.cpu_times()[:2]) for process in found]
    return (sum(after) - sum(before)) / seconds


def test_who_is_killed_in_mid_round_is_said_so_at_once(link, workers):
    """By SIGKILL: the stub in the first round, the SuperNode in the third; then all is well."""
    north, _ = link.nodes("node.poll_s=0.1")
    workers.pause = 3.0
    run, result = link.begin(8)
    wait(lambda: workers.asked == 1)
    north.children()["stub"].kill()
    wait(lambda: len(result()) == 2 and workers.asked == 3)
    north.children()["supernode"].kill()
    wait(lambda: len(result()) == 8)
    wait(lambda: link.control.state(run).status == "finished")
    rounds = result()
    assert "its node's process ended" in rounds[0][1]
    assert any("Unavailable" in reason for reason in rounds[2][1])
    assert max(seconds for seconds, _ in rounds[:3]) < 15
    assert rounds[7][1] == ["", ""]
    assert north.text.count("connected to localhost") == 2
    assert "the stub was ended by signal 9" in north.text
    assert "the supernode was ended by signal 9" in north.text


def wait(condition, within: float = RUN_S) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_whole_site(link, workers, partners):
    """Its worker starts first; what came is said; a second one is refused; Ctrl-C ends it."""
    link.site("south", "node").expect("connected to localhost")
    home = partners.homes["north"]
    home.socket.unlink()  # its own worker is another
    site = link.site("north", "run", "node.poll_s=0.1")
    site.expect("connected to localhost")
    assert site.text.index("ready: 40 examples") < site.text.index("as north (number 0)")
    (_, reasons), *_ = link.run(1)
    assert sorted(reasons) == ["", reason := max(reasons)]
    assert reason.startswith("SignatureMissing: ")
    site.expect("refused")
    again = link.site("north", "run")
    assert again.process.wait(START_S) == 2
    assert "this site runs already" in again.text and len(again.text.splitlines()) == 1
    before = site.children()["worker"]
    before.kill()
    site.expect("the worker was ended by signal 9")
    wait(lambda: site.text.count("ready: ") == 2)
    assert site.children()["worker"].pid != before.pid
    assert os.stat(home.logs / "worker.log").st_mode & 0o077 == 0
    assert site.stop(signal.SIGINT) == 130
    assert processes(str(home.path)) == []


def test_a_supervisor_that_is_killed_takes_all_with_it(link, workers, partners):
    home = partners.homes["north"]
    site = link.site("north", "run")
    site.expect("connected to localhost")
    assert set(site.children()) == {"worker", "supernode", "stub"}
    site.process.kill()
    site.process.wait()
    wait(lambda: processes(str(home.path)) == [], 10)


def test_a_configuration_that_cannot_work_is_said_so_once(link, partners):
    site = link.site("north", "run", "policy.min_examples=0")
    assert site.process.wait(START_S) == 2
    assert "policy.min_examples" in site.text and len(site.text.splitlines()) == 1
    (missing := partners.homes["north"].path / "own.npz").rename(missing.with_suffix(".gone"))
    try:
        site = link.site("north", "run")
        assert site.process.wait(START_S) == 2
        assert len(site.text.splitlines()) == 1 and "own.npz" in site.text
    finally:
        missing.with_suffix(".gone").rename(missing)


def test_an_unknown_key_and_a_certificate_of_another_are_explained(link, partners):
    home = partners.homes["south"]
    key, ca = home.node_key.read_text(), home.ca.read_text()
    try:
        home.node_key.write_text(nodekey.new())
        site = link.site("south", "node")
        assert site.process.wait(START_S) == 2
        assert "does not take this node: south is no member there" in site.text.splitlines()[-1]
        home.node_key.write_text(key)
        home.ca.write_text(tls.new_authority("another", datetime.now(UTC)).certificate)
        site = link.site("south", "node")
        assert site.process.wait(START_S) == 2
        (line,) = site.text.splitlines()
        assert line.startswith("fedipfs-client: the certificate of localhost")
    finally:
        home.node_key.write_text(key)
        home.ca.write_text(ca)


@pytest.fixture
def away(tmp_path):
    """Partners of a coordinator that is not there."""
    fleet, http = free_ports(2)
    data = [Examples(np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int64))] * 2
    return Partners(tmp_path, NAMES, data, fleet_port=fleet, http_port=http)


def test_a_folder_in_which_others_can_write_is_no_place_to_import_from(away, tmp_path):
    """`torch.py` there is not torch; a task's file is looked for beside site.yaml."""
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("click", "flwr", "numpy", "torch"):
        (hostile / f"{name}.py").write_text(f"open({str(hostile / 'ran')!r}, 'a').write('x')\n")
    site = Site(away, "north", "run", cwd=hostile)
    try:
        site.expect("ready: 2 examples")
        site.expect("does not answer; trying until it does")
        children = site.children()
        assert set(children) == {"worker", "supernode", "stub"}
        assert {each.cwd() for each in children.values()} == {str(site.home.path)}
    finally:
        assert site.stop() == 0
    assert not (hostile / "ran").exists()


def test_run_and_node_do_not_both_work_in_one_home(away):
    first = Site(away, "north", "node")
    try:
        first.expect("does not answer; trying until it does")
        second = Site(away, "north", "run")
        assert second.process.wait(START_S) == 2
        (line,) = second.text.splitlines()
        assert "this site's node runs already" in line
    finally:
        assert first.stop() == 0


def test_a_superlink_that_is_away_is_tried_until_it_is_there(away):
    site = Site(away, "north", "node")
    try:
        site.expect("does not answer; trying until it does")
        with superlink(away.hub, start=True):
            site.expect("connected to localhost", 90)
    finally:
        assert site.stop() == 0
    assert processes(str(away.homes["north"].path)) == []
