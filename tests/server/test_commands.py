"""`fedipfs-server init`, `admit`, `members`, `remove`, `renew`, as a coordinator types them."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from fedipfs.clients import joining as site
from fedipfs.server import commands
from fedipfs.server.membership import Home, Registry
from fedipfs.trust import Identity, TrustList, tls
from fedipfs.trust.joining import Federation, JoinRequest, now

Output = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    """Standard input of somebody who types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the coordinator's folder will be."""
    monkeypatch.setenv("FEDIPFS_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("FEDIPFS_PASSPHRASE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    yield tmp_path / "hub"


@pytest.fixture
def port() -> int:
    """One on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def home(hub: Path, port: int, capsys: Output) -> Home:
    """A coordinator's folder, whose SuperLink is not up."""
    out(capsys, "init", "--host", "fl.example.org", "--org", "hub", "--http-port", str(port))
    return Home.load()


def out(capsys: Output, *argv: str, warning: str = "") -> str:
    """What a command that succeeds prints."""
    code = commands.main(argv)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert bool(captured.err) == bool(warning) and warning in captured.err
    return captured.out


def refused(capsys: Output, code: int, *argv: str) -> str:
    """What a command that is refused prints on stderr."""
    assert commands.main(argv) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def ask(tmp_path: Path, name: str) -> str:
    """The join file of a site, of which the fingerprint is returned."""
    site.init(tmp_path / name, name)
    return Identity.load(tmp_path / name / "identity.key").public.fingerprint


# ---- init


def test_init_makes_a_folder_and_says_what_is_next(hub: Path, capsys: Output) -> None:
    peer = "/dns4/fl.example.org/tcp/4001/p2p/12D3KooWGzBqd5eNkGp2MnTcNEGeFpYzTg4xgJhVfXHgLqVLGxGv"
    told = out(capsys, "init", "--host", "fl.example.org", "--port", "443", "--peer", peer)
    home = Home.load(hub)
    assert (home.organization, home.fleet_port, home.peers) == ("fl.example.org", 443, (peer,))
    assert "partners dial fl.example.org:443" in told
    assert Identity.load(home.identity).public.fingerprint in told
    assert told.splitlines()[-1].startswith("next: fedipfs-server admit FILE")
    assert "nothing is overwritten" in refused(capsys, 2, "init", "--host", "fl.example.org")
    other = str(hub.parent / "other")
    out(capsys, "init", "--host", "localhost", "--home", other)
    assert Home.load(Path(other)).host == "localhost"


def test_the_command_line_reaches_them(hub: Path) -> None:
    run = [sys.executable, "-m", "fedipfs.server"]
    done = subprocess.run([*run, "init", "--host", "fl example"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("fedipfs-server: host 'fl example': give a DNS name")
    done = subprocess.run([*run, "init", "--host", "localhost"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert Home.load(hub).host == "localhost"


@pytest.mark.parametrize("name", ["init", "admit", "members", "remove", "renew"])
def test_help_needs_no_folder(capsys: Output, name: str) -> None:
    assert f"Usage: fedipfs-server {name}" in out(capsys, name, "-h")
    if name != "init":
        more = {"admit": ["x.json"], "remove": ["x"]}.get(name, [])
        assert "fedipfs-server init --host" in refused(capsys, 2, name, *more)


# ---- admit


def test_the_whole_way_of_a_partner(home: Home, tmp_path: Path, capsys: Output) -> None:
    fingerprint = ask(tmp_path, "hospital-a")
    told = out(capsys, "admit", "hospital-a.join.json", "--fingerprint", fingerprint.upper())
    assert fingerprint in told and "no SuperLink is running" in told
    assert "hospital-a is member 0\n" in told
    hub = Identity.load(home.identity).public
    assert hub.fingerprint in told
    federation = site.join(
        tmp_path / "hospital-a",
        Path("hospital-a.federation.json"),
        fingerprint=hub.fingerprint,
    )
    assert (federation.coordinator, federation.address) == (hub, "fl.example.org:9092")
    travelled = bytes_in(Path("hospital-a.join.json").read_text())
    travelled += bytes_in(Path("hospital-a.federation.json").read_text())
    assert any(hub.signing in found for found in travelled)
    secrets = [*private_keys(home.path), *private_keys(tmp_path / "hospital-a")]
    assert len(secrets) == 7
    for secret in secrets:
        assert not any(secret in found for found in travelled)


def private_keys(folder: Path) -> list[bytes]:
    """Every private key in the files of a folder, as the number that it is."""
    found = []
    for path in folder.glob("*.key"):
        for pem in re.findall("-----BEGIN .*?-----END[^\n]*\n", path.read_text(), re.S):
            openssh = "OPENSSH" in pem
            key: Any = (load_ssh_private_key if openssh else load_pem_private_key)(
                pem.encode(), None
            )
            if isinstance(key, ec.EllipticCurvePrivateKey):
                size = key.key_size // 8
                found.append(key.private_numbers().private_value.to_bytes(size, "big"))
            else:
                found.append(key.private_bytes_raw())
    return found


def bytes_in(text: str) -> list[bytes]:
    """What the text holds in hex or base64, wherever that begins."""
    text = text.replace("\\n", "")
    found = [bytes.fromhex(run) for run in re.findall("(?:[0-9a-f]{2}){20,}", text)]
    for run in re.findall("[A-Za-z0-9+/]{20,}", text):
        for start in range(4):
            cut = run[start:]
            found.append(base64.b64decode(cut[: len(cut) // 4 * 4]))
    return found


def test_admission_asks_whether_the_fingerprint_was_compared(
    home: Home, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = ask(tmp_path, "a")
    assert "give --fingerprint TEXT" in refused(capsys, 2, "admit", "a.join.json")
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert "nothing was changed" in refused(capsys, 3, "admit", "a.join.json")
    assert Registry.open(home).members == () and not Path("a.federation.json").exists()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert commands.main(["admit", "a.join.json"]) == 0
    captured = capsys.readouterr()
    assert fingerprint in captured.out and "over another channel?" in captured.err
    assert Registry.open(home).find("a").number == 0


def test_another_fingerprint_than_was_read_out(home: Home, tmp_path: Path, capsys: Output) -> None:
    ask(tmp_path, "a")
    other = Identity.new("a").public.fingerprint
    told = refused(capsys, 3, "admit", "a.join.json", "--yes", "--fingerprint", other)
    assert "another fingerprint than" in told
    assert Registry.open(home).members == ()
    assert [one.role for one in TrustList.load(home.trust).members] == ["coordinator"]


def test_files_that_are_not_believed(home: Home, tmp_path: Path, capsys: Output) -> None:
    ask(tmp_path, "a")
    path = Path("a.join.json")
    text = path.read_text()
    path.write_text(text.replace('"created": "2', '"created": "1'))
    assert "forged" in refused(capsys, 3, "admit", "a.join.json", "--yes")
    path.write_text(text[:-3])
    assert "a.join.json is not such a file" in refused(capsys, 2, "admit", "a.join.json", "--yes")
    path.write_text(text + " " * 20_000)
    assert "more than 16384 bytes" in refused(capsys, 2, "admit", "a.join.json", "--yes")
    assert "No such file" in refused(capsys, 2, "admit", "none.json", "--yes")
    keys, found = Identity.load(tmp_path / "a" / "identity.key"), JoinRequest.loads(text)
    old = JoinRequest(found.identity, found.node_key, now() - timedelta(days=31))
    path.write_text(old.dumps(keys))
    assert "`fedipfs-client init` again" in refused(capsys, 3, "admit", "a.join.json", "--yes")
    assert Registry.open(home).members == ()


def test_an_impostor_under_a_members_name(home: Home, tmp_path: Path, capsys: Output) -> None:
    ask(tmp_path, "a")
    out(capsys, "admit", "a.join.json", "--yes")
    site.init(tmp_path / "impostor", "a")
    told = refused(capsys, 3, "admit", "a.join.json", "--yes")
    assert "is a member with other keys" in told and "impostor" in told


def test_a_new_node_key_is_said_to_be_one(home: Home, tmp_path: Path, capsys: Output) -> None:
    ask(tmp_path, "a")
    out(capsys, "admit", "a.join.json", "--yes")
    assert "a is member 0 already:" in out(capsys, "admit", "a.join.json", "--yes")
    (tmp_path / "a" / "node.key").unlink()
    site.init(tmp_path / "a", "a")
    told = out(capsys, "admit", "a.join.json", "--yes")
    assert "its SuperNode has a new key, the old is shut out" in told
    out(capsys, "remove", "a", "--yes")
    assert "cannot be used again" in refused(capsys, 3, "admit", "a.join.json", "--yes")
    (tmp_path / "a" / "node.key").unlink()
    site.init(tmp_path / "a", "a")
    assert "would be member 0 again" in out(capsys, "admit", "a.join.json", "--yes")


def test_a_passphrase_is_needed_before_anything_is_changed(
    hub: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "correct horse")
    out(capsys, "init", "--host", "localhost", "--http-port", str(port))
    site.init(tmp_path / "a", "a")
    monkeypatch.delenv("FEDIPFS_PASSPHRASE")
    assert "set FEDIPFS_PASSPHRASE" in refused(capsys, 2, "admit", "a.join.json", "--yes")
    assert Registry.open(Home.load()).members == ()
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "correct horse")
    out(capsys, "admit", "a.join.json", "--yes")
    assert Federation.load("a.federation.json").number == 0


# ---- members, remove, renew


def test_the_members_are_listed_and_told(home: Home, tmp_path: Path, capsys: Output) -> None:
    assert "no members yet" in out(capsys, "members")
    prints = [ask(tmp_path, name) for name in ("a", "b")]
    out(capsys, "admit", "a.join.json", "--yes", "--out", str(tmp_path / "a"))
    told = out(capsys, "admit", "b.join.json", "--yes")
    assert "the others' federation files changed, too: fedipfs-server members --write DIR" in told
    out(capsys, "remove", "a", "--yes")
    head, first, second, last = out(capsys, "members").splitlines()
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"
    assert head.split() == ["number", "organization", "state", "node", "fingerprint"]
    assert re.fullmatch(rf"0 +a +removed {moment} +- +{prints[0]}", first)
    assert re.fullmatch(rf"1 +b +since {moment} +no SuperLink +{prints[1]}", second)
    assert re.fullmatch(rf"the server's certificate ends {moment}", last)
    found = json.loads(out(capsys, "members", "--json", "--write", str(tmp_path / "all" / "now")))
    one, two = found["members"]
    assert one["removed"] and (two["removed"], two["connected"]) == (None, None)
    assert [path.name for path in (tmp_path / "all" / "now").iterdir()] == ["b.federation.json"]
    ours = Federation.load(tmp_path / "all" / "now" / "b.federation.json")
    assert [who.organization for _, who in ours.members] == ["b"]
    assert ours.serial > Federation.load("b.federation.json").serial


def test_removal_asks_first(
    home: Home, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path, "a")
    out(capsys, "admit", "a.join.json", "--yes")
    assert "give --yes" in refused(capsys, 2, "remove", "a")
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert "nothing was changed" in refused(capsys, 3, "remove", "a")
    assert Registry.open(home).active
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert commands.main(["remove", "a"]) == 0
    assert "its keys are revoked" in capsys.readouterr().out
    assert not Registry.open(home).active
    assert "'b' is no member: members are nobody" in refused(capsys, 2, "remove", "b", "--yes")


def test_a_superlink_that_does_not_answer(home: Home, tmp_path: Path, capsys: Output) -> None:
    """Something else listens on its port: who is admitted stays so, a removal says it failed."""
    ask(tmp_path, "a")
    with socket.create_server(("127.0.0.1", home.http_port)) as listener:
        listener.listen()

        def hang_up() -> None:
            try:
                while True:
                    listener.accept()[0].close()
            except OSError:
                return

        threading.Thread(target=hang_up, daemon=True).start()
        told = out(capsys, "admit", "a.join.json", "--yes", warning="did not answer")
        assert "a is member 0\n" in told
        assert "no SuperLink" in out(capsys, "members", warning="did not answer")
        assert "did not answer" in refused(capsys, 3, "remove", "a", "--yes")
        listener.shutdown(socket.SHUT_RDWR)
    assert not Registry.open(home).active
    assert "is removed" in out(capsys, "remove", "a")  # nothing is asked again


def test_renewing(home: Home, capsys: Output) -> None:
    text = home.certificate.read_text()
    told = out(capsys, "renew", "--days", "20", warning="ends in 19 days")
    assert "a SuperLink that is running goes on with the last one: restart it" in told
    assert home.certificate.read_text() != text
    out(capsys, "members", warning="run fedipfs-server renew")
    out(capsys, "renew")
    out(capsys, "members")
    assert "'--days'" in refused(capsys, 2, "renew", "--days", "0")


def test_a_certificate_that_ended(home: Home, capsys: Output) -> None:
    pair = tls.Pair(home.ca.read_text(), home.ca_key.read_text())
    old = tls.new_certificate(pair, ["a"], now() - timedelta(days=3), days=1)
    home.certificate.write_text(old.certificate)
    out(capsys, "members", warning="ended at")
    out(capsys, "renew")
