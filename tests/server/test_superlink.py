"""The SuperLink that a coordinator keeps up: restarts, who may use it, what is run on it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil
import pytest
from proxies import free_ports

from fedipfs.errors import ConfigError, RunFailed
from fedipfs.server import remote
from fedipfs.server.engine import superlink as module
from fedipfs.server.engine.control import listening
from fedipfs.server.engine.superlink import MANAGED, UP, Supervisor, keeper, superlink
from fedipfs.server.membership import Home
from fedipfs.server.submission import app_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SOON_S = 60
SPY = b"""import os
open({path!r}, "w").write(str(dict(os.environ)))
app = None
"""


def home_in(folder, bind="127.0.0.1") -> Home:
    fleet, http = free_ports(2)
    return Home.create(folder, host="localhost", fleet_port=fleet, http_port=http, bind=bind)


@pytest.fixture
def home(tmp_path):
    made = home_in(tmp_path / "home")
    yield made
    until(lambda: not processes(made), "nothing is left")


def processes(home: Home) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FEDIPFS_HOME") == str(home.path):
                found.append(process)
    return found


def named(home: Home, word: str) -> list[psutil.Process]:
    return [each for each in processes(home) if word in " ".join(each.cmdline())]


def until(there, what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not there():
        assert time.monotonic() < deadline, f"not within {SOON_S} s: {what}"
        time.sleep(0.1)


def finished(link, run: int):
    until(lambda: link.control.state(run).status == "finished", "the run is over")
    return link.control.state(run)


def test_what_dies_is_started_again_and_knows_what_it_knew(home):
    with superlink(home, start=True) as link:
        assert keeper(home) == MANAGED
        run = link.control.start(app_files(), {"submission": "nobody"})
        assert "no submission" in finished(link, run).details
        for word in ("flower-superlink", "flower-superexec"):
            (old,) = named(home, word)
            old.send_signal(signal.SIGKILL)
            until(lambda pid=old.pid, w=word: [p for p in named(home, w) if p.pid != pid], word)
        until(lambda: listening(home.http_port), "it listens again")
        again = link.control.start(app_files(), {"submission": "nobody"})
        assert "no submission" in finished(link, again).details  # so it has a SuperExec
        assert link.control.state(run).status == "finished"  # from its database
        assert link.control.state(12345) is None
        link.check()
    assert keeper(home) is None
    assert not listening(home.http_port)


def test_code_that_is_not_ours_is_not_run_and_settings_of_others_are_not_taken(home, tmp_path):
    """The Control API has no accounts: whoever reaches the port may submit."""
    spied = tmp_path / "spied"
    files = {**app_files(), "server_app.py": SPY.replace(b"{path!r}", repr(str(spied)).encode())}
    with superlink(home, start=True) as link:
        state = finished(link, link.control.start(files, {}))
        assert "FedIPFS's own Flower app and no other" in state.details
        state = finished(link, link.control.start(app_files(), {"settings": "+experiment=mnist"}))
        assert "up --flwr-run" in state.details
    assert not spied.exists()


def test_a_second_run_does_not_borrow_what_ends_with_the_first(home):
    with superlink(home, start=True):
        with pytest.raises(ConfigError, match="another run keeps the SuperLink up"):
            superlink(home, start=True).__enter__()
        with pytest.raises(ConfigError, match="is up already"):
            Supervisor(home).__enter__()


def test_one_that_is_kept_up_is_used_and_left(home):
    with pytest.raises(ConfigError, match="fedipfs-server up"):
        superlink(home, start=False).__enter__()
    with Supervisor(home, UP):
        assert keeper(home) == UP
        with superlink(home, start=False) as one, superlink(home, start=True) as other:
            assert one.supervisor is other.supervisor is None
        assert listening(home.http_port)


def test_who_will_not_stay_up_is_given_up_with_its_last_words(home, monkeypatch):
    monkeypatch.setattr(
        module, "_superexec", lambda home: ["/bin/sh", "-c", "echo no luck; exit 1"]
    )
    with superlink(home, start=True) as link:

        def failed() -> bool:
            try:
                link.check()
            except RunFailed as error:
                assert "SuperExec ends as soon as it is started: no luck" in str(error)
                return True
            return False

        until(failed, "it is given up")


def test_an_address_of_its_own_to_listen_on(tmp_path):
    home = home_in(tmp_path / "home", bind="127.0.0.2")
    with superlink(home, start=True):
        assert listening(home.fleet_port, "127.0.0.2")
        assert not listening(home.fleet_port)
    until(lambda: not processes(home), "nothing is left")


def test_a_port_in_use_and_a_folder_that_is_open_are_refused(home, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", home.http_port)):
        with pytest.raises(ConfigError, match=f"port {home.http_port} is in use"):
            superlink(home, start=True).__enter__()
        assert keeper(home) is None
    (tmp_path / "open").mkdir(mode=0o755)
    os.chmod(tmp_path / "open", 0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        home_in(tmp_path / "open")


def test_clients_are_the_members(home):
    class Registry:
        active = (1, 2, 3)

    clients = {"total": 10, "per_round": 10}
    assert remote.fitted({"clients": clients}, Registry)["clients"] == {"total": 3, "per_round": 3}
    asked = {"total": 10, "per_round": 2}
    assert remote.fitted({"clients": asked}, Registry)["clients"] == {"total": 3, "per_round": 2}
    with pytest.raises(ConfigError, match="more than there are members"):
        remote.fitted({"clients": {"total": 10, "per_round": 5}}, Registry)
    Registry.active = ()
    with pytest.raises(ConfigError, match="admit"):
        remote.fitted({"clients": clients}, Registry)
