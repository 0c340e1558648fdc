"""The SuperNode of a site, and the stub beside it: neither has the keys that open, nor the data.

The SuperNode is Flower's, in the isolation mode in which others run its apps. The stub is that
other: it claims a task, takes the message to the worker, and hands in the reply. The Flower app
that comes with each run is neither unpacked nor imported.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from base64 import b64decode, b64encode
from typing import NoReturn

import httpx
from flwr.app import Context, Error, Message, RecordDict

from fedipfs import flower_deploy
from fedipfs.clients.home import LOOPBACK, Home
from fedipfs.clients.stub import forward
from fedipfs.errors import one_line
from fedipfs.flower_compat import (
    CLIENT_APP_CRASHED,
    error_instead,
    message_from_bytes,
    message_to_bytes,
    set_identity,
)
from fedipfs.trust import files
from fedipfs.trust.joining import Federation

log = logging.getLogger(__name__)

_BUSY_S, _IDLE_S = 0.1, 0.5  # between two looks for a task
_STAY_S = 15.0  # after a task, in which the next one is likely
_OFFLINE_S = 2.0  # for a coordinator to see that the node was gone


def supernode(home: Home, federation: Federation, port: int, poll_s: float | None) -> NoReturn:
    """Be the SuperNode of a site; its Runtime API listens at `port` on loopback."""
    _bury(home, federation)
    arguments = [
        *("--superlink", federation.address, "--root-certificates", str(home.ca)),
        *("--auth-supernode-private-key", str(home.node_key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(home.secret)),
        *("--host", LOOPBACK, "--port", str(port)),
    ]
    flower_deploy.run_supernode(arguments, poll_s)


def _bury(home: Home, federation: Federation) -> None:
    """Have the SuperLink know that this site's last SuperNode is gone, if it was killed.

    Otherwise it would take no other for a minute, and a coordinator would wait for an answer.
    """
    try:
        node_id = int(home.node_id.read_text())
        key = home.node_key.read_bytes()
    except (OSError, ValueError):
        return
    if flower_deploy.deactivate_node(federation.address, home.ca.read_bytes(), key, node_id):
        home.node_id.unlink(missing_ok=True)
        time.sleep(_OFFLINE_S)


class Stub:
    """Works off the tasks of the SuperNode whose Runtime API is at `address`."""

    def __init__(self, home: Home, address: str) -> None:
        self._home, self._address = home, address
        self._runtime = flower_deploy.runtime_client(address, home.secret.read_bytes())
        self._last = float("-inf")  # when a task was done

    def run(self) -> NoReturn:
        """Until a signal raises something here."""
        self._settle()
        while True:
            try:
                token = flower_deploy.acquire_task(self._runtime)
            except httpx.HTTPError as error:  # it starts, or starts anew
                log.debug("the SuperNode does not answer: %s", error)
                token = None
            if token is not None:
                self._work(token)
                self._last = time.monotonic()
                continue
            recent = time.monotonic() - self._last < _STAY_S
            time.sleep(_BUSY_S if recent else _IDLE_S)

    def _work(self, token: str) -> None:
        client = flower_deploy.task_client(self._address, token)
        with contextlib.closing(client), flower_deploy.beating(client):
            try:
                message, context = flower_deploy.pull_task(client)
            except Exception as error:  # Flower has no one class for what may go wrong
                log.warning("a task cannot be fetched: %s", one_line(error))
                return
            began = time.monotonic()
            self._note(token, message)
            reply = forward(message, self._home.socket)
            _hand_in(client, reply, context)
            self._home.claim.unlink(missing_ok=True)
            how = reply.error.reason if reply.has_error() else "answered"
            kind = message.metadata.message_type
            log.info("%s: %s after %.1f s", kind, one_line(how), time.monotonic() - began)

    def _note(self, token: str, message: Message) -> None:
        """Write down what is being worked on, for a stub that takes this one's place."""
        wire = message_to_bytes(Message(RecordDict(), reply_to=message))
        text = json.dumps({"token": token, "reply": b64encode(wire).decode()})
        try:
            files.write_whole(self._home.claim, text, 0o600)
        except OSError as error:
            log.warning("cannot write %s: %s", self._home.claim, error.strerror)

    def _settle(self) -> None:
        """Answer what another stub was working on when it was killed."""
        try:
            found = json.loads(self._home.claim.read_text())
            token, reply = str(found["token"]), message_from_bytes(b64decode(found["reply"]))
        except FileNotFoundError:
            return
        except Exception as problem:  # whatever JSON and protobuf raise for a damaged one
            log.warning("%s is damaged and dropped: %s", self._home.claim, one_line(problem))
            self._home.claim.unlink(missing_ok=True)
            return
        node, run = reply.metadata.src_node_id, reply.metadata.run_id
        set_identity(run_id=run, node_id=node)
        client = flower_deploy.task_client(self._address, token)
        with contextlib.closing(client):
            error = Error(CLIENT_APP_CRASHED, "its node's process ended")
            _hand_in(
                client,
                error_instead(reply, error),
                Context(run, node, {}, RecordDict(), {}),
            )
        self._home.claim.unlink(missing_ok=True)


def _hand_in(client: flower_deploy.RuntimeHttpClient, reply: Message, context: Context) -> None:
    problem = str(reply.error.reason) if reply.has_error() else ""
    try:
        flower_deploy.push_reply(client, reply, context)
        flower_deploy.finish_task(client, problem)
    except Exception as error:  # as where it is fetched; the run, for one, has ended meanwhile
        log.warning("the reply cannot be handed in: %s", one_line(error))
