"""The command of a run with real partners: has a ServerApp do it, and shows what that tells."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedipfs.errors import ConfigError, FedIPFSError, RunFailed, RunInterrupted, UserError
from fedipfs.observe.progress import Progress
from fedipfs.observe.relay import Tail, show
from fedipfs.server.engine.control import Control
from fedipfs.server.engine.superlink import superlink
from fedipfs.server.membership import Home, Registry
from fedipfs.server.submission import Submission, app_files

_LOOK_S, _ASK_S = 0.1, 2.0  # between looks at the events, and questions to the SuperLink
_STOP_S = 20.0  # that a ServerApp has to end in good order
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
    clients["total"] = total
    if clients["deadline_s"] is None:
        clients["deadline_s"] = values["engine"]["timeout_s"]
    return {**values, "clients": clients}


def run(config: Mapping[str, Any], progress: Progress, *, resume: bool) -> dict[str, Any]:
    """Run the federation that the checked `config` describes; returns its summary.

    A ServerApp that is killed is followed by another, which goes on after the last completed
    round, `engine.restarts` times. Raises what server/run.py's `run` does.
    """
    home, engine = Home.load(), config["engine"]
    with superlink(home, start=engine["superlink"] == "managed") as control:
        for left in range(engine["restarts"], -1, -1):
            submission = Submission.create(home.path, config, resume=resume)
            try:
                end = _Watch(submission, control, progress).until_the_end()
            finally:
                submission.remove()
            if end.code is not None or not left:
                break
            if end.run_id is not None:
                config, resume = {**config, "run_id": end.run_id}, True
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
    run_id: str | None
    summary: dict[str, Any] | None


class _Watch:
    """One ServerApp, from its submission to its end."""

    def __init__(self, submission: Submission, control: Control, progress: Progress) -> None:
        self._submission, self._control, self._progress = submission, control, progress
        self._tail = Tail(submission.events)
        self._run_id: str | None = None
        self._summary: dict[str, Any] | None = None

    def until_the_end(self) -> _End:
        self._progress.phase("starting the ServerApp")
        run = self._control.start(app_files(), {"submission": self._submission.name})
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
                self._control.stop(run)

    def _follow(self, run: int) -> _End:
        asked = time.monotonic()
        while True:
            if (end := self._look()) is not None:
                return end
            if self._submission.state == "left" and (end := self._gone("it was killed")):
                return end
            if time.monotonic() - asked > _ASK_S:
                asked = time.monotonic()
                state = self._state(run)
                if state is not None and state[0] == "finished":
                    time.sleep(_LOOK_S)
                    return self._look() or self._gone(state[1])
            time.sleep(_LOOK_S)

    def _look(self) -> _End | None:
        """Show what is new; the end, if that is among it."""
        for what, given, named in self._tail.new():
            if what == "end":
                code, problem = given
                return _End(code, problem, self._run_id, self._summary)
            if what == "start":
                self._run_id = str(given[0])
            elif what == "finish":
                self._summary = dict(given[0])
            show(self._progress, what, given, named)
        return None

    def _gone(self, why: str) -> _End:
        return self._look() or _End(
            None, f"the ServerApp ended without a word ({why})", self._run_id, None
        )

    def _state(self, run: int) -> tuple[str, str] | None:
        """The run's status and why; None while the SuperLink is away, which may pass."""
        try:
            found = self._control.state(run)
        except RunFailed:
            return None
        return found.status, found.details or found.sub_status
