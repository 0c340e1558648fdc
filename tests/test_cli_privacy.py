"""`fedipfs privacy`: a site says what its records may spend, and sees what they have spent."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedipfs.cli import main
from fedipfs.privacy.accounting import Event, epsilon, merged
from fedipfs.privacy.ledger import Cap, Ledger

Output = pytest.CaptureFixture[str]
DATA, OTHER = "da" * 32, "0e" * 32
STEP = Event(1.0, 0.01, 100)
BUDGET = ["--epsilon", "3", "--delta", "1e-5", "--accountant", "rdp"]
RUN = ["--examples", "1000", "--batch-size", "10", "--accountant", "rdp"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default folder of ledgers, which does not exist yet."""
    monkeypatch.setenv("FEDIPFS_LEDGER", str(tmp_path / "ledger"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ledger"


def out(capsys: Output, *argv: str) -> str:
    """What a command that succeeds prints."""
    code = main(["privacy", *argv])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refused(capsys: Output, *argv: str, code: int = 2) -> str:
    """What a command that is refused prints on stderr."""
    assert main(["privacy", *argv]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def spend(ledger: Ledger, run: str, rounds: int, coordinator: str = "acme") -> None:
    for number in range(rounds):
        ledger.spend([STEP], purpose="training", run=run, round=number, coordinator=coordinator)


@pytest.fixture
def ledger(folder: Path) -> Ledger:
    """One with two runs."""
    made = Ledger.create(folder, DATA, Cap(3.0, 1e-5, "rdp"))
    spend(made, "first", 3)
    spend(made, "second", 2, "other")
    return made


# ---- explicit acts


def test_a_ledger_is_begun_once(folder: Path, capsys: Output) -> None:
    assert out(capsys, "init", DATA, *BUDGET) == f"{DATA}: epsilon 3 at delta 1e-05\n"
    assert Ledger.open(folder, DATA).cap == Cap(3.0, 1e-5, "rdp")
    again = refused(capsys, "init", DATA, *BUDGET)
    assert f"the data set {DATA} spends from {folder}/{DATA}.jsonl already" in again
    assert "change the cap with `fedipfs privacy cap`" in again


def test_a_new_data_set_beside_others_is_asked_about(folder: Path, capsys: Output) -> None:
    out(capsys, "init", DATA, *BUDGET)
    error = refused(capsys, "init", OTHER, *BUDGET)
    assert f"other data sets, such as {DATA}: " in error and "--unrelated" in error
    out(capsys, "init", OTHER, *BUDGET, "--unrelated")
    assert len(list(folder.glob("*.jsonl"))) == 2


def test_the_cap_is_changed(ledger: Ledger, capsys: Output) -> None:
    changed = out(capsys, "cap", DATA, "--epsilon", "5")
    assert changed == f"{DATA}: epsilon 5 at delta 1e-05 (before: epsilon 3 at delta 1e-05)\n"
    out(capsys, "cap", DATA, "--delta", "1e-6", "--accountant", "prv")
    assert ledger.cap == Cap(5.0, 1e-6, "prv")
    assert "nothing to change" in refused(capsys, "cap", DATA)
    assert "epsilon=-1" in refused(capsys, "cap", DATA, "--epsilon", "-1")
    assert "no privacy ledger" in refused(capsys, "cap", OTHER, "--epsilon", "5")


def test_a_version_is_adopted(ledger: Ledger, folder: Path, capsys: Output) -> None:
    assert out(capsys, "adopt", DATA, OTHER) == f"{OTHER} spends from the ledger of {DATA}\n"
    assert OTHER in out(capsys, "show", OTHER)
    assert "already" in refused(capsys, "adopt", DATA, OTHER)
    for path in folder.glob(f"{OTHER}.*"):
        path.unlink()
    error = refused(capsys, "init", OTHER, *BUDGET, "--unrelated")
    assert f"{OTHER} is a version of {DATA}, which has a ledger" in error
    assert "64 hexadecimal digits" in refused(capsys, "adopt", DATA, "0e0e")


def test_the_commands_that_an_error_names_help(folder: Path, capsys: Output) -> None:
    error = refused(capsys, "show", DATA)
    argv = error.split("`")[1].split()
    assert argv[:2] == ["fedipfs", "privacy"]
    out(capsys, *argv[2:])
    error = refused(capsys, "show", OTHER)
    argv = error.split("`")[3].replace("THE_OTHER", DATA).split()
    out(capsys, *argv[2:])
    assert out(capsys, "show", OTHER)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["init", DATA, "--epsilon", "3"], "Missing option '--delta'"),
        (["init", DATA, "--epsilon", "0", "--delta", "1e-5"], "epsilon=0"),
        (["init", DATA, "--epsilon", "3", "--delta", "1"], "delta=1"),
        (["init", DATA, *BUDGET[:-1], "gdp"], "'gdp' is not one of 'prv', 'rdp'"),
        (["init", "mnist", *BUDGET], "'mnist' is not the fingerprint of a data set"),
        (["init", *BUDGET], "Missing argument 'FINGERPRINT'"),
        (["show", "mnist"], "'mnist' is not the fingerprint of a data set"),
        (["export", DATA], "no privacy ledger for the data set"),
    ],
)
def test_likely_mistakes(folder: Path, capsys: Output, argv: list[str], text: str) -> None:
    assert text in refused(capsys, *argv)
    assert not folder.exists()


