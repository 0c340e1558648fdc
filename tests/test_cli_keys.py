"""`fedipfs keys`: from new keys to a trusted and a revoked organization."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest

from fedipfs.cli import main
from fedipfs.trust import Identity, PublicIdentity, TrustList

Output = pytest.CaptureFixture[str]
FINGERPRINT = "([a-z2-7]{4} ){7}[a-z2-7]{4}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own, which does not exist yet."""
    monkeypatch.setenv("FEDIPFS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDIPFS_PASSPHRASE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path / "home"


def out(capsys: Output, *argv: str) -> str:
    """What a command that succeeds prints."""
    code = main(["keys", *argv])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refused(capsys: Output, *argv: str) -> str:
    """What a command that is refused prints on stderr."""
    assert main(["keys", *argv]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


class Terminal(io.StringIO):
    """Standard input of somebody who types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """The public file of another organization."""
    path = tmp_path / "acme.toml"
    path.write_text(Identity.new("acme").public.dumps())
    return path


# ---- own keys


def test_new_keys_are_in_a_closed_folder(home: Path, capsys: Output) -> None:
    umask = os.umask(0)
    try:
        path, fingerprint = out(capsys, "new", "acme").splitlines()
    finally:
        os.umask(umask)
    assert path == str(home / "identity.key")
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "identity.key").stat().st_mode & 0o777 == 0o600
    assert Identity.load(path).public.fingerprint == fingerprint
    assert out(capsys, "fingerprint") == f"{fingerprint}\n"


def test_show_gives_the_public_part_only(home: Path, tmp_path: Path, capsys: Output) -> None:
    out(capsys, "new", "acme")
    text = out(capsys, "show")
    identity = Identity.load(home / "identity.key")
    assert PublicIdentity.loads(text) == identity.public
    secrets = re.findall(r"^M[A-Za-z0-9+/=]{20,}$", (home / "identity.key").read_text(), re.M)
    assert len(secrets) == 2
    assert not any(secret in text for secret in secrets)
    (tmp_path / "public").write_text(text)
    assert out(capsys, "show", "public") == text
    assert out(capsys, "fingerprint", "public") == f"{identity.public.fingerprint}\n"


def test_keys_are_never_overwritten(capsys: Output) -> None:
    out(capsys, "new", "acme", "--out", "my.key")
    before = Path("my.key").read_bytes()
    assert "my.key exists and keys are never" in refused(capsys, "new", "acme", "--out", "my.key")
    assert Path("my.key").read_bytes() == before


def test_bad_names_and_missing_folders(capsys: Output) -> None:
    assert "organization 'a b'" in refused(capsys, "new", "a b")
    assert "No such file" in refused(capsys, "new", "acme", "--out", "none/my.key")
    assert "No such file" in refused(capsys, "show")


def test_a_passphrase_from_the_environment(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "correct horse")
    fingerprint = out(capsys, "new", "acme").splitlines()[1]
    assert Identity.is_encrypted(home / "identity.key")
    assert out(capsys, "fingerprint") == f"{fingerprint}\n"
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "wrong")
    assert "another passphrase" in refused(capsys, "fingerprint")
    monkeypatch.delenv("FEDIPFS_PASSPHRASE")
    assert "no terminal to ask on: set FEDIPFS_PASSPHRASE" in refused(capsys, "fingerprint")
    assert "set FEDIPFS_PASSPHRASE" in refused(capsys, "new", "a", "--out", "x", "--passphrase")
    assert not Path("x").exists()


def test_a_passphrase_that_is_typed(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    answers = iter(["correct horse", "correct house", "correct horse", "correct horse"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(click.termui, "hidden_prompt_func", lambda _: next(answers))
    assert main(["keys", "new", "acme", "--passphrase"]) == 0  # the first two differ: asked again
    assert "do not match" in capsys.readouterr().err
    assert Identity.load(home / "identity.key", b"correct horse").public.organization == "acme"
    answers = iter(["correct horse"])
    assert main(["keys", "fingerprint"]) == 0
    assert re.fullmatch(f"{FINGERPRINT}\n", capsys.readouterr().out)


def test_an_unencrypted_key_needs_no_passphrase_that_is_set(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    out(capsys, "new", "acme")
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "of another file")
    assert out(capsys, "show")


# ---- others' keys


def test_trust_asks_whether_the_fingerprint_was_compared(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, home: Path, public: Path
) -> None:
    argv = ["keys", "trust", str(public), "--role", "participant"]
    assert "give --fingerprint TEXT" in refused(capsys, *argv[1:])
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert PublicIdentity.load(public).fingerprint in captured.out
    assert "nothing was changed" in captured.err
    assert not home.exists()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert main(argv) == 0
    assert "over another channel?" in capsys.readouterr().err
    assert len(TrustList.load(home / "trust.toml").members) == 1
    assert home.stat().st_mode & 0o777 == 0o700


def test_trust_with_the_fingerprint_that_was_read_out(
    capsys: Output, home: Path, public: Path
) -> None:
    fingerprint = PublicIdentity.load(public).fingerprint
    argv = ["trust", str(public), "--role", "coordinator"]
    other = fingerprint[:-1] + ("b" if fingerprint[-1] == "a" else "a")
    error = refused(capsys, *argv, "--fingerprint", other, "--yes")
    assert "another fingerprint" in error
    assert not home.exists()
    spoken = fingerprint.upper().replace(" ", "")
    shown = out(capsys, *argv, "--fingerprint", spoken)
    assert shown == f"acme as coordinator: {fingerprint}\n"


def test_dates(capsys: Output, home: Path, public: Path) -> None:
    argv = ["trust", str(public), "--role", "participant", "--yes"]
    for wrong in ("soon", "2027-13-01", "2027-01-01T00:00", "01.02.2027"):
        assert "Invalid value for '--until'" in refused(capsys, *argv, "--until", wrong)
    wrong_way = refused(capsys, *argv, "--from", "2027-01-02", "--until", "2027-01-01")
    assert "not after valid_from" in wrong_way
    out(capsys, *argv, "--from", "2026-01-01", "--until", "2027-01-01T12:00+02:00")
    (member,) = TrustList.load(home / "trust.toml").members
    assert member.valid_from == datetime(2026, 1, 1, tzinfo=UTC)
    assert member.valid_to == datetime(2027, 1, 1, 10, tzinfo=UTC)


def test_trusting_twice_and_malformed_files(capsys: Output, home: Path, public: Path) -> None:
    argv = ["trust", str(public), "--role", "participant", "--yes"]
    out(capsys, *argv)
    assert "acme is listed twice" in refused(capsys, *argv)
    public.write_text(public.read_text().replace("acme", "acne"))
    assert "have the fingerprint" in refused(capsys, *argv)
    public.write_bytes(os.urandom(100))
    assert "acme.toml" in refused(capsys, *argv)
    (home / "trust.toml").chmod(0o666)
    assert "chmod go-w" in refused(capsys, "list")


def test_list_and_revoke(capsys: Output, tmp_path: Path, public: Path) -> None:
    where = ["--list", str(tmp_path / "mine.toml")]
    assert "No such file" in refused(capsys, "list", *where)
    now = datetime.now(UTC)
    day = timedelta(days=1)
    dates = {
        "a-valid": ["--until", (now + day).date().isoformat()],
        "b-early": ["--from", (now + 2 * day).date().isoformat()],
        "c-expired": ["--until", "2020-01-01"],
        "d-revoked": [],
        "e-always": [],
    }
    for name, options in dates.items():
        public.write_text(Identity.new(name).public.dumps())
        out(capsys, "trust", str(public), "--role", "participant", "--yes", *options, *where)
    revoked = out(capsys, "revoke", "d-revoked", *where)
    assert re.fullmatch(f"revoked d-revoked: {FINGERPRINT}\n", revoked)
    assert "'nobody' is not in the trust list" in refused(capsys, "revoke", "nobody", *where)

    lines = out(capsys, "list", *where).splitlines()
    moment = r" \d{4}-\d\d-\d\d \d\d:\d\d UTC"
    states = (f"valid until{moment}", f"valid from{moment}", "expired 2020-01-01 00:00 UTC")
    for line, name, state in zip(lines, dates, (*states, f"revoked{moment}", "valid"), strict=True):
        assert re.fullmatch(rf"{name} +participant +{state} +{FINGERPRINT}", line)
    entries = json.loads(out(capsys, "list", "--json", *where))
    assert [one["state"] for one in entries] == ["valid", "early", "expired", "revoked", "valid"]
    assert entries[2]["valid_to"] == "2020-01-01T00:00:00+00:00"
    fingerprint = entries[4]["fingerprint"]
    assert out(capsys, "revoke", fingerprint, *where) == f"revoked e-always: {fingerprint}\n"


def test_swarm_keys(capsys: Output, tmp_path: Path) -> None:
    pattern = "/key/swarm/psk/1.0.0/\n/base16/\n[0-9a-f]{64}\n"
    assert re.fullmatch(pattern, out(capsys, "swarm"))
    assert out(capsys, "swarm", "--out", "swarm.key") == ""
    before = (tmp_path / "swarm.key").read_text()
    assert re.fullmatch(pattern, before)
    assert (tmp_path / "swarm.key").stat().st_mode & 0o777 == 0o600
    assert "never overwritten" in refused(capsys, "swarm", "--out", "swarm.key")
    assert (tmp_path / "swarm.key").read_text() == before


# ---- the command


@pytest.mark.parametrize(
    "argv", [[], ["new"], ["show"], ["fingerprint"], ["trust"], ["revoke"], ["list"], ["swarm"]]
)
def test_every_level_has_help(capsys: Output, argv: list[str]) -> None:
    assert "Usage: fedipfs keys" in out(capsys, *argv, "-h")


def test_help_loads_no_cryptography() -> None:
    code = """
import sys
from fedipfs.cli import main
assert main(["keys", "trust", "--help"]) == 0
sys.exit("cryptography" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
