"""Data tests see no MNIST of this machine, and keep their caches to themselves."""

from __future__ import annotations

import gzip
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fedipfs.data import mnist


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user's cache; the folder `fedipfs` in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDIPFS_DATA", raising=False)
    monkeypatch.delenv("FEDIPFS_OFFLINE", raising=False)
    return tmp_path / "cache" / "fedipfs"


def idx_bytes(array: np.ndarray) -> bytes:
    """`array`, uint8, as an IDX file."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The plain bytes of four small files by name, known to `fedipfs.data.mnist` as MNIST's."""
    rng = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 20), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        files[f"{part}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{part}-labels-idx1-ubyte"] = idx_bytes(labels)
    known = [
        mnist.IdxFile(name, hashlib.sha256(plain).hexdigest(), len(plain))
        for name, plain in files.items()
    ]
    monkeypatch.setattr(mnist, "FILES", tuple(known))
    return files


@pytest.fixture
def lay() -> Callable[..., Path]:
    """Write files into a folder, packed by gzip or not."""

    def write(files: dict[str, bytes], folder: Path, *, packed: bool) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, plain in files.items():
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(plain) if packed else plain)
        return folder

    return write


class Mirror:
    """A web server on the loopback address: what `answer` yields for a path is sent, in pieces."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Callable[[str], Iterator[bytes] | None] = lambda path: None
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                pieces = mirror.answer(self.path)
                if pieces is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.end_headers()
                try:
                    for piece in pieces:
                        self.wfile.write(piece)
                        self.wfile.flush()
                except OSError:
                    pass  # the reader has had enough

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, files: dict[str, bytes]) -> None:
        """Answer NAME.gz with the file NAME, packed."""

        def answer(path: str) -> Iterator[bytes] | None:
            plain = files.get(path.removeprefix("/").removesuffix(".gz"))
            return None if plain is None else iter([gzip.compress(plain)])

        self.answer = answer

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    server = Mirror()
    yield server
    server.close()


@pytest.fixture
def dead_url() -> str:
    """A mirror where nobody listens."""
    server = Mirror()
    server.close()
    return server.url