# ---- what was spent


def test_show_says_what_is_spent_and_by_whom(ledger: Ledger, capsys: Output) -> None:
    out(capsys, "adopt", DATA, OTHER)
    shown = out(capsys, "show")
    assert out(capsys, "show", DATA) == shown
    assert shown.startswith(f"{DATA}\n  cap       epsilon 3 at delta 1e-05, by rdp\n")
    rows = [line.split() for line in shown.splitlines()]
    alone = epsilon([STEP._replace(steps=300)], 1e-5, "rdp")
    assert ["first", "acme", "3", f"{alone:.4f}"] in [row[:4] for row in rows]
    assert ["also", "for", OTHER] in rows
    (spent,) = [row for row in rows if row[:1] == ["spent"]]
    assert spent == ["spent", f"{ledger.epsilon():.4f}", "(prv:", f"{ledger.epsilon('prv'):.4f})"]


def test_show_as_json(ledger: Ledger, folder: Path, capsys: Output) -> None:
    Ledger.create(folder, OTHER, Cap(1.0, 1e-6))
    empty, account = json.loads(out(capsys, "show", "--json"))
    assert (empty["fingerprint"], empty["runs"]) == (OTHER, [])
    assert empty["spent"] == {"prv": 0.0, "rdp": 0.0}
    assert account["cap"] == {"epsilon": 3.0, "delta": 1e-5, "accountant": "rdp"}
    assert account["spent"]["rdp"] == ledger.epsilon() == 3.0 - account["remaining"]
    first, second = account["runs"]
    assert (first["run"], first["coordinator"], first["rounds"]) == ("first", "acme", 3)
    assert (second["run"], second["coordinator"], second["rounds"]) == ("second", "other", 2)
    assert second["epsilon"] < first["epsilon"] < account["spent"]["rdp"]
    assert second["last"] == ledger.spends[-1].time


def test_show_without_any(folder: Path, capsys: Output) -> None:
    assert out(capsys, "show") == f"{folder} has no ledgers: see `fedipfs privacy init --help`\n"
    assert json.loads(out(capsys, "show", "--json")) == []
    assert not folder.exists()


def test_an_altered_ledger_is_refused_by_every_command(
    ledger: Ledger, folder: Path, capsys: Output
) -> None:
    path = folder / f"{DATA}.jsonl"
    path.write_bytes(path.read_bytes()[:-200])
    for argv in (
        ["show"],
        ["show", DATA],
        ["export", DATA],
        ["cap", DATA, "--epsilon", "9"],
        ["adopt", DATA, OTHER],
        ["init", DATA, *BUDGET],
        ["plan", DATA, "--epsilon", "1", "--rounds", "1", *RUN],
    ):
        assert "was altered: it has 5 whole lines, and should have 6" in refused(capsys, *argv)


def test_a_folder_open_to_others(ledger: Ledger, folder: Path, capsys: Output) -> None:
    folder.chmod(0o750)
    assert f"chmod 700 {folder}" in refused(capsys, "show")


