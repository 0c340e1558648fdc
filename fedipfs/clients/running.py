"""A whole site (`fedipfs-client run`), or its SuperNode and stub alone (`node`), kept up."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

from fedipfs.clients.activity import Entry, parse
from fedipfs.clients.home import LOOPBACK, VARIABLE, Home, alone
from fedipfs.clients.site import SiteFile
from fedipfs.clients.supervisor import Child, Supervisor, Why, follow
from fedipfs.errors import ConfigError, one_line
from fedipfs.trust import files
from fedipfs.trust.identity import PASSPHRASE
from fedipfs.trust.joining import Federation

PROGRAM = "fedipfs-client"
READY = "ready: "  # what begins the line with which a worker says that it is
_NODE = re.compile(r"SuperNode ID: (\d+)")
_TRYING = re.compile(r"Connection attempt failed, retrying")

Say = Callable[[str], None]


def run_site(site: SiteFile, say: Say, *, words: Sequence[str], passphrase: str | None) -> None:
    """Keep worker, SuperNode and stub up until a signal raises something.

    `words` are the options that give the children the same site. Raises ConfigError, RunError
    where the site, or its node, runs already, NodeFailed and NodeUnusable.
    """
    with (
        alone(site.home.state / "run.lock", "this site"),
        _alone_as_node(site.home),
        _activity(site.home, say),
    ):
        secret = {} if passphrase is None else {PASSPHRASE: passphrase}
        worker = Child(
            "worker",
            ["worker", *words],
            {**_environment(site.home), **secret},
            heard=lambda line: say(line) if line.startswith(READY) else None,
            explain=_own_words,
            ready=READY,
        )
        Supervisor(site.home, [worker, *_node(site, say, words)], say).run()


def run_node(site: SiteFile, say: Say, *, words: Sequence[str]) -> None:
    """Keep SuperNode and stub up, for a worker that runs by itself; else as `run_site`."""
    with _alone_as_node(site.home):
        Supervisor(site.home, _node(site, say, words), say).run()


def _alone_as_node(home: Home) -> contextlib.AbstractContextManager[None]:
    return alone(home.flower / "node.lock", "this site's node")


def _node(site: SiteFile, say: Say, words: Sequence[str]) -> list[Child]:
    federation = site.federation()
    _make_secret(site.home)
    port = str(_port(site.node.port))
    own = _environment(site.home)
    own.pop(PASSPHRASE, None)  # the keys are none of theirs
    return [
        Child(
            "supernode",
            ["supernode", "--port", port, *words],
            own,
            heard=_Heard(site.home, federation, say),
            explain=lambda code, lines: _own_words(code, lines) or _refusal(federation, lines),
        ),
        Child("stub", ["stub", "--port", port, *words], own, explain=_own_words),
    ]


def _environment(home: Home) -> dict[str, str]:
    """What the site's processes have in their environment."""
    own = {
        VARIABLE: str(home.path),
        "FLWR_HOME": str(home.flower),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    for name in ("NO_PROXY", "no_proxy"):
        given = [each for each in os.environ.get(name, "").split(",") if each]
        own[name] = ",".join(given if LOOPBACK in given else [*given, LOOPBACK])
    return {**os.environ, **own}


def _make_secret(home: Home) -> None:
    """By which the SuperNode knows the stub."""
    home.flower.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        files.write_new(home.secret, secrets.token_hex(32))


def _port(wanted: int | None) -> int:
    """`wanted`, or any that is free. Raises ConfigError for one in use."""
    try:
        with contextlib.closing(socket.create_server((LOOPBACK, wanted or 0))) as found:
            return int(found.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"node.port={wanted} cannot be used ({error.strerror or error}): choose another, or "
            "null for any that is free"
        ) from None


class _Heard:
    """What of a SuperNode's log is worth a line."""

    def __init__(self, home: Home, federation: Federation, say: Say) -> None:
        self._home, self._federation, self._say = home, federation, say
        self._trying = False

    def __call__(self, line: str) -> None:
        federation = self._federation
        if found := _NODE.search(line):
            self._trying = False
            with contextlib.suppress(OSError):  # for a SuperNode that takes this one's place
                files.write_whole(self._home.node_id, f"{found[1]}\n", 0o600)
            self._say(
                f"connected to {federation.address} as {federation.organization} "
                f"(number {federation.number})"
            )
        elif _TRYING.search(line) and not self._trying:
            self._trying = True
            self._say(f"{federation.address} does not answer; trying until it does")
        elif "Connection successful" in line and self._trying:
            self._trying = False
            self._say(f"{federation.address} answers again")


def _own_words(code: int, lines: Sequence[str]) -> Why | None:
    """What one of our own commands says before it ends for good."""
    last = lines[-1] if lines else ""
    if code in (2, 3) and last.startswith(f"{PROGRAM}: "):
        return Why(last.removeprefix(f"{PROGRAM}: "), final=True)
    return None


def _refusal(federation: Federation, lines: Sequence[str]) -> Why | None:
    """Why a SuperNode ended that the SuperLink refuses, or that refuses the SuperLink."""
    said, where = "\n".join(lines), federation.address
    if "certificate has expired" in said:
        return Why(
            f"the certificate of {where} has expired: ask the coordinator to run `fedipfs-server "
            "renew`; or this machine's clock is wrong",
            final=True,
        )
    if "CERTIFICATE_VERIFY_FAILED" in said or "is not in peer certificate" in said:
        return Why(
            f"the certificate of {where} is not one that the coordinator vouches for: somebody "
            "answers in its place, or it has new keys; ask for a new federation file, and compare "
            "the fingerprint when you run `fedipfs-client join`",
            final=True,
        )
    # The rest may pass: a SuperLink that has just begun, a process that has just been killed.
    if "[code: 2004]" in said:
        return Why(
            f"{where} does not take this node: {federation.organization} is no member there, or "
            "another process has connected with its key; ask the coordinator (`fedipfs-server "
            "members`), or stop the other",
            final=False,
        )
    if "terminated gracefully" in said and not _NODE.search(said):
        return Why(
            f"{where} does not accept the signature of this node: is this machine's clock right, "
            f"and {federation.organization} a member still?",
            final=False,
        )
    return None


@contextlib.contextmanager
def _activity(home: Home, say: Say) -> Iterator[None]:
    stop = threading.Event()

    def told(line: str) -> None:
        entry = parse(line)
        if entry is not None and (text := describe(entry)):
            say(text)

    thread = threading.Thread(target=follow, args=(home.activity, told, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5.0)


def describe(entry: Entry) -> str | None:
    """A line of the activity log in a partner's words; None for what needs none."""
    found = entry.fields
    what = f"round {found['round']}" if "round" in found else found.get("kind", "a message")
    whom = f" for {found['coordinator']}" if "coordinator" in found else ""
    match entry.event:
        case "trained" | "evaluated":
            seconds = f" in {found['seconds']} s" if "seconds" in found else ""
            return f"{entry.event} {what}{whom}{seconds}"
        case "refused" | "failed":
            kind = found.get("rule") or found.get("error") or "error"
            return one_line(f"{entry.event} {what}{whom}: {kind}: {found.get('reason', '')}", 300)
        case _:
            return None
