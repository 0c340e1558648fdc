"""A whole federation on this machine, by the commands that real partners type.

A coordinator and its partners have processes, keys, stores, IPFS daemons and home folders of their
own, and data of their own: partner i has what client i of the local engine has, so that both must
end with the same model. The daemons exchange blocks as swarm.py says. As a program, `python
tests/support/federation.py [KEY=VALUE]...` (`make federation`) shows every step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from daemons import JsIpfs, available
from proxies import CountingProxy, free_ports
from swarm import Relay, Swarm

from fedipfs import data
from fedipfs.data import Examples

COORDINATOR = "university"
HOSPITALS = ("hospital-a", "hospital-b", "hospital-c")
EXPERIMENT = ("+experiment=mnist",)

JOIN_S, UP_S, READY_S, RUN_S, STOP_S = 60, 60, 120, 900, 30
_FINGERPRINT = re.compile(r"^  (\S.*)$", re.MULTILINE)
_PROGRAMS = {
    "fedipfs-server": "fedipfs.server",
    "fedipfs-client": "fedipfs.clients",
    "fedipfs": "fedipfs",
}
_ROLES = {  # words of a process's command line
    "worker": ("fedipfs.clients", "worker"),
    "supernode": ("fedipfs.clients", "supernode"),
    "stub": ("fedipfs.clients", "stub"),
    "superlink": ("flower-superlink",),
    "superexec": ("flower-superexec",),
    "serverapp": ("serverapp",),
}


class CommandFailed(AssertionError):
    """A command ended otherwise than it should; the message ends with what it printed."""


def write_npz(folder: Path, examples: Examples) -> dict[str, Any]:
    """Write examples as NumPy arrays; site.yaml's section `data` for them."""
    np.savez(folder / "digits.npz", image=examples.inputs, label=examples.targets)
    return {"format": "numpy", "path": "data/digits.npz"}


def write_parquet(folder: Path, examples: Examples) -> dict[str, Any]:
    """The same as a table of nested lists."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(_table(examples), folder / "digits.parquet")
    return {"format": "parquet", "path": "data/*.parquet"}


def write_arrow(folder: Path, examples: Examples) -> dict[str, Any]:
    """The same as an Arrow stream, in two files."""
    import pyarrow as pa

    table = _table(examples)
    half = len(examples) // 2
    for name, part in (("1.arrow", table.slice(0, half)), ("2.arrow", table.slice(half))):
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(part)
    return {"format": "arrow", "path": ["data/1.arrow", "data/2.arrow"]}


def _table(examples: Examples) -> Any:
    import pyarrow as pa

    images = pa.array(examples.inputs.tolist(), pa.list_(pa.list_(pa.uint8())))
    return pa.table({"image": images, "label": examples.targets})


WRITERS: tuple[Callable[[Path, Examples], dict[str, Any]], ...] = (
    write_npz,
    write_parquet,
    write_arrow,
)


@dataclass
class Party:
    """The coordinator or a partner: `folder` has its home, its `.fedipfs`, and what it wrote."""

    name: str
    folder: Path
    environment: dict[str, str]
    fingerprint: str = ""
    daemon: JsIpfs | None = None
    relay: Relay | None = None
    logs: list[Path] = field(default_factory=list)

    @property
    def home(self) -> Path:
        """Its FEDIPFS_HOME."""
        return self.folder / "fedipfs"

    def processes(self) -> list[psutil.Process]:
        """All that live with its FEDIPFS_HOME, whoever started them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FEDIPFS_HOME") == str(self.home):
                    found.append(process)
        return found

    def pids(self, role: str) -> list[int]:
        """Its processes that are a "worker", "supernode", "stub", "superlink", ... (_ROLES)."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if all(word in words for word in _ROLES[role]) and "leash" not in words:
                    found.append(process.pid)
        return found


class Background:
    """A command that goes on; what it prints is in `log`."""

    def __init__(self, party: Party, words: Sequence[str]) -> None:
        self.words = words
        self.log = party.folder / f"{len(party.logs)}-{words[0]}-{_slug(words[1])}.log"
        party.logs.append(self.log)
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                _command(words),
                env=party.environment,
                cwd=party.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for this program, which ends all in order
            )

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def expect(self, words: str, timeout_s: float, after: int = 0) -> str:
        """Wait until it has printed `words` beyond the character `after`; the line with them."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None
            for line in self.text[after:].splitlines():
                if words in line:
                    return line
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else f"did not say so in {timeout_s:.0f} s"
                raise CommandFailed(f"{self}: no {words!r}: it {why}: {self.text[-3000:]}")
            time.sleep(0.1)

    def finish(self, timeout_s: float, codes: Sequence[int] = (0,)) -> str:
        """Wait for its end; what it printed."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandFailed(
                f"{self}: no end in {timeout_s:.0f} s: {self.text[-3000:]}"
            ) from None
        if code not in codes:
            raise CommandFailed(f"{self} ended with {code}: {self.text[-3000:]}")
        return self.text

    def end(self) -> None:
        """Ask it to end, as a service manager does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it; killed if it takes more than 30 s."""
        self.end()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Run:
    """A run that is over: its folder, and what its command printed."""

    folder: Path
    text: str

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Its summary.json."""
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    @property
    def model(self) -> Path:
        """The file of the final model."""
        return self.folder / "model.safetensors"


