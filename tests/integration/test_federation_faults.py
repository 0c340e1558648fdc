"""What happens to a run when one of its processes, a partner or the network is gone in mid-round.

The sites train a task that tests can hold (held.py), so that each fault strikes while a round is
under way. After each, three things are looked at: how the run ended and what it says of the fault;
that every update in its records is one that its site says it made, for that round, and that there
is one a site at most; and that no site trained twice on the same message.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon_fixtures import need
from daemons import available
from federation import COORDINATOR, EXPERIMENT, HOSPITALS, Background, Federation, Party, Run
from flwr.proto import fleet_pb2 as fleet
from flwr.proto.fleet_pb2_grpc import FleetServicer, add_FleetServicer_to_server
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from held import Hold
from proxies import free_ports

from fedipfs.clients import activity

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

A, B, C = HOSPITALS
TASK = "held:Held"
ROUNDS = 4
SUPPORT = Path(__file__).parents[1] / "support"
SETTINGS = (*EXPERIMENT, f"task.target={TASK}", "train.steps=3", "clients.min_successes=2")
PROMPT_S = 60  # for what takes seconds on a machine with nothing else to do


@pytest.fixture(scope="module", autouse=True)
def no_download() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDIPFS_OFFLINE", "1")
        yield


def _environment() -> dict[str, str]:
    paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _federation(folder: Path, **options: Any) -> Iterator[Federation]:
    common: dict[str, Any] = {"settings": SETTINGS, "target": TASK, "poll_s": 0.2, "say": print}
    federation = Federation(folder, environment=_environment(), **common, **options)
    try:
        with federation:
            yield federation
    finally:  # shown with the tests that fail
        for log in federation.logs():
            print(f"--- {log.relative_to(folder)}\n{log.read_text(errors='replace')[-5000:]}")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites and a SuperLink that is up; whatever a test breaks it mends."""
    yield from _federation(tmp_path_factory.mktemp("faults"), ipfs=False, proxied=True)


@pytest.fixture(scope="module")
def undisturbed(federation: Federation) -> str:
    """The CID of the model that the run has if nothing goes wrong."""
    began = time.monotonic()
    run = federation.run(ROUNDS)
    print(f"undisturbed: {time.monotonic() - began:.1f} s")
    assert _ok(run) == [3] * ROUNDS
    _check(federation, run)
    return federation.cid(run)


