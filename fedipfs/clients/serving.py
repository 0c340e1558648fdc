"""The socket of a resident worker: who may use it, and one message at a time.

Whoever may connect may still send anything, or nothing: each connection has some seconds for its
frame, in a thread of its own, and where there are too many the one that has sent least recently
makes room. What is asked is answered on the main thread, where signals arrive.
"""

from __future__ import annotations

import contextlib
import faulthandler
import grp
import logging
import os
import pwd
import queue
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from fedipfs.clients import wire
from fedipfs.errors import ConfigError, FedIPFSError, FormatError, ParallelFailed, one_line

log = logging.getLogger(__name__)

STUCK = 75  # the exit code of a worker that gave a message up (EX_TEMPFAIL)
_READ_S = 10.0  # for a request to arrive
_WRITE_S = 10.0  # for an answer to be taken
_MOST = 32  # connections whose request has not arrived
_MORE_S = 10.0  # after which one that does not even get to give up is ended

Answer = Callable[[bytes], bytes]


class Server:
    """Answers messages at the socket `path`, by `answer`, which raises what went wrong.

    A message that takes longer than `timeout_s` ends the process, with STUCK: whoever started it
    starts it anew. Members of `group` may connect, besides the user of this process. Raises
    ConfigError for a group that there is not, or a folder where no socket can be made.
    """

    def __init__(
        self, path: Path, answer: Answer, *, timeout_s: float, group: str | None = None
    ) -> None:
        self._path, self._answer = path, answer
        self._timeout_s, self._group = timeout_s, group
        self._waiting: queue.SimpleQueue[tuple[socket.socket, bytes]] = queue.SimpleQueue()
        self._unread: dict[socket.socket, None] = {}  # by age
        self._lock = threading.Lock()
        self._closed = False
        number = None if group is None else _group(group)
        try:
            self._listener = wire.listen(path, 0o600 if number is None else 0o660, number)
        except OSError as error:
            raise ConfigError(
                f"{path}: no socket can be made there ({error.strerror or error})"
            ) from None

    def close(self) -> None:
        """Listen no longer, and take the socket away."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for a connection
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def serve(self) -> None:
        """Serve until a signal raises something here."""
        threading.Thread(target=self._accept, daemon=True).start()
        while True:
            self._handle(*self._waiting.get())

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # too many open files, for one: it passes
                if self._closed:
                    return
                log.warning("cannot accept: %s", error)
                threading.Event().wait(0.2)
                continue
            if not self._allowed(connection):
                connection.close()
                continue
            with self._lock:
                self._unread[connection] = None
                oldest = next(iter(self._unread)) if len(self._unread) > _MOST else None
            if oldest is not None:
                with contextlib.suppress(OSError):  # its thread then closes it
                    oldest.shutdown(socket.SHUT_RDWR)
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _allowed(self, connection: socket.socket) -> bool:
        """Whether the process at the other end is of a user who may ask."""
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, user, primary = struct.unpack("3i", found)
        if user == os.geteuid() or (self._group is not None and _in(self._group, user, primary)):
            return True
        log.warning("process %d of user %d may not use this socket", pid, user)
        return False

    def _read(self, connection: socket.socket) -> None:
        try:
            header, body = wire.receive(connection, _READ_S)
            if header.get("kind") == "ping":
                connection.settimeout(_WRITE_S)
                wire.send(connection, {"kind": "ready"})
            elif header.get("kind") == "message":
                self._waiting.put((connection, body))
                return
        except (OSError, FormatError) as error:
            log.debug("a request that is none: %s", error)
        finally:
            with self._lock:
                self._unread.pop(connection, None)
        connection.close()

    def _handle(self, connection: socket.socket, request: bytes) -> None:
        with connection:
            first = threading.Lock()  # taken once, by who answers: this thread or the watchdog
            watchdog = threading.Timer(self._timeout_s, self._give_up, [connection, first])
            watchdog.daemon = True
            watchdog.start()
            # Where what hangs does not even let Python's threads run, this one still does.
            faulthandler.dump_traceback_later(self._timeout_s + _MORE_S, exit=True)
            try:
                header, body = {"kind": "answer"}, self._answer(request)
            except (Exception, SystemExit) as problem:  # what it runs may be anybody's task
                header, body = {"kind": "failure", "reason": _told(problem)}, b""
            finally:
                watchdog.cancel()
                faulthandler.cancel_dump_traceback_later()
            if not first.acquire(blocking=False):
                watchdog.join()  # it ends this process
            try:
                connection.settimeout(_WRITE_S)
                try:
                    wire.send(connection, header, body)
                except FormatError as error:
                    wire.send(connection, {"kind": "failure", "reason": f"EdgeError: {error}"})
            except OSError as error:
                log.warning("nobody took the answer: %s", error)

    def _give_up(self, connection: socket.socket, first: threading.Lock) -> None:
        if not first.acquire(blocking=False):
            return  # the answer is being sent
        reason = f"no answer within client.timeout_s={self._timeout_s:g}"
        log.error("%s: this worker ends", reason)
        with contextlib.suppress(OSError, FormatError):
            connection.settimeout(_WRITE_S)
            wire.send(connection, {"kind": "failure", "reason": reason})
        sys.stderr.flush()
        os._exit(STUCK)


def _told(problem: BaseException) -> str:
    """What the coordinator hears of a failure, whose text may quote this site's data or paths."""
    kind = type(problem).__name__
    # That of processes which train together quotes what went wrong in them.
    if isinstance(problem, FedIPFSError) and not isinstance(problem, ParallelFailed):
        log.info("%s: %s", kind, one_line(problem))
        log.debug("", exc_info=problem)
        return one_line(f"{kind}: {problem}")
    log.error("%s: %s", kind, one_line(problem), exc_info=problem)
    return f"failed ({one_line(kind, 80)}): the site's own log says why"


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"node.group={name!r:.80}: this machine has no such group") from None


def _in(group: str, user: int, primary: int) -> bool:
    """Whether a user is in a group, as the machine knows it now."""
    try:
        number = grp.getgrnam(group).gr_gid
        return number == primary or number in os.getgrouplist(pwd.getpwuid(user).pw_name, primary)
    except (KeyError, OSError):
        return False
