"""The ledger of a site: what is refused, what counts, and that no crash or crowd spends more."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from children import child, wait
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import BudgetSpent, ConfigError, LedgerError, LedgerTampered
from fedipfs.privacy import room
from fedipfs.privacy.accounting import Event, epsilon, merged, most_steps
from fedipfs.privacy.ledger import Cap, Ledger, Receipt, default_folder, ledgers

DATA, OTHER, THIRD = "da" * 32, "0e" * 32, "3d" * 32
CAP = Cap(3.0, 1e-5, "rdp")
STEP = Event(1.0, 0.01, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where ledgers will be; it does not exist yet."""
    return tmp_path / "state" / "ledger"


def spend(ledger: Ledger, event: Event = STEP, **named: object) -> Receipt:
    who = {"purpose": "training", "run": "r1", "round": 1, "coordinator": "acme", **named}
    return ledger.spend([event], **who)  # type: ignore[arg-type]


def spend_all(ledger: Ledger, event: Event = STEP) -> list[Receipt]:
    """Spend until the budget is spent."""
    receipts = []
    while True:
        try:
            receipts.append(spend(ledger, event))
        except BudgetSpent:
            return receipts


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- one ledger a data set


def test_a_ledger_from_begin_to_end(folder: Path) -> None:
    umask = os.umask(0)
    try:
        ledger = Ledger.create(folder, DATA, CAP)
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        f"{DATA}.jsonl": 0o600,
        f"{DATA}.head": 0o600,
    }
    assert (ledger.cap, ledger.history, ledger.epsilon(), ledger.remaining()) == (CAP, (), 0.0, 3.0)
    receipt = spend(ledger, run="r1", round=7, coordinator="acme", purpose="metrics")
    assert receipt == (hashlib.sha256(f"{ledger.lines[-1]}\n".encode()).hexdigest(), 2)
    again = Ledger.open(folder, DATA)
    assert again.history == (STEP,)
    assert again.epsilon() == epsilon([STEP], 1e-5, "rdp") == 3.0 - again.remaining()
    assert again.epsilon("prv") == epsilon([STEP], 1e-5, "prv")
    (entry,) = again.spends
    assert entry[1:] == ("r1", 7, "acme", "metrics", (STEP,))


def test_there_is_no_ledger_without_an_explicit_act(folder: Path) -> None:
    with pytest.raises(LedgerError) as caught:
        Ledger.open(folder, DATA)
    assert f"fedipfs privacy init --ledger {folder} {DATA} --epsilon" in str(caught.value)
    assert f"fedipfs privacy adopt --ledger {folder} THE_OTHER {DATA}" in str(caught.value)
    assert not folder.exists()
    ledger = Ledger.create(folder, DATA, CAP)
    spend(ledger)
    before = content(folder)
    with pytest.raises(LedgerError, match="already"):
        Ledger.create(folder, DATA, Cap(100, 1e-5))
    with pytest.raises(LedgerError, match="no privacy ledger"):
        Ledger.open(folder, OTHER)
    assert content(folder) == before


@pytest.mark.parametrize("missing", ["jsonl", "head"])
def test_a_ledger_of_which_a_file_is_missing_is_never_begun_anew(
    folder: Path, missing: str
) -> None:
    spend(Ledger.create(folder, DATA, CAP))
    (folder / f"{DATA}.{missing}").unlink()
    before = content(folder)
    with pytest.raises(LedgerTampered, match="put it back"):
        Ledger.create(folder, DATA, CAP)
    with pytest.raises(LedgerTampered, match="put it back"):
        Ledger.open(folder, DATA)
    assert content(folder) == before


def test_a_ledger_under_another_name_is_refused(folder: Path) -> None:
    Ledger.create(folder, DATA, CAP)
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace(DATA, OTHER))
    with pytest.raises(LedgerTampered, match="was the file renamed"):
        Ledger.open(folder, OTHER)


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "refund", "events": [[1.0, 0.01, 10]]},
        {"kind": "open", "format": "fedipfs-ledger/v1", "fingerprint": DATA, "cap": CAP._asdict()},
        {"kind": "spend", "events": [[1.0, 0.01, 10]]},
        {"kind": "cap", "cap": {"epsilon": 3, "delta": 1e-5, "accountant": "gdp"}},
        {"kind": "cap", "cap": {"epsilon": 3, "delta": 1e-5, "more": 1}},
        {"kind": "adopt", "fingerprint": "../x"},
        *(
            {"kind": "spend", "run": "r", "round": 1, "coordinator": "a", "purpose": "p"}
            | {"events": events}
            for events in ([[1.0, 0.01, -10]], [[1.0, 0.01]], [], None, [["1", 0.01, 10]])
        ),
    ],
)
def test_entries_that_this_version_does_not_know_are_not_skipped(
    folder: Path, entry: dict[str, object]
) -> None:
    ledger = Ledger.create(folder, DATA, CAP)
    with ledger._chain.writing() as append:  # by whoever can compute a hash
        append(entry)
    for _ in range(2):
        for attempt in (lambda: spend(ledger), lambda: Ledger.open(folder, DATA)):
            with pytest.raises(LedgerTampered, match="line 2 is not an entry that this version"):
                attempt()