@pytest.fixture(autouse=True)
def released(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing stays held."""
    yield
    for name in ("federation", "over_ipfs"):
        if name in request.fixturenames:
            for site in request.getfixturevalue(name).sites.values():
                Hold(site.home).end()


def _held(federation: Federation, *names: str, after: int = 1) -> list[Hold]:
    """Holds of sites, after they have trained for so many rounds."""
    holds = [Hold(federation.sites[name].home) for name in names]
    for hold in holds:
        hold.begin(after)
    return holds


def _reached(command: Background, *holds: Hold) -> None:
    """Wait until a run's sites are held."""
    deadline = time.monotonic() + PROMPT_S
    while not all(hold.reached for hold in holds):
        assert command.process.poll() is None, command.text
        assert time.monotonic() < deadline, f"they are not held: {command.text}"
        time.sleep(0.02)


def _lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def _ok(run: Run) -> list[int]:
    """How many clients succeeded in each round."""
    return [line["clients"]["ok"] for line in _lines(run)]


def _why(run: Run, number: int) -> dict[str, str]:
    """Who failed in a round, and why."""
    return {each["client"]: each["reason"] for each in _lines(run)[number - 1]["clients"]["failed"]}


def _shown(federation: Federation, run: Run) -> dict[str, Any]:
    """What `fedipfs runs show` says of a run, its records the last first."""
    folder = run.folder.relative_to(federation.coordinator.folder)
    words = ("fedipfs", "runs", "show", folder, "--json")
    found: dict[str, Any] = json.loads(federation.command(federation.coordinator, *words))
    return found


def _check(federation: Federation, run: Run) -> list[dict[str, str]]:
    """That no update was lost or counted twice; by round the CIDs of clients' updates."""
    shown = _shown(federation, run)
    assert shown["broken"] == ""
    *rounds, first = shown["records"]
    rounds.reverse()
    lines = _lines(run)
    assert [each["record"]["round"] for each in rounds] == [line["round"] for line in lines]
    assert [line["round"] for line in lines] == list(range(1, len(lines) + 1))
    counted = []
    for line, each in zip(lines, rounds, strict=True):
        updates = [(update["client"], update["cid"]["/"]) for update in each["record"]["updates"]]
        assert len(dict(updates)) == len(updates) == line["clients"]["ok"]
        counted.append(dict(updates))
    for name, site in federation.sites.items():
        made = set[tuple[int, str]]()
        asked = list[tuple[str, str]]()
        for entry in activity.entries(site.home / "activity.log"):
            fields = entry.fields
            if fields.get("run") != first["cid"] or fields.get("kind") != "train":
                continue
            if entry.event == "began":
                continue
            asked.append((fields.get("attempt", "0"), fields["round"]))
            if entry.event == "trained":
                made.add((int(fields["round"]), fields["update"]))
        assert len(set(asked)) == len(asked), f"{name} was asked twice in an attempt: {asked}"
        used = {(number, by[name]) for number, by in enumerate(counted, 1) if name in by}
        assert used <= made, f"{name} did not make what was counted"
    return counted


def _kill(party: Party, role: str) -> None:
    (pid,) = party.pids(role)
    os.kill(pid, signal.SIGKILL)


def _online(federation: Federation) -> int:
    said = federation.command(federation.coordinator, "fedipfs-server", "members", "--json")
    return sum(bool(each["connected"]) for each in json.loads(said)["members"])


def _wait_online(federation: Federation, timeout_s: float, count: int = 3) -> float:
    """Wait until so many sites are connected; the seconds that it took."""
    began = time.monotonic()
    while _online(federation) != count:
        assert time.monotonic() - began < timeout_s
    return time.monotonic() - began


def _interrupted_in_round_2(
    federation: Federation, strike: Callable[[Background], object], *words: str
) -> Background:
    """A run that is struck while all sites train in round 2, and then go on."""
    _wait_online(federation, PROMPT_S)
    holds = _held(federation, *HOSPITALS)
    command = federation.begin(ROUNDS, *words)
    _reached(command, *holds)
    strike(command)
    for hold in holds:
        hold.end()
    return command


def _without_c_in_round_2(
    federation: Federation,
    strike: Callable[[], object],
    *words: str,
    mend: Callable[[], object] = lambda: None,
    round_s: float = PROMPT_S,
    answers: bool = False,
) -> Run:
    """A run in which C is struck while it trains in round 2; in round 4 it is there again.

    A trains in round 3 until C is connected again, after `mend`. C itself ends its training as
    soon as it is struck, if it `answers`, else when round 2 is over.
    """
    _wait_online(federation, PROMPT_S)
    (c,) = _held(federation, C)
    (a,) = _held(federation, A, after=2)
    command = federation.begin(ROUNDS, *words)
    _reached(command, c)
    began = time.monotonic()
    strike()
    if answers:
        c.end()
    said = command.expect(f"round 2/{ROUNDS}", round_s)
    print(f"{time.monotonic() - began:.1f} s after the fault: {said.strip()}")
    _reached(command, a)
    c.end()
    mend()
    print(f"connected: after {_wait_online(federation, 120):.1f} s")
    a.end()
    run = federation.finish(command)
    print(f"the end: {time.monotonic() - began:.1f} s after the fault")
    ok = _ok(run)
    assert (ok[0], ok[1], ok[3]) == (3, 2, 3) and ok[2] in (2, 3)
    counted = _check(federation, run)
    assert C not in counted[1] and C in counted[3]
    assert list(_why(run, 2)) == [C]
    assert run.summary["rounds_completed"] == ROUNDS
    return run


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        ("supernode", "unavailable"),
        ("stub", "its node's process ended"),
        ("worker", "its worker ended"),
    ],
)
def test_a_process_of_a_partner_is_killed(federation: Federation, role: str, reason: str) -> None:
    """The round goes on without the partner, at once; its supervisor starts the process anew."""
    site = federation.sites[C]
    (before,) = site.pids(role)
    run = _without_c_in_round_2(federation, lambda: _kill(site, role))
    assert reason in _why(run, 2)[C].lower()
    (after,) = site.pids(role)
    assert after != before


