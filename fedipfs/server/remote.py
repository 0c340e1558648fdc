"""The command of a run with real partners: has a ServerApp do it, and shows what that tells."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedipfs.errors import ConfigError, FedIPFSError, RunFailed, RunInterrupted, UserError
from fedipfs.observe.progress import Progress
from fedipfs.observe.relay import Tail, show
from fedipfs.server.engine.superlink import Link, superlink
from fedipfs.server.folder import RunFolder, new_name
from fedipfs.server.membership import Home, Registry
from fedipfs.server.submission import Submission, app_files

_LOOK_S, _ASK_S = 0.1, 2.0  # between looks at the events, and questions to the SuperLink
_STOP_S = 20.0  # that a ServerApp has to end in good order
_BEGIN_S = 60.0  # that it has to begin, besides
_KINDS: dict[int, type[FedIPFSError]] = {
    2: UserError,
    3: RunFailed,
    130: RunInterrupted,
}


def fitted(values: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Settings for the members that there are: each is a client, and all are asked by default."""
    total = len(registry.active)
    if not total:
        raise ConfigError(
            "nobody is a member of this federation yet: `fedipfs-server admit NAME.join.json`"
        )
    clients = dict(values["clients"])
    if clients["per_round"] == clients["total"]:
        clients["per_round"] = total
    elif isinstance(clients["per_round"], int) and clients["per_round"] > total:
        raise ConfigError(
            f"clients.per_round={clients['per_round']} is more than there are members ({total}): "
            "lower it, or leave it out to ask all"
        )
    return {**values, "clients": {**clients, "total": total}}


def run(config: Mapping[str, Any], progress: Progress, *, resume: bool) -> dict[str, Any]:
    """Run the federation that the checked `config` describes; returns its summary.

    A ServerApp that is killed is followed by another, which goes on after the last completed
    round, `engine.restarts` times. Raises what server/run.py's `run` does.
    """
    home, engine = Home.load(), config["engine"]
    # Chosen here, so that it is known whatever becomes of the ServerApp.
    name = config["run_id"] or new_name(config["experiment"])
    config, folder = {**config, "run_id": name}, Path(config["runs_dir"], name)
    with superlink(home, start=engine["superlink"] == "managed") as link:
        for left in range(engine["restarts"], -1, -1):
            submission = Submission.create(home.path, config, resume=resume)
            try:
                end = _Watch(submission, link, progress, engine["timeout_s"]).until_the_end()
            finally:
                if submission.state != "held":
                    submission.remove()
            if end.code is not None or not left:
                break
            resume = resume or RunFolder.begun(folder)
            progress.tell(
                f"WARNING: {end.problem}; another goes on, {left} more at most", important=True
            )
    if end.code == 0 and end.summary is not None:
        return end.summary
    if end.code == 1:
        raise FedIPFSError(f"the ServerApp failed with a bug: {end.problem}")
    raise _KINDS.get(end.code or 3, RunFailed)(end.problem)


class _End(NamedTuple):
    """How a ServerApp ended: with an exit code, or None if it was gone without a word."""

    code: int | None
    problem: str
    summary: dict[str, Any] | None = None


class _Watch:
    """One ServerApp, from its submission to its end.

    A SuperLink that is away, or does not begin with the run, for `patience_s` seconds is given up.
    """

    def __init__(
        self, submission: Submission, link: Link, progress: Progress, patience_s: float
    ) -> None:
        self._submission, self._link, self._progress = submission, link, progress
        self._patience_s = patience_s
        self._tail = Tail(submission.events)
        self._summary: dict[str, Any] | None = None

    def until_the_end(self) -> _End:
        self._progress.phase("starting the ServerApp")
        control = self._link.control
        run = control.start(app_files(), {"submission": self._submission.name})
        try:
            return self._follow(run)
        except KeyboardInterrupt:
            self._submission.stop()
            deadline = time.monotonic() + _STOP_S
            while time.monotonic() < deadline and self._submission.state == "held":
                if (end := self._look()) is not None:
                    return end
                time.sleep(_LOOK_S)
            if (end := self._look()) is not None:
                return end
            raise
        finally:
            with contextlib.suppress(RunFailed):  # it is away, or the run unknown to a new one
                control.stop(run)

    def _follow(self, run: int) -> _End:
        asked = well = time.monotonic()
        while True:
            if (end := self._look()) is not None:
                return end
            state, now = self._submission.state, time.monotonic()
            if state == "left":
                return self._gone("it was killed")
            self._link.check()
            if now - asked > _ASK_S:
                asked = now
                found = self._state(run)
                if isinstance(found, _End):
                    time.sleep(_LOOK_S)
                    return self._look() or found
                if found and state == "held":
                    well = now
            if now - well > self._patience_s + (_BEGIN_S if state == "new" else 0.0):
                what = "does not begin with the run" if state == "new" else "is away"
                raise RunFailed(f"the SuperLink {what}, for {now - well:.0f} s now: see its log")
            time.sleep(_LOOK_S)

    def _look(self) -> _End | None:
        """Show what is new; the end, if that is among it."""
        for what, given, named in self._tail.new():
            if what == "end":
                code, problem = given
                return _End(code, problem, self._summary)
            if what == "finish":
                self._summary = dict(given[0])
            show(self._progress, what, given, named)
        return None

    def _gone(self, why: str) -> _End:
        return self._look() or _End(None, f"the ServerApp ended without a word ({why})")

    def _state(self, run: int) -> _End | bool:
        """The end, if the SuperLink says that it came; else whether that answers at all."""
        try:
            found = self._link.control.state(run)
        except RunFailed:
            return False  # it is away, which may pass
        if found is None:
            return self._gone("the SuperLink does not know the run any more")
        if found.status == "finished":
            return self._gone(found.details or found.sub_status)
        return True
