"""Warm workers that answer byte requests: in processes, or in this one for debugging.

A worker is what a factory "module:name" returns for some options: a callable from request bytes
to reply bytes. Processes are forked from a server process that has imported the slow modules
once, so a worker starts in milliseconds and one that died is replaced as fast.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any, NamedTuple, Protocol

from fedipfs.errors import one_line

Handler = Callable[[bytes], bytes]
_REPLY, _FAILED = b"+", b"-"


class Outcome(NamedTuple):
    """The reply to job `job`, or why there is none."""

    job: str
    reply: bytes | None
    reason: str = ""


class Pool(Protocol):
    """Takes jobs, gives outcomes in whatever order they come."""

    def submit(self, job: str, request: bytes) -> None: ...

    def collect(self, timeout_s: float | None) -> list[Outcome]:
        """At least one outcome if any job is under way and the time suffices, else none."""
        ...

    def cancel(self, jobs: Set[str]) -> None:
        """Stop these jobs; they have no outcome."""
        ...

    def close(self) -> None: ...


def warm_up(modules: Sequence[str]) -> None:
    """Start importing `modules` in the process that workers are forked from; returns at once."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Keep freed memory: giving it back and faulting it in again costs more than training does.
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    forkserver.set_forkserver_preload(list(modules))
    # Ctrl-C reaches the fork server, too, and it ignores that only once it has imported: start it
    # with the signal blocked, which is inherited (the resource tracker, if first, unblocks it).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SerialPool:
    """Everything in this process, one job after another; for debugging with breakpoints."""

    def __init__(self, factory: str, options: Mapping[str, Any]) -> None:
        self._handle = _resolve(factory)(options)
        self._jobs: deque[tuple[str, bytes]] = deque()

    def submit(self, job: str, request: bytes) -> None:
        self._jobs.append((job, request))

    def collect(self, timeout_s: float | None) -> list[Outcome]:
        if not self._jobs:
            return []
        job, request = self._jobs.popleft()
        return [_outcome(job, _answer(self._handle, request))]

    def cancel(self, jobs: Set[str]) -> None:
        self._jobs = deque(each for each in self._jobs if each[0] not in jobs)

    def close(self) -> None:
        self._jobs.clear()


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    job: str | None = None
    deadline: float = 0.0


class ProcessPool:
    """`workers` processes; a job that takes longer than `timeout_s`, or whose process dies, fails.

    The process is then replaced, and the other jobs are not touched.
    """

    def __init__(
        self, factory: str, options: Mapping[str, Any], *, workers: int, timeout_s: float
    ) -> None:
        self._factory, self._options, self._timeout_s = factory, dict(options), timeout_s
        methods = multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        self._queue: deque[tuple[str, bytes]] = deque()
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def submit(self, job: str, request: bytes) -> None:
        self._queue.append((job, request))
        self._feed()

    def collect(self, timeout_s: float | None) -> list[Outcome]:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            busy = [worker for worker in self._workers if worker.job is not None]
            if not busy:
                return []
            first = min(worker.deadline for worker in busy)
            until = first if end is None else min(first, end)
            ready = connection.wait(
                [worker.pipe for worker in busy], max(0.0, until - time.monotonic())
            )
            now = time.monotonic()
            outcomes = []
            for worker in busy:
                if worker.pipe in ready:
                    outcomes.append(self._receive(worker))
                elif now >= worker.deadline:
                    reason = f"no answer within engine.timeout_s={self._timeout_s:g}"
                    outcomes.append(self._replace(worker, reason))
            self._feed()
            if outcomes or (end is not None and now >= end):
                return outcomes

    def cancel(self, jobs: Set[str]) -> None:
        self._queue = deque(each for each in self._queue if each[0] not in jobs)
        for worker in self._workers:
            if worker.job in jobs:
                self._replace(worker, "cancelled")
        self._feed()

    def close(self) -> None:
        self._queue.clear()
        for worker in self._workers:
            worker.process.kill()  # nothing is lost: what a worker stores, it stores atomically
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_serve, args=(theirs, self._factory, self._options), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _feed(self) -> None:
        for index, worker in enumerate(self._workers):
            if not self._queue:
                return
            if worker.job is None:
                if not worker.process.is_alive():  # it died idle: no client's fault
                    worker = self._workers[index] = self._start()
                job, request = self._queue.popleft()
                worker.job, worker.deadline = job, time.monotonic() + self._timeout_s
                # A process that dies now shows when its answer is awaited.
                with contextlib.suppress(OSError):
                    worker.pipe.send_bytes(request)

    def _receive(self, worker: _Worker) -> Outcome:
        try:
            reply = worker.pipe.recv_bytes()
        except (EOFError, OSError):  # also in the middle of an answer
            worker.process.join(5)
            code = worker.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return self._replace(worker, f"its process ended with {how}")
        job, worker.job = worker.job, None
        assert job is not None
        return _outcome(job, reply)

    def _replace(self, worker: _Worker, reason: str) -> Outcome:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        assert worker.job is not None
        self._workers[self._workers.index(worker)] = self._start()
        return Outcome(worker.job, None, reason)


def _resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _serve(pipe: connection.Connection, factory: str, options: Mapping[str, Any]) -> None:
    """A worker process: answer requests until the other end of the pipe is gone."""
    # Ctrl-C reaches the whole process group; the server decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        handle: Handler = _resolve(factory)(options)
    except Exception as problem:
        reason = f"its worker cannot start: {type(problem).__name__}: {problem}"
        handle = partial(_refuse, reason)
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        while True:
            pipe.send_bytes(_answer(handle, pipe.recv_bytes()))


def _refuse(reason: str, request: bytes) -> bytes:
    raise RuntimeError(reason)


def _answer(handle: Handler, request: bytes) -> bytes:
    """What goes through the pipe: a mark and the reply, or a mark and why there is none."""
    try:
        return _REPLY + handle(request)
    except Exception as problem:
        return _FAILED + one_line(problem).encode()


def _outcome(job: str, answer: bytes) -> Outcome:
    mark, rest = answer[:1], answer[1:]
    return Outcome(job, rest) if mark == _REPLY else Outcome(job, None, rest.decode())


def _die_with_parent() -> None:
    """End a worker whose server was killed, also in the middle of a job."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