def test_all_of_a_partner_is_killed(federation: Federation) -> None:
    """Its processes end with the one that was killed, and the coordinator knows at once."""
    site = federation.running[C]

    def mend() -> None:
        deadline = time.monotonic() + 15
        while left := federation.sites[C].processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        federation.start_site(C)

    # Without a good-bye from the SuperNode it would take the SuperLink 48 s.
    run = _without_c_in_round_2(federation, site.process.kill, mend=mend, round_s=25)
    assert "unavailable" in _why(run, 2)[C].lower()


def test_a_partner_that_hangs(federation: Federation) -> None:
    """It is given up at the deadline, and what it answers later counts for no round."""
    run = _without_c_in_round_2(federation, lambda: None, "engine.timeout_s=10")
    assert _why(run, 2)[C] == "no answer within 10 s"
    (late,) = [
        entry
        for entry in activity.entries(federation.sites[C].home / "activity.log")
        if entry.event == "trained"
        and entry.fields["round"] == "2"
        and entry.fields["run"] == _shown(federation, run)["records"][-1]["cid"]
    ]
    assert float(late.fields["seconds"]) >= 10


def test_the_serverapp_is_killed(federation: Federation, undisturbed: str) -> None:
    """Another goes on after the last completed round, with the same result."""
    command = _interrupted_in_round_2(
        federation, lambda _: _kill(federation.coordinator, "serverapp")
    )
    began = time.monotonic()
    run = federation.finish(command)
    print(f"the end: {time.monotonic() - began:.1f} s after the fault")
    assert "the ServerApp ended without a word" in run.text
    assert _ok(run) == [3] * ROUNDS
    _check(federation, run)
    assert federation.cid(run) == undisturbed


def test_the_superlink_is_killed(federation: Federation, undisturbed: str) -> None:
    """It is started anew, and the run does not notice."""
    command = _interrupted_in_round_2(
        federation, lambda _: _kill(federation.coordinator, "superlink")
    )
    began = time.monotonic()
    run = federation.finish(command)
    print(f"the end: {time.monotonic() - began:.1f} s after the fault")
    assert _ok(run) == [3] * ROUNDS
    _check(federation, run)
    assert federation.cid(run) == undisturbed


def _ctrl_c(command: Background) -> None:
    command.process.send_signal(signal.SIGINT)


def test_ctrl_c_and_resume(federation: Federation, undisturbed: str) -> None:
    """The same result as without."""
    command = _interrupted_in_round_2(federation, _ctrl_c)
    began = time.monotonic()
    stopped = federation.finish(command, codes=(130,))
    print(f"the end: {time.monotonic() - began:.1f} s after Ctrl-C")
    assert stopped.summary["status"] == "interrupted"
    assert stopped.summary["rounds_completed"] == 1
    assert f"resume={stopped.folder.name}" in stopped.text
    words = ("fedipfs-server", f"resume={stopped.folder.name}")
    run = federation.finish(federation.background(federation.coordinator, *words))
    assert _ok(run) == [3] * ROUNDS
    _check(federation, run)
    assert federation.cid(run) == undisturbed


def test_a_partner_is_cut_off_for_a_minute(federation: Federation) -> None:
    """The run goes on without it, and with it when it is back; its late answer does not count."""
    proxy = federation.proxies[C]
    cut = list[float]()

    def strike() -> None:
        cut.append(time.monotonic())
        proxy.cut()

    def mend() -> None:
        time.sleep(max(0.0, 60 - (time.monotonic() - cut[0])))
        proxy.mend()

    words = ("engine.timeout_s=150",)
    run = _without_c_in_round_2(federation, strike, *words, mend=mend, round_s=90)
    assert "unavailable" in _why(run, 2)[C].lower()