@pytest.mark.parametrize("name", ["", "da", "DA" * 32, "../" + "da" * 31, "da" * 32 + "\n", 7])
def test_fingerprints_that_are_none(folder: Path, name: str) -> None:
    for act in (Ledger.create, Ledger.open):
        with pytest.raises(LedgerError, match="64 hexadecimal digits"):
            act(folder, name, *[CAP] * (act == Ledger.create))
    assert not folder.exists()


@pytest.mark.parametrize(
    "cap",
    [
        Cap(0, 1e-5),
        Cap(float("inf"), 1e-5),
        Cap(float("nan"), 1e-5),
        Cap(3, 0),
        Cap(3, 1),
        Cap(3, 1e-5, "gdp"),
    ],
)
def test_caps_that_are_none(folder: Path, cap: Cap) -> None:
    with pytest.raises(ConfigError, match=r"(epsilon|delta|accountant)="):
        Ledger.create(folder, DATA, cap)
    assert not folder.exists()


@pytest.mark.parametrize(
    "event", [(0.0, 0.1, 1), (-1.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.5, 1), (1.0, 0.1, 0)]
)
def test_events_that_are_none(folder: Path, event: tuple[float, float, int]) -> None:
    ledger = Ledger.create(folder, DATA, CAP)
    before = content(folder)
    with pytest.raises(ConfigError):
        spend(ledger, Event(*event))
    with pytest.raises(ConfigError, match="nothing to pay for"):
        ledger.spend([], purpose="p", run="r", round=1, coordinator="c")
    assert content(folder) == before


def test_numpy_numbers_and_words_from_elsewhere(folder: Path) -> None:
    ledger = Ledger.create(folder, DATA, Cap(np.float64(3), 1e-5, "rdp"))
    event = Event(np.float32(1.1), np.float64(1 / 60), np.int64(3))
    spend(ledger, event, run="a\nb\x1b[31m" + "x" * 500, coordinator="ac\nme", round=np.int64(2))
    assert Ledger.open(folder, DATA).history == ((float(np.float32(1.1)), 1 / 60, 3),)
    (entry,) = ledger.spends
    assert entry.run.isprintable() and len(entry.run) == 200
    assert (entry.coordinator, entry.round) == ("ac me", 2)


def test_the_folder_for_ledgers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDIPFS_LEDGER", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_folder() == Path("/state/fedipfs/ledger")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert default_folder() == Path.home() / ".local/state/fedipfs/ledger"
    monkeypatch.setenv("FEDIPFS_LEDGER", "/mine")
    assert default_folder() == Path("/mine")


# ---- the cap


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_all_that_fits_is_allowed_and_no_more(folder: Path, accountant: str) -> None:
    cap = Cap(2.0, 1e-5, accountant)
    ledger = Ledger.create(folder, DATA, cap)
    event = Event(1.0, 0.01, 30)
    most = most_steps((), 1.0, 0.01, epsilon=2.0, delta=1e-5, accountant=accountant)
    assert len(spend_all(ledger, event)) == most // 30
    assert ledger.epsilon() <= 2.0 < epsilon([*ledger.history, event], 1e-5, accountant)
    before = content(folder)
    with pytest.raises(BudgetSpent) as caught:
        spend(ledger, event, round=9, run="mine")
    assert content(folder) == before
    text = str(caught.value)
    assert "round 9 of run mine would pass" in text and "epsilon 2 at delta 1e-05" in text
    assert f"{ledger.epsilon():.4f}" not in text and DATA not in text
    spend(ledger, event._replace(steps=most % 30))  # what is small enough may still come


events = st.builds(
    Event, st.sampled_from([0.8, 1.0, 4.0]), st.sampled_from([0.01, 0.05, 1.0]), st.integers(1, 400)
)


@given(st.lists(st.lists(events, min_size=1, max_size=3), max_size=40), st.floats(0.3, 8))
@settings(max_examples=50)
def test_allowed_is_what_epsilon_says(asked: list[list[Event]], most: float) -> None:
    # As the ledger asks: the answer does not depend on what was found to fit before.
    cap, spent = room.Room(Cap(most, 1e-5, "rdp")), ()
    for each in asked:
        after = merged([*spent, *each])
        fits = epsilon(after, 1e-5, "rdp") <= most
        assert cap.allows(after) == fits
        spent = after if fits else spent