class Federation:
    """A coordinator and partners in `folder`; a context manager in which all are connected.

    `settings` are words of every run's command line, also of the local engine's; the partners'
    data follow from them. `ipfs`: each party has a daemon (js-ipfs) of its own, else all use one
    folder. `seal`: as the setting, for all parties; None as by default. `target` is the task that
    partners allow. `proxied`: SuperNodes reach the SuperLink through a proxy each (`proxies`).
    `poll_s` is node.poll_s. `environment` is what every party has besides. `say` gets each step.
    """

    def __init__(
        self,
        folder: Path,
        organizations: Sequence[str] = HOSPITALS,
        *,
        settings: Sequence[str] = EXPERIMENT,
        ipfs: bool = True,
        seal: str | None = None,
        target: str = "fedipfs.tasks.vision:Mnist",
        proxied: bool = False,
        poll_s: float | None = None,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.settings = folder.absolute(), tuple(settings)
        self.ipfs, self.seal, self.target = ipfs, seal, target
        self.poll_s, self._proxied, self._say = poll_s, proxied, say
        self.coordinator = self._party(COORDINATOR, environment or {}, _coordinators())
        self.sites = {name: self._party(name, environment or {}, {}) for name in organizations}
        self.swarm = Swarm()
        self.proxies: dict[str, CountingProxy] = {}
        self.running: dict[str, Background] = {}  # `fedipfs-client run`, `fedipfs-server up`
        self._started: list[Background] = []
        self.fleet_port, self.http_port = free_ports(2)
        self._runs = 0

    def __enter__(self) -> Federation:
        try:
            self.start_stores()
            self.join()
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        self.stop()

    @property
    def parties(self) -> Iterator[Party]:
        """The coordinator, then the partners."""
        yield self.coordinator
        yield from self.sites.values()

    @cached_property
    def config(self) -> Any:
        """The settings that `settings` make."""
        from hydra import compose, initialize_config_module

        with initialize_config_module("fedipfs.conf", version_base="1.3"):
            return compose("config", overrides=[*self.settings, f"clients.total={len(self.sites)}"])

    @cached_property
    def dataset(self) -> data.Dataset:
        """The data set that is divided."""
        split = self.config.data
        with _environment(_coordinators()):
            return data.load("mnist", root=split.root, fallback=split.fallback)

    def start_stores(self) -> None:
        """Start each party's daemon and relay."""
        if not self.ipfs:
            self._say("# all parties use one folder as their store")
            return
        for party in self.parties:
            party.daemon = JsIpfs(party.folder / "ipfs")
            party.daemon.start()
            party.relay = self.swarm.add(party.name, party.daemon)
            self._say(f"# an IPFS daemon of {party.name}: {party.relay.address}")

    def join(self) -> None:
        """Make the coordinator's folder and the partners', and have the partners join."""
        (self.folder / "mail").mkdir()
        mail = Path("../mail")  # what goes to and fro by e-mail, from where each party types
        relay = self.coordinator.relay
        said = self.command(
            self.coordinator,
            *("fedipfs-server", "init", "--host", "localhost", "--org", COORDINATOR),
            *("--bind", "127.0.0.1", "--port", str(self.fleet_port)),
            *("--http-port", str(self.http_port)),
            *(("--peer", relay.swarm_address) if relay else ()),
        )
        self.coordinator.fingerprint = _fingerprint(said)
        for site in self.sites.values():
            said = self.command(site, "fedipfs-client", "init", "--org", site.name, "--out", mail)
            site.fingerprint = _fingerprint(said)
        for site in self.sites.values():
            self.command(
                self.coordinator,
                *("fedipfs-server", "admit", mail / f"{site.name}.join.json", "--out", mail),
                *("--fingerprint", site.fingerprint),
            )
        self._write_federation_files(mail)
        for site in self.sites.values():
            file = mail / f"{site.name}.federation.json"
            told = ("--fingerprint", self.coordinator.fingerprint)
            self.command(site, "fedipfs-client", "join", file, *told)
        self._write_sites()

    def _write_federation_files(self, mail: Path) -> None:
        """All partners' files, with all of them in it; each may have a proxy's port of its own."""
        if not self._proxied:
            self.command(self.coordinator, "fedipfs-server", "members", "--write", mail)
            return
        file = self.coordinator.home / "coordinator.toml"
        config, port = file.read_text(), f"port = {self.fleet_port} "
        assert config.count(f"\n{port}") == 1
        for name in self.sites:
            proxy = self.proxies[name] = CountingProxy(self.fleet_port)
            file.write_text(config.replace(f"\n{port}", f"\nport = {proxy.port} "))
            own = f"{name}.federation.json"
            self.command(self.coordinator, "fedipfs-server", "members", "--write", mail / name)
            (self.folder / "mail" / name / own).replace(self.folder / "mail" / own)
        file.write_text(config)

    def _write_sites(self) -> None:
        train, split = self.dataset.train, self.config.data
        parts = data.partition(
            train.targets,
            name=split.partition,
            clients=len(self.sites),
            seed=self.config.seed,
            alpha=split.alpha,
            shards_per_client=split.shards_per_client,
            classes_per_client=split.classes_per_client,
        )
        for number, (site, part) in enumerate(zip(self.sites.values(), parts, strict=True)):
            folder = site.home / "data"
            folder.mkdir()
            write = WRITERS[number % len(WRITERS)]
            section = write(folder, Examples(train.inputs[part], train.targets[part]))
            file = site.home / "site.yaml"
            values = yaml.safe_load(file.read_text())
            values["data"] |= {"inputs": "image", "target": "label", "classes": None, **section}
            values["policy"]["tasks"] = [self.target]
            values["node"]["poll_s"] = self.poll_s
            values["store"] = self._store(site)
            if self.seal is not None:
                values["seal"] = self.seal
            file.write_text(yaml.safe_dump(values, sort_keys=False))
            self._say(f"# {site.name} edits site.yaml: {len(part)} examples, {section['format']}")

    def _store(self, party: Party) -> dict[str, Any]:
        if party.relay is None:
            return {"kind": "folder", "path": str(self.folder / "store")}
        kubo: dict[str, Any] = {"address": party.relay.address}
        if party is not self.coordinator and self.coordinator.relay is not None:
            kubo["peers"] = [self.coordinator.relay.swarm_address]
        return {"kind": "cached", "path": str(party.folder / "cache"), "kubo": kubo}

    def start(self) -> None:
        """Have the SuperLink up and all partners connected."""
        self.start_coordinator()
        for site in self.sites.values():
            self.start_site(site.name, wait=False)
        for name in self.sites:
            self.running[name].expect("connected to", READY_S)

    def start_coordinator(self, *words: str) -> Background:
        """`fedipfs-server up`, until it is."""
        up = self.background(self.coordinator, "fedipfs-server", "up", *words)
        self.running[COORDINATOR] = up
        self._say("  " + up.expect("up: ", UP_S))
        return up

    def start_site(self, name: str, *, wait: bool = True) -> Background:
        """`fedipfs-client run` of a partner; with `wait`, until it is connected."""
        site = self.background(self.sites[name], "fedipfs-client", "run")
        self.running[name] = site
        if wait:
            self._say("  " + site.expect("connected to", READY_S))
        return site

    def begin(self, rounds: int, *words: str, run_id: str | None = None) -> Background:
        """Start a run with the partners."""
        return self._begin(rounds, ["engine=deploy", *self._stored()], words, run_id)

    def run(self, rounds: int, *words: str, run_id: str | None = None) -> Run:
        """A run with the partners."""
        return self.finish(self.begin(rounds, *words, run_id=run_id))

    def local(self, rounds: int, *words: str) -> Run:
        """The same run, of clients that the local engine simulates; nothing is sealed."""
        own = [f"clients.total={len(self.sites)}", "store.path=local/store", "runs_dir=local"]
        return self.finish(self._begin(rounds, own, words, None))

    def _begin(
        self, rounds: int, own: list[str], words: Sequence[str], run_id: str | None
    ) -> Background:
        self._runs += 1
        named = [f"rounds={rounds}", f"run_id={run_id or f'run-{self._runs}'}"]
        return self.background(
            self.coordinator, "fedipfs-server", *self.settings, *named, *own, *words
        )

    def finish(self, command: Background, codes: Sequence[int] = (0,)) -> Run:
        """Wait for the end of what `begin` began."""
        text = command.finish(RUN_S, codes)
        said = dict(word.partition("=")[::2] for word in command.words)
        runs = self.coordinator.folder / said.get("runs_dir", "runs")
        return Run(runs / said.get("run_id", said.get("resume", "")), text)

    def _stored(self) -> list[str]:
        store = self._store(self.coordinator)
        kubo = store.get("kubo")
        path = os.path.relpath(store["path"], self.coordinator.folder)
        words = [f"store={store['kind']}", f"store.path={path}"]
        words += [f"store.kubo.address={kubo['address']}"] if kubo else []
        if self.seal is not None:
            words.append(f"seal={self.seal}")
        if self.seal == "none":
            words.append("unsealed_because='a test'")
        return words

    def cid(self, run: Run) -> str:
        """The CID of a run's final model, unsealed."""
        model = run.model.relative_to(self.coordinator.folder)
        words = ("fedipfs", "store", "cid", "--weights", model)
        return self.command(self.coordinator, *words).strip()

    def command(self, party: Party, *words: object) -> str:
        """Run one of the three programs for a party; what it printed. Raises CommandFailed."""
        return self.background(party, *words).finish(JOIN_S)

    def background(self, party: Party, *words: object) -> Background:
        """Start one of them, and leave it running."""
        texts = [str(word) for word in words]
        self._say(f"{party.name}$ {shlex.join(texts)}")
        started = Background(party, texts)
        self._started.append(started)
        return started

    def stop(self) -> None:
        """End everything. Raises AssertionError for processes that stayed nevertheless."""
        up = self.running.get(COORDINATOR)
        for each in self._started:
            if each is not up:
                each.end()
        for each in reversed(self._started):
            each.stop()
        left = [process for party in self.parties for process in party.processes()]
        named = [f"{process.pid} {_words(process)}" for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.swarm.stop()
        for party in self.parties:
            if party.daemon is not None:
                party.daemon.stop()
        for proxy in self.proxies.values():
            proxy.close()
        assert not named, f"processes that outlived those that started them: {named}"

    def logs(self) -> Iterator[Path]:
        """All that was printed, the partners' children included."""
        for party in self.parties:
            yield from party.logs
            yield from sorted(party.home.glob("logs/*.log"))

    def _party(self, name: str, given: Mapping[str, str], own: Mapping[str, str]) -> Party:
        folder = self.folder / name
        (folder / "home").mkdir(parents=True)
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("FEDIPFS_", "FLWR_", "XDG_", "PYTEST_", "HYDRA_", "HF_"))
        }
        home = {
            "HOME": str(folder / "home"),
            "FEDIPFS_HOME": str(folder / "fedipfs"),
            "FLWR_HOME": str(folder / "fedipfs" / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        because = {"FEDIPFS_UNSEALED_BECAUSE": "a test"} if self.seal == "none" else {}
        return Party(name, folder, {**kept, **home, **because, **own, **given})


def _coordinators() -> dict[str, str]:
    """What the coordinator has besides: where MNIST is, or may be kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    names = ("FEDIPFS_DATA", "FEDIPFS_OFFLINE")
    return {
        "XDG_CACHE_HOME": cache,
        **{name: os.environ[name] for name in names if name in os.environ},
    }


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _command(words: Sequence[str]) -> list[str]:
    program, *rest = words
    return [sys.executable, "-m", _PROGRAMS[program], *rest]


def _slug(word: str) -> str:
    return re.sub(r"\W+", "-", word).strip("-")


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return "?"


def _fingerprint(said: str) -> str:
    found = _FINGERPRINT.search(said)
    if found is None:
        raise CommandFailed(f"no fingerprint in: {said}")
    return found[1].strip()


def demonstrate(federation: Federation, rounds: int, say: Callable[[str], None]) -> list[str]:
    """Train with the partners of a federation, and again with the local engine; both CIDs."""
    ours = federation.run(rounds)
    say(ours.text)
    for giver, taker in sorted(federation.swarm.moved):
        blocks, size = federation.swarm.moved[giver, taker]
        say(f"# IPFS: {giver} gave {taker} {blocks} blocks, {size:,} bytes")
    say("# the same run, of clients that one process simulates:")
    theirs = federation.local(rounds)
    cids = [federation.cid(run) for run in (ours, theirs)]
    say(f"with partners:    {cids[0]}")
    say(f"the local engine: {cids[1]}")
    return cids


def main(words: Sequence[str]) -> int:
    """Show a federation at work; `words` are settings of its runs. Returns the exit code."""
    settings = [word for word in words if not word.startswith("rounds=")]
    rounds = next((int(word[7:]) for word in words if word.startswith("rounds=")), 3)

    def say(line: str) -> None:
        print(line, flush=True)

    if why := available():
        say(f"# each party would have an IPFS daemon of its own, but {why}")
    with tempfile.TemporaryDirectory(prefix="federation-") as folder:
        options: dict[str, Any] = {"ipfs": why is None, "say": say}
        given = Federation(Path(folder), settings=[*EXPERIMENT, *settings], **options)
        with given as federation:
            cids = demonstrate(federation, rounds, say)
    if len(set(cids)) > 1:
        say("the models differ")
        return 1
    say("both ended with the same model")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CommandFailed as problem:
        sys.exit(f"{problem}")
    except KeyboardInterrupt:
        sys.exit(130)