def test_the_superlink_that_is_up_is_used_and_else_refused_or_started(
    federation: Federation, undisturbed: str
) -> None:
    """Partners connect again by themselves."""
    federation.run(1, "engine.superlink=running")
    federation.running[COORDINATOR].stop()
    refused = federation.begin(1, "engine.superlink=running").finish(PROMPT_S, codes=(2,))
    assert "no SuperLink of university is up on this machine: start it with" in refused
    began = time.monotonic()
    run = federation.run(ROUNDS)
    print(f"with a SuperLink of its own: {time.monotonic() - began:.1f} s")
    federation.start_coordinator()
    assert _ok(run) == [3] * ROUNDS
    _check(federation, run)
    assert federation.cid(run) == undisturbed


def test_flwr_run_from_the_app_folder(federation: Federation, undisturbed: str) -> None:
    """As in docs/partners.md: refused, unless the coordinator said that it is to be done."""
    hub = federation.coordinator
    federation.command(hub, "fedipfs-server", "app", "app")
    connections = Path(hub.environment["FLWR_HOME"]) / "config.toml"
    address, ca = f"127.0.0.1:{federation.http_port}", hub.home / "ca.pem"
    with connections.open("a") as file:
        file.write(f'\n[superlink.hub]\naddress = "{address}"\nroot-certificates = "{ca}"\n')
    settings = " ".join([*SETTINGS, f"rounds={ROUNDS}", "run_id=by-flwr", *federation._stored()])
    words = ["flwr", "run", "app", "hub", "--stream", "-c", f'settings="{settings}"']
    assert "fedipfs-server up --flwr-run" in _flwr(hub, words)
    federation.running[COORDINATOR].stop()
    federation.start_coordinator("--flwr-run")
    run = Run(hub.folder / "runs" / "by-flwr", _flwr(hub, words))
    print(run.text)
    assert _ok(run) == [3] * ROUNDS
    _check(federation, run)
    assert federation.cid(run) == undisturbed


def _flwr(hub: Party, words: list[str]) -> str:
    """What a command of Flower's prints."""
    program = Path(sys.executable).with_name(words[0])
    done = subprocess.run(
        [program, *words[1:]],
        env=hub.environment,
        cwd=hub.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PROMPT_S,
    )
    return done.stdout


def test_what_sites_do_not_permit_is_refused(federation: Federation) -> None:
    """Before anything is trained, and the run's command says which rule of whose."""
    unknown = federation.begin(2, "task.target=sized:Sized")
    run = federation.finish(unknown, codes=(3,))
    print(run.text)
    for name in HOSPITALS:
        assert f"{name}: PolicyRefused: policy.tasks" in run.text
    alone = federation.begin(2, "clients.per_round=1", "clients.min_successes=1")
    run = federation.finish(alone, codes=(3,))
    print(run.text)
    assert "policy.min_cohort" in run.text


def test_who_is_removed_during_a_run_is_asked_no_more(federation: Federation) -> None:
    _wait_online(federation, PROMPT_S)
    a, c = _held(federation, A, C)
    command = federation.begin(ROUNDS, "engine.timeout_s=40")
    _reached(command, a, c)
    began = time.monotonic()
    said = federation.command(federation.coordinator, *["fedipfs-server", "remove", "--yes"], C)
    assert "its keys are revoked" in said
    a.end()
    c.end()
    command.expect(f"round 2/{ROUNDS}", PROMPT_S)
    print(f"round 2: {time.monotonic() - began:.1f} s after the removal")
    run = federation.finish(command)
    print(run.text, _why(run, 2))
    counted = _check(federation, run)
    assert [sorted(each) for each in counted[2:]] == [[A, B]] * 2
    assert [line["clients"]["selected"] for line in _lines(run)] == [3, 3, 2, 2]