def test_an_auditor_can_check_what_is_exported(
    ledger: Ledger, folder: Path, tmp_path: Path, capsys: Output
) -> None:
    printed = json.loads(out(capsys, "export", DATA))
    assert out(capsys, "export", DATA, "-o", "audit.json") == ""
    assert json.loads((tmp_path / "audit.json").read_text()) == printed
    assert (tmp_path / "audit.json").stat().st_mode & 0o777 == 0o600
    assert "is not overwritten" in refused(capsys, "export", DATA, "-o", "audit.json")
    # what `how_to_check` says
    previous, events = "0" * 64, []
    for line in printed["lines"]:
        entry: dict[str, Any] = json.loads(line)
        assert entry["previous"] == previous
        previous = hashlib.sha256(f"{line}\n".encode()).hexdigest()
        events += entry["events"] if entry["kind"] == "spend" else []
    assert printed["head"] == previous
    assert printed["spent"]["rdp"] == epsilon(merged(map(tuple, events)), 1e-5, "rdp")
    assert "\n".join([*printed["lines"], ""]) == (folder / f"{DATA}.jsonl").read_text()


# ---- plans


def planned(capsys: Output, *argv: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out(capsys, "plan", *argv, *RUN, "--json"))
    return found


def test_two_give_the_third(capsys: Output) -> None:
    cost = planned(capsys, "--noise-multiplier", "1", "--rounds", "5", "--delta", "1e-5")
    assert cost["epsilon"] == epsilon([Event(1.0, 0.01, 500)], 1e-5, "rdp")
    assert (cost["steps_per_round"], cost["sample_rate"]) == (100, 0.01)
    noise = planned(capsys, "--epsilon", "2", "--rounds", "5", "--delta", "1e-5")
    assert noise["epsilon"] <= 2 and noise["rounds"] == 5
    rounds = planned(capsys, "--epsilon", "2.5", "--noise-multiplier", "1", "--delta", "1e-5")
    assert rounds["epsilon"] <= 2.5
    one_more = Event(1.0, 0.01, 100 * (rounds["rounds"] + 1))
    assert epsilon([one_more], 1e-5, "rdp") > 2.5


def test_steps_epochs_and_delta(capsys: Output) -> None:
    argv = ["--noise-multiplier", "1", "--rounds", "5"]
    assert planned(capsys, *argv)["delta"] == 1e-4  # 1 / (10 examples)
    assert planned(capsys, *argv, "--epochs", "3")["steps_per_round"] == 300
    assert planned(capsys, *argv, "--steps", "7")["steps_per_round"] == 7
    text = out(capsys, "plan", *argv, *RUN)
    assert "noise multiplier  1.0000" in text and "at delta 0.0001" in text


@pytest.mark.parametrize(
    "argv", [[], ["--rounds", "5"], ["--rounds", "5", "--epsilon", "1", "--noise-multiplier", "1"]]
)
def test_not_two(capsys: Output, argv: list[str]) -> None:
    error = refused(capsys, "plan", *argv, *RUN)
    assert "give two of --epsilon, --noise-multiplier and --rounds" in error


def test_a_plan_with_a_ledger(ledger: Ledger, capsys: Output) -> None:
    argv = [DATA, "--noise-multiplier", "1", "--rounds", "2"]
    plan = planned(capsys, *argv)
    total = merged([*ledger.history, Event(1.0, 0.01, 200)])
    assert plan["delta"] == 1e-5
    assert plan["total"] == epsilon(total, 1e-5, "rdp")
    assert plan["allowed"] and plan["rounds_allowed"] >= 2
    before = ledger.lines
    many = [DATA, "--noise-multiplier", "1", "--rounds", "500"]
    assert main(["privacy", "plan", *many, *RUN]) == 3
    captured = capsys.readouterr()
    assert "of 3 that are allowed" in captured.out
    assert f"allows {plan['rounds_allowed']} of these rounds" in captured.err
    assert ledger.lines == before
    spend(ledger, "third", plan["rounds_allowed"])
    assert not json.loads(refused_json(capsys, *argv))["allowed"]


def refused_json(capsys: Output, *argv: str) -> str:
    """What a plan that the cap does not allow prints."""
    assert main(["privacy", "plan", *argv, *RUN, "--json"]) == 3
    return capsys.readouterr().out


def test_help_imports_nothing_that_is_slow() -> None:
    code = (
        "import sys; from fedipfs.cli import main; main(['privacy', 'init', '--help']); "
        "print([m for m in ('torch', 'numpy', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert "--ledger DIR" in found.stdout