def test_most_spends_compute_no_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(*arguments: object) -> float:
        asked.append(arguments)
        return epsilon(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(room.accounting, "epsilon", counted)
    cap, rounds = room.Room(Cap(3.0, 1e-5, "rdp")), 0
    while True:  # training and metrics in each round
        rounds += 1
        now = Event(1.0, 0.01, rounds), Event(100.0, 1.0, rounds)
        if not all(cap.allows(merged(now[:count])) for count in (1, 2)):
            break
    assert rounds > 1000 and len(asked) < 90


def test_steps_beyond_all_bounds(folder: Path) -> None:
    ledger = Ledger.create(folder, DATA, CAP)
    spend(ledger, Event(1e5, 0.01, 9_000_000))
    with pytest.raises(ConfigError, match="steps"):
        spend(ledger, Event(1e5, 0.01, 9_000_000))
    assert len(ledger.spends) == 1


def test_the_delta_is_the_caps(folder: Path) -> None:
    loose = Ledger.create(folder, DATA, Cap(3.0, 1e-3, "rdp"))
    strict = Ledger.create(folder, OTHER, Cap(3.0, 1e-9, "rdp"))
    assert len(spend_all(loose, Event(1, 0.02, 50))) > len(spend_all(strict, Event(1, 0.02, 50)))


def test_the_partner_changes_the_cap(folder: Path) -> None:
    ledger, elsewhere = Ledger.create(folder, DATA, CAP), Ledger.open(folder, DATA)
    event = Event(1.0, 0.02, 50)
    spend_all(elsewhere, event)
    spent = ledger.epsilon()
    ledger.set_cap(Cap(5.0, 1e-5, "rdp"))
    assert elsewhere.cap == Cap(5.0, 1e-5, "rdp")
    assert elsewhere.epsilon() == spent
    spend(elsewhere, event)
    ledger.set_cap(Cap(1.0, 1e-5, "rdp"))  # less than was spent: nothing more
    with pytest.raises(BudgetSpent, match="epsilon 1 at"):
        spend(elsewhere, event._replace(steps=1))
    assert ledger.remaining() == 0.0
    ledger.set_cap(Cap(5.0, 1e-5, "prv"))
    assert ledger.epsilon() == epsilon(ledger.history, 1e-5, "prv") < ledger.epsilon("rdp")
    with pytest.raises(ConfigError):
        ledger.set_cap(Cap(-1, 1e-5))
    assert Ledger.open(folder, DATA).cap == Cap(5.0, 1e-5, "prv")


# ---- versions of a data set


def test_an_adopted_version_spends_from_the_same_ledger(folder: Path) -> None:
    ledger = Ledger.create(folder, DATA, CAP)
    unrelated = Ledger.create(folder, THIRD, CAP)
    spend(ledger)
    ledger.adopt(OTHER)
    version = Ledger.open(folder, OTHER)
    assert version.fingerprint == DATA and version.fingerprints == (DATA, OTHER)
    spend(version)
    assert ledger.history == (STEP._replace(steps=20),) and unrelated.history == ()
    spend_all(version, Event(1.0, 0.05, 20))
    with pytest.raises(BudgetSpent):
        spend(ledger, Event(1.0, 0.05, 20))
    for again in (
        lambda: Ledger.create(folder, OTHER, CAP),
        lambda: ledger.adopt(OTHER),
        lambda: ledger.adopt(DATA),
        lambda: ledger.adopt(THIRD),  # it has a budget of its own, of which some may be spent
        lambda: unrelated.adopt(OTHER),
    ):
        with pytest.raises(LedgerError, match=r"already, and two ledgers cannot become one"):
            again()
    assert [each.fingerprint for each in ledgers(folder)] == [THIRD, DATA]


def test_a_crash_while_a_version_is_adopted(folder: Path) -> None:
    ledger = Ledger.create(folder, DATA, CAP)
    before = content(folder)
    ledger.adopt(OTHER)
    for name in before:  # of the two files of OTHER's chain and the entry, the last was not written
        (folder / name).write_bytes(before[name])
    version = Ledger.open(folder, OTHER)
    spend(version)
    ledger = Ledger.open(folder, DATA)
    assert ledger.history == (STEP,)
    ledger.adopt(OTHER)
    assert ledger.fingerprints == (DATA, OTHER)


def test_a_version_whose_ledger_is_gone(folder: Path) -> None:
    Ledger.create(folder, DATA, CAP).adopt(OTHER)
    for suffix in ("jsonl", "head"):
        (folder / f"{DATA}.{suffix}").unlink()
    for act in (lambda: Ledger.open(folder, OTHER), lambda: Ledger.create(folder, OTHER, CAP)):
        with pytest.raises(LedgerTampered, match=f"{DATA}.jsonl is missing: put it back"):
            act()


# ---- restarts, crashes, crowds


def rounds(folder: Path, numbers: Iterable[int], run: str, coordinator: str = "acme") -> None:
    ledger = Ledger.open(folder, DATA)
    for number in numbers:
        spend(ledger, Event(1.1, 1 / 60, 60), run=run, round=number, coordinator=coordinator)
        spend(ledger, Event(40.0, 1.0, 1), run=run, round=number, purpose="metrics")


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_three_runs_in_three_processes_cost_what_one_long_run_costs(
    folder: Path, accountant: str
) -> None:
    cap = Cap(8.0, 1e-5, accountant)
    for name, runs in (("one", [range(15)]), ("three", [range(5)] * 3)):
        Ledger.create(folder / name, DATA, cap)
        for index, numbers in enumerate(runs):
            arguments = (folder / name, numbers, f"run {index}", f"coordinator {index}")
            assert wait(child(lambda arguments=arguments: rounds(*arguments))) == 0
    one, three = (Ledger.open(folder / name, DATA) for name in ("one", "three"))
    assert one.history == three.history
    assert one.epsilon() == three.epsilon() > 0.5
    assert len(three.spends) == 30 and len({spent.run for spent in three.spends}) == 3


def test_copies_of_a_run_folder_spend_from_the_same_ledger(folder: Path, tmp_path: Path) -> None:
    Ledger.create(folder, DATA, CAP)
    (tmp_path / "runs" / "r1").mkdir(parents=True)
    rounds(folder, range(3), "r1")
    shutil.copytree(tmp_path / "runs" / "r1", tmp_path / "runs" / "r2")
    rounds(folder, range(3), "r1")
    assert len(Ledger.open(folder, DATA).spends) == 12


def test_a_process_killed_at_a_hundred_random_moments(folder: Path, tmp_path: Path) -> None:
    marks, kills = tmp_path / "marks", 100
    Ledger.create(folder, DATA, Cap(1000.0, 1e-5, "rdp"))
    source = random.Random(7)

    def trains() -> None:
        ledger = Ledger.open(folder, DATA)
        file = os.open(marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        while True:
            spend(ledger)
            os.write(file, b"x")

    seen = set()
    for kill in range(1, kills + 1):
        pid = child(trains)
        time.sleep(source.uniform(0, 0.04))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        ledger = Ledger.open(folder, DATA)
        spent = sum(event.steps for event in ledger.history) // STEP.steps
        trained = marks.stat().st_size if marks.exists() else 0
        assert trained <= spent <= trained + kill
        seen.add(spent)
    assert len(seen) > 30
    spend(ledger)
    assert len(ledger.spends) == spent + 1


def test_a_crowd_never_passes_the_cap_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    event = STEP._replace(steps=25)
    alone = len(spend_all(Ledger.create(folder / "alone", DATA, CAP), event))
    crowded = Ledger.create(folder / "crowd", DATA, CAP)
    assert alone > 60

    def many(who: int) -> None:
        receipts = spend_all(Ledger.open(folder / "crowd", DATA), event)
        (tmp_path / str(who)).write_text(json.dumps(receipts))

    children = [child(lambda who=who: many(who)) for who in range(8)]
    assert [wait(pid) for pid in children] == [0] * 8
    receipts = [each for who in range(8) for each in json.loads((tmp_path / str(who)).read_text())]
    assert sorted(number for _, number in receipts) == list(range(2, alone + 2))
    lines = [f"{line}\n".encode() for line in crowded.lines]
    assert all(hashlib.sha256(lines[n - 1]).hexdigest() == head for head, n in receipts)
    assert crowded.epsilon() <= 3.0


def test_a_crowd_creates_one_ledger(folder: Path) -> None:
    def create() -> None:
        Ledger.create(folder, DATA, CAP)

    children = [child(create) for _ in range(6)]
    assert sorted(wait(pid) for pid in children) == [0] + [1] * 5
    assert len(Ledger.open(folder, DATA).lines) == 1


def test_altered_ledgers_are_refused_whatever_is_asked() -> None:
    with tempfile.TemporaryDirectory() as name:
        ledger = Ledger.create(name, DATA, CAP)
        spend(ledger)
        path = Path(name) / f"{DATA}.jsonl"
        path.write_bytes(path.read_bytes().replace(b"0.01, 10", b"0.01, 11"))
        for ask in (
            lambda: spend(ledger),
            lambda: ledger.set_cap(CAP),
            lambda: ledger.adopt(OTHER),
            lambda: ledger.epsilon(),
            lambda: ledger.lines,
            lambda: Ledger.open(name, DATA),
            lambda: Ledger.create(name, DATA, CAP),
            lambda: ledgers(name),
        ):
            with pytest.raises(LedgerTampered, match="was altered"):
                ask()