def test_a_coordinator_whom_a_site_does_not_accept(federation: Federation) -> None:
    """Here one of two members; a run needs both."""
    federation.running[B].stop()
    words = ("fedipfs-client", "run", "policy.coordinators=[somebody-else]")
    site = federation.background(federation.sites[B], *words)
    site.expect("connected to", PROMPT_S)
    run = federation.finish(federation.begin(2), codes=(3,))
    print(run.text)
    assert f"{B}: PolicyRefused: policy.coordinators" in run.text


class _Fleet(FleetServicer):
    """A SuperLink that takes any node, and cancels one kind of call as if it were stopping."""

    def __init__(self, cancelled: str) -> None:
        self._cancelled = cancelled

    def RegisterNode(self, request: Any, context: Any) -> Any:
        return fleet.RegisterNodeFleetResponse(node_id=7)

    def UnregisterNode(self, request: Any, context: Any) -> Any:
        return fleet.UnregisterNodeFleetResponse()

    def ActivateNode(self, request: Any, context: Any) -> Any:
        return fleet.ActivateNodeResponse(node_id=7)

    def DeactivateNode(self, request: Any, context: Any) -> Any:
        return fleet.DeactivateNodeResponse()

    def SendNodeHeartbeat(self, request: Any, context: Any) -> Any:
        self._perhaps_cancel("SendNodeHeartbeat", context)
        return SendNodeHeartbeatResponse(success=True)

    def PullMessages(self, request: Any, context: Any) -> Any:
        self._perhaps_cancel("PullMessages", context)
        return fleet.PullMessagesResponse()

    def _perhaps_cancel(self, call: str, context: Any) -> None:
        if call == self._cancelled:
            context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")


@pytest.mark.parametrize("cancelled", ["PullMessages", "SendNodeHeartbeat"])
def test_a_supernode_that_lost_its_connection_for_good_ends(tmp_path: Path, cancelled: str) -> None:
    """So that its supervisor starts another: Flower's own process would stay, and do nothing."""
    server = grpc.server(ThreadPoolExecutor(4))
    add_FleetServicer_to_server(_Fleet(cancelled), server)
    link = server.add_insecure_port("127.0.0.1:0")
    server.start()
    (port,) = free_ports(1)
    words = f"--insecure --superlink 127.0.0.1:{link} --isolation process --host 127.0.0.1"
    arguments = [*words.split(), "--port", str(port)]
    code = f"from fedipfs.flower_deploy import run_supernode; run_supernode({arguments}, 0.2)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "FLWR_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=PROMPT_S,
        )
    finally:
        server.stop(None)
    assert done.returncode == 1
    assert "SuperNode ID: 7" in done.stderr and "CANCELLED" in done.stderr


@pytest.fixture(scope="module")
def over_ipfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The same, each with an IPFS daemon; all that is stored is sealed."""
    need(available())
    yield from _federation(tmp_path_factory.mktemp("ipfs"))


def test_the_ipfs_daemon_of_a_partner_is_killed(over_ipfs: Federation) -> None:
    """The partner says so, and takes part again when its daemon runs."""
    daemon = over_ipfs.sites[C].daemon
    assert daemon is not None
    run = _without_c_in_round_2(over_ipfs, daemon.kill, mend=daemon.start, answers=True)
    print(_why(run, 2))
    assert "Store" in _why(run, 2)[C]


def test_the_ipfs_daemon_of_the_coordinator_is_killed(over_ipfs: Federation) -> None:
    """The run ends and says why; resumed, it has the result that it would have had."""
    daemon = over_ipfs.coordinator.daemon
    assert daemon is not None
    command = _interrupted_in_round_2(over_ipfs, lambda _: daemon.kill())
    began = time.monotonic()
    failed = over_ipfs.finish(command, codes=(3,))
    print(f"the end: {time.monotonic() - began:.1f} s after the fault: {failed.text[-500:]}")
    assert failed.summary["status"] == "failed"
    daemon.start()
    words = ("fedipfs-server", f"resume={failed.folder.name}")
    run = over_ipfs.finish(over_ipfs.background(over_ipfs.coordinator, *words))
    assert _ok(run) == [3] * ROUNDS
    _check(over_ipfs, run)
    assert over_ipfs.cid(run) == over_ipfs.cid(over_ipfs.local(ROUNDS))
