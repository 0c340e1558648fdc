"""TCP on loopback for tests: free ports, and a proxy that counts and can go deaf."""

from __future__ import annotations

import contextlib
import socket
import threading


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]


class CountingProxy:
    """Forwards TCP connections from a loopback port of its own, counting bytes both ways.

    TLS passes through it unread. It may be there before what listens on `target`, and outlive it.
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self.bytes = 0
        self._target = target
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._listener = socket.create_server(("127.0.0.1", port))
        self._sockets = [self._listener]
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    def cut(self) -> None:
        """Let nothing through, as a cable that was pulled: connections stay, and are silent."""
        self._flowing.clear()

    def mend(self) -> None:
        """Let through what has been waiting, and what comes."""
        self._flowing.set()

    def close(self) -> None:
        """End all connections, and listen no more."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._flowing.set()

    def _start(self, function, *args) -> None:
        threading.Thread(target=function, args=args, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                self._start(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        self._flowing.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:  # nobody is behind it now
            near.close()
            return
        self._sockets.append(far)
        self._start(self._pump, near, far)
        self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                with self._lock:
                    self.bytes += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
