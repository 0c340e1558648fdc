"""The ServerApp: a run over a SuperLink, in the process that Flower starts for it.

Its run config names the submission of `python -m fedipfs.server engine=deploy`, which shows what
happens here (remote.py), or, from `flwr run`, the settings of a run as on that command's line.
"""

from __future__ import annotations

import os
import shlex
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedipfs.errors import ConfigError, FedIPFSError, RunInterrupted
from fedipfs.exchange import Vault
from fedipfs.flower_deploy import bound_patience
from fedipfs.ipld import CID
from fedipfs.observe.progress import Progress
from fedipfs.observe.relay import Relay
from fedipfs.server import parties, remote, settings
from fedipfs.server.engine.base import NodeGrid
from fedipfs.server.engine.deploy import Seat, SuperLinkGrid
from fedipfs.server.engine.serverapp import OTHERS
from fedipfs.server.membership import Home, Registry
from fedipfs.server.run import run
from fedipfs.server.submission import Submission
from fedipfs.trust.party import Party

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config asks for."""
    home = Home.load()
    name = str(context.run_config["submission"])
    if not name:
        _by_itself(home, grid, str(context.run_config["settings"]))
        return
    submission = Submission.named(home.path, name)
    job = submission.job
    with submission.held():
        os.chdir(job["folder"])
        relay = Relay(submission.events)
        nodes = Partners(home, grid, relay, submission.interrupted)
        code, problem = 0, ""
        try:
            run(job["config"], relay, resume=job["resume"], nodes=nodes)
        except FedIPFSError as error:
            code, problem = error.exit_code, str(error)
        except KeyboardInterrupt:
            code, problem = RunInterrupted.exit_code, "stopped before the first round"
        except Exception:
            code, problem = 1, traceback.format_exc()
        relay.emit("end", code, problem)
    if code:
        raise RuntimeError(problem)  # so that Flower, too, calls the run failed


class Partners:
    """Nodes (see engine/base.py) of a federation's members, behind the SuperLink of `grid`."""

    remote = True

    def __init__(
        self, home: Home, grid: Grid, progress: Progress, interrupted: Callable[[], None]
    ) -> None:
        self._home, self._grid = home, grid
        self._progress, self._interrupted = progress, interrupted

    def party(self, config: Mapping[str, Any], folder: Path) -> Party:
        """The coordinator with its own keys, and the members as they are now."""
        return parties.of_federation(self._home)

    @contextmanager
    def open(
        self,
        config: Mapping[str, Any],
        vault: Vault,
        states: dict[int, list[CID]],
        on_reply: Callable[[str, bool], None],
    ) -> Iterator[NodeGrid]:
        """The members, when all are connected or have had `engine.join_s` seconds for it."""
        registry = Registry.open(self._home)
        bound_patience(self._grid, config["engine"]["timeout_s"])

        def seats() -> dict[int, Seat]:
            return {
                each.number: Seat(each.organization, each.node_id)
                for each in registry.active
                if each.node_id is not None
            }

        grid = SuperLinkGrid(
            self._grid,
            seats,
            least=config["clients"]["min_successes"],
            join_s=config["engine"]["join_s"],
            on_reply=on_reply,
            on_wait=self._waiting,
            interrupted=self._interrupted,
        )
        grid.wait(len(seats()))
        yield grid

    def _waiting(self, names: list[str]) -> None:
        self._progress.tell(f"waiting for {', '.join(names)} to connect")


def _by_itself(home: Home, grid: Grid, given: str) -> None:
    """A run that `flwr run` started: what it tells is in Flower's log."""
    from hydra import compose, initialize_config_module

    from fedipfs.server.words import resolved

    if not os.environ.get(OTHERS):
        raise ConfigError(
            "what `flwr run` submits is not done here: its settings can name any file and task of "
            "this machine, and whoever reaches the SuperLink's Control API can submit them; if "
            "nobody else can, start it with `fedipfs-server up --flwr-run`"
        )
    overrides = ["engine=deploy", *shlex.split(given)]
    if any(each.startswith("resume=") for each in overrides):
        raise ConfigError("resume= is for `python -m fedipfs.server`; leave it out")
    with initialize_config_module("fedipfs.conf", version_base="1.3"):
        values = resolved(compose("config", overrides=overrides))
    config = settings.check(remote.fitted(values, Registry.open(home)))
    with Progress() as progress:
        run(config, progress, nodes=Partners(home, grid, progress, lambda: None))
    time.sleep(0.1)  # for the thread that carries the log away
