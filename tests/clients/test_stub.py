"""The stub, at what its place leaves behind and at a SuperNode that answers nonsense."""

from __future__ import annotations

import json
import os
import signal
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from children import child, wait
from flwr.app import Message, RecordDict

from fedipfs.clients.home import Home
from fedipfs.clients.node import Stub
from fedipfs.flower_compat import message_to_bytes, set_identity

STOP_S = 20


class Nonsense(BaseHTTPRequestHandler):
    """Answers everything with what is no protobuf; but has no task when asked for one."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        if name == "acquire-task":
            self.server.done.set()
        body = b"" if name == "acquire-task" else b"\xff\xff\xff"
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def supernode():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Nonsense)
    server.asked, server.done = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def claim() -> str:
    set_identity(run_id=1, node_id=2)
    message = Message(RecordDict(), 2, "train")
    return b64encode(message_to_bytes(message)).decode()


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("", []),
        ("{}", []),
        (json.dumps({"token": "t", "reply": b64encode(b"\xff\xff").decode()}), []),
        (json.dumps({"token": "t", "reply": "~"}), []),
        (None, ["push-messages"]),  # what is whole is answered; that it is not taken is no matter
    ],
)
def test_a_claim_that_is_damaged_or_cannot_be_settled_is_dropped(tmp_path, supernode, text, asked):
    home = Home(tmp_path)
    home.flower.mkdir()
    home.secret.write_text("secret")
    home.claim.write_text(json.dumps({"token": "t", "reply": claim()}) if text is None else text)
    stub = Stub(home, f"127.0.0.1:{supernode.server_port}")
    pid = child(stub.run)
    try:
        assert supernode.done.wait(STOP_S)
    finally:
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
    assert not home.claim.exists()
    assert supernode.asked[: len(asked) + 1] == [*asked, "acquire-task"]
