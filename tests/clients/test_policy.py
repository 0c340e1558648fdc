"""A site's policy: what it refuses, in which words, and which files it cannot be read from."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.clients.budget import open_ledger
from fedipfs.clients.demands import Demands
from fedipfs.clients.policy import Asked, Budget, Policy, Window, Work
from fedipfs.errors import BudgetSpent, ConfigError, LedgerError, PolicyRefused
from fedipfs.privacy.accounting import Event
from fedipfs.privacy.ledger import Cap, Ledger, ledgers

TASK = "fedipfs.tasks.vision:Mnist"
NIGHT = datetime(2026, 12, 1, 2, 2, tzinfo=timezone(timedelta(hours=1)))
FILE = """
tasks: [fedipfs.tasks.vision:Mnist]   # targets that may be trained; nothing else is imported
max_parameters: 20000000
min_cohort: 2          # of clients asked in a round
min_examples: 1        # here, or nothing is trained
coordinators: null     # organizations; null: every coordinator in trust.toml
hours: null            # "20:00-06:00", local time; null: always
rounds_per_hour: null  # messages to train
secagg: {required: false, min_clients: 3}
privacy: null          # {epsilon: 3.0, delta: 1.0e-5}
"""


def policy(**section) -> Policy:
    return Policy.of({"tasks": [TASK], **section})


def asked(**changes) -> Asked:
    plain = Asked(Work.TRAIN, "fl.example.org", TASK, 1000, 5, 100, False, False, NIGHT)
    return plain._replace(**changes)


def refused(found: Policy, **changes) -> str:
    with pytest.raises(PolicyRefused) as caught:
        found.check(asked(**changes))
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    return str(caught.value)


# ---- the file


def test_the_file_as_it_is_written_is_what_counts_without_one():
    assert Policy.of(yaml.safe_load(FILE)) == policy(secagg={"required": False, "min_clients": 3})
    found = policy()
    assert (found.min_cohort, found.min_examples, found.rounds_per_hour) == (2, 1, None)
    assert found.max_bytes == 8 * 20_000_000 + 2**20
    found.check(asked())


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"task": [TASK]}, "policy.task is not known; did you mean policy.tasks?"),
        ({"min_cohorts": 3}, "policy.min_cohorts is not known; did you mean policy.min_cohort?"),
        ({"zzz": 3}, "policy.zzz is not known; use tasks, max_parameters, "),
        ({"tasks": None}, "policy.tasks=None should be a list with at least one name"),
        ({"tasks": []}, "policy.tasks=[] should be a list"),
        ({"tasks": TASK}, f"policy.tasks='{TASK}' should be a list"),
        ({"tasks": ["Mnist"]}, "policy.tasks: 'Mnist' should be module:Class"),
        ({"tasks": ["a,b:C"]}, "policy.tasks: 'a,b:C' should be module:Class"),
        ({"tasks": [7]}, "policy.tasks: 7 should be a name"),
        ({"max_parameters": None}, "policy.max_parameters=None should be a whole number from 1"),
        ({"max_parameters": 2e7}, "policy.max_parameters=20000000.0 should be a whole number"),
        ({"min_cohort": 0}, "policy.min_cohort=0 should be a whole number from 1 on"),
        ({"min_cohort": True}, "policy.min_cohort=True should be a whole number"),
        ({"min_examples": "10"}, "policy.min_examples='10' should be a whole number"),
        ({"rounds_per_hour": 0.5}, "policy.rounds_per_hour=0.5 should be a whole number"),
        ({"coordinators": "fl.example.org"}, "policy.coordinators='fl.example.org' should be a l"),
        ({"coordinators": []}, "policy.coordinators=[] should be a list with at least one name"),
        ({"coordinators": [""]}, "policy.coordinators: '' should be a name"),
        ({"hours": "20-06"}, "policy.hours='20-06' should be text such as \"20:00-06:00\""),
        ({"hours": "25:00-26:00"}, "policy.hours='25:00-26:00' should be text"),
        ({"hours": "08:00-08:00"}, "policy.hours='08:00-08:00' should be text"),
        ({"hours": "00:00-24:00"}, "policy.hours='00:00-24:00' should be text"),
        ({"hours": ""}, "policy.hours='' should be text"),
        ({"hours": "08:00-12:00,"}, "policy.hours='08:00-12:00,' should be text"),
        ({"hours": 1200}, "policy.hours=1200 should be text"),
        (
            {"secagg": {"require": True}},
            "policy.secagg.require is not known; did you mean policy",
        ),
        ({"secagg": {"required": "yes"}}, "policy.secagg.required='yes' should be bool"),
        ({"secagg": {"min_clients": "5"}}, "policy.secagg.min_clients='5' should be int"),
        ({"secagg": {"parameters": "ab"}}, "policy.secagg.parameters='ab' should be 64 digits"),
        ({"secagg": True}, "policy.secagg=True should be a section with keys of its own"),
        ({"privacy": {"epsilon": 3.0}}, "policy.privacy.delta=None should be a number above 0"),
        ({"privacy": {"epsilon": 3.0, "delta": "1e-5"}}, "policy.privacy.delta='1e-5' should be"),
        ({"privacy": {"epsilon": 0, "delta": 1e-5}}, "policy.privacy.epsilon=0 should be a number"),
        ({"privacy": {"epsilon": True, "delta": 1e-5}}, "policy.privacy.epsilon=True should be"),
        ({"privacy": {"epsilon": float("nan"), "delta": 1e-5}}, "policy.privacy.epsilon=nan"),
        ({"privacy": {"epsilon": 3.0, "delta": 1}}, "policy.privacy.delta=1 should be a number"),
        ({"privacy": {"eps": 3.0, "delta": 1e-5}}, "policy.privacy.eps is not known; did you mean"),
        ({"privacy": 3.0}, "policy.privacy=3.0 should be a section"),
    ],
)
def test_a_rule_that_is_misspelt_or_makes_no_sense_is_not_dropped(section, says):
    with pytest.raises(ConfigError) as caught:
        policy(**section)
    assert str(caught.value).startswith(says), caught.value
    assert "\n" not in str(caught.value)


def test_what_other_code_obeys_is_in_its_own_words():
    secagg = {"required": True, "min_clients": 4, "clip_max": 2.0, "parameters": "ab" * 32}
    found = policy(
        tasks=[TASK, "tasks/scans.py:Scans"],
        secagg=secagg,
        privacy={"epsilon": 3, "delta": 1e-5},
    )
    node = found.node_config()
    assert node == {
        "allowed-targets": f"{TASK},tasks/scans.py:Scans",
        "secagg-required": True,
        "secagg-min-clients": 4,
        "secagg-clip-max": 2.0,
        "secagg-parameters": "ab" * 32,
        "ledger-epsilon": 3.0,
        "ledger-delta": 1e-5,
    }
    demands = Demands.of(node)
    assert demands.required and found.requires_masks
    assert demands.floors.clients == 4 and demands.floors.clip == (0.0, 2.0)
    assert not policy().requires_masks


# ---- what is refused


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        (
            {"coordinators": ["a.example.org"]},
            {},
            "policy.coordinators: this site does not work for fl.example.org",
        ),
        ({}, {"task": "evil:Task"}, "policy.tasks: evil:Task is no task of this site"),
        ({}, {"task": TASK + "2"}, f"policy.tasks: {TASK}2 is no task of this site"),
        ({}, {"task": None}, "policy.tasks: the message names no task"),
        (
            {"max_parameters": 999},
            {},
            "policy.max_parameters: a model of 1,000 parameters, and this site takes at most 999 "
            "parameters",
        ),
        (
            {"min_cohort": 6},
            {},
            "policy.min_cohort: 5 are asked in this round, and this site trains among at least 6",
        ),
        (
            {},
            {"cohort": None},
            "policy.min_cohort: the message does not say how many are asked, and this site trains "
            "among at least 2",
        ),
        (
            {"min_examples": 101},
            {},
            "policy.min_examples: this site has too few examples to train on",
        ),
        (
            {"min_examples": 100},
            {"work": Work.EVALUATE, "examples": 0, "held_out": 99},
            "policy.min_examples: this site has too few examples to evaluate on",
        ),
        (
            {"hours": "20:00-06:00"},
            {"now": NIGHT.replace(hour=14, minute=3)},
            "policy.hours: this site trains from 20:00 to 06:00, and it is 14:03",
        ),
        (
            {"hours": "08:00-12:00, 20:00-06:00"},
            {"now": NIGHT.replace(hour=12, minute=0), "work": Work.EVALUATE},
            "policy.hours: this site evaluates from 08:00 to 12:00 and from 20:00 to 06:00, and "
            "it is 12:00",
        ),
        (
            {"rounds_per_hour": 2},
            {"trained": [NIGHT - timedelta(minutes=m) for m in (90, 59, 1)]},
            "policy.rounds_per_hour: this site trains at most 2 times an hour",
        ),
        (
            {"secagg": {"required": True}},
            {},
            "policy.secagg: what this site learns leaves under masks or not at all: use secagg=on",
        ),
        (
            {"privacy": {"epsilon": 3.0, "delta": 1e-5}},
            {},
            "policy.privacy: nothing leaves this site without noise: run with privacy=dp_sgd, or "
            "train with privacy=distributed and secagg=on",
        ),
    ],
)
def test_a_refusal_names_the_rule_and_says_no_more_than_it_needs(section, changes, says):
    assert refused(policy(**section), **changes) == says


def test_times_of_a_clock_that_was_ahead_do_not_count():
    ahead = [NIGHT + timedelta(days=3)] * 2
    found = policy(rounds_per_hour=2)
    found.check(asked(trained=ahead))
    assert "rounds_per_hour" in refused(found, trained=[*ahead, NIGHT, NIGHT])


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ({"min_examples": 100}, {"held_out": 100}),
        ({"min_examples": 1}, {"held_out": 0}),
        ({"coordinators": ["a", "fl.example.org"]}, {}),
        ({"max_parameters": 1000}, {}),
        ({"min_cohort": 5}, {}),
        ({"min_cohort": 1}, {"cohort": None}),
        ({"min_examples": 100}, {}),
        ({"hours": "20:00-06:00"}, {}),
        ({"rounds_per_hour": 2}, {"trained": [NIGHT - timedelta(minutes=m) for m in (61, 60, 1)]}),
        ({"secagg": {"required": True}}, {"masked": True}),
        ({"privacy": {"epsilon": 3.0, "delta": 1e-5}}, {"private": True}),
    ],
)
def test_what_just_fits_is_done(section, changes):
    policy(**section).check(asked(**changes))


ALL = {
    "coordinators": ["another"],
    "max_parameters": 1,
    "min_cohort": 100,
    "min_examples": 1000,
    "hours": "12:00-13:00",
    "rounds_per_hour": 1,
    "secagg": {"required": True},
    "privacy": {"epsilon": 3.0, "delta": 1e-5},
}
EVERYTHING = {*ALL, "tasks"}
APPLIES = {
    Work.TRAIN: EVERYTHING,
    Work.BEGIN: EVERYTHING - {"secagg", "privacy"},
    Work.STAGE: {"coordinators"},
    Work.EVALUATE: {"coordinators", "tasks", "max_parameters", "hours", "secagg", "privacy"},
    Work.OFFER: {"coordinators", "tasks", "max_parameters"},  # no model comes with that one
    Work.FETCH: {"coordinators", "tasks", "max_parameters", "hours"},  # and here no task
}


@pytest.mark.parametrize("rule", sorted(EVERYTHING))
@pytest.mark.parametrize("work", Work)
def test_each_rule_is_for_the_work_that_it_is_for(work, rule):
    found = policy(**({} if rule == "tasks" else {rule: ALL[rule]}))
    changes = {"work": work, "trained": [NIGHT], "task": "x:Y" if rule == "tasks" else TASK}
    if rule in APPLIES[work]:
        assert refused(found, **changes).startswith(f"policy.{rule}: ")
    else:
        found.check(asked(**changes))


def test_what_a_coordinator_wrote_stays_one_short_line():
    text = refused(policy(), task="x\n\x1b[31m" + "y" * 1000 + ":Z")
    assert len(text) < 200 and text.isprintable()


def test_what_carries_no_task_need_not_name_one():
    for work in (Work.FETCH, Work.BEGIN, Work.STAGE):
        policy().check(asked(work=work, task=None))


@given(st.integers(0, 1439), st.integers(1, 1440), st.integers(0, 1439))
def test_a_window_holds_the_minutes_from_its_start_until_its_end(start, end, minute):
    if start == end % 1440:
        return
    walked = {(start + step) % 1440 for step in range((end - start) % 1440)}
    clock = "{:02}:{:02}".format
    (found,) = policy(hours=f"{clock(*divmod(start, 60))}-{clock(*divmod(end, 60))}").hours
    assert (minute in found) == (minute in walked)
    assert found == Window(start, end)


def test_it_is_local_time_that_counts():
    found = policy(hours="20:00-06:00")
    found.check(asked(now=datetime(2026, 12, 1, 20, 0, tzinfo=timezone(timedelta(hours=-5)))))
    assert "it is 13:00" in refused(found, now=datetime(2026, 12, 1, 13, tzinfo=UTC))


# ---- the ledger that it asks for

ONE, TWO = "a" * 64, "b" * 64


def of(epsilon: float, delta: float = 1e-5) -> Policy:
    return policy(privacy={"epsilon": epsilon, "delta": delta})


def test_the_ledger_is_begun_with_the_policys_cap(tmp_path):
    folder = tmp_path / "ledger"
    assert open_ledger(policy(), folder, ONE) is None
    assert not folder.exists()
    found = open_ledger(of(3.0), folder, ONE)
    assert found.cap == Cap(3.0, 1e-5, "prv") and found.fingerprint == ONE
    assert open_ledger(of(3.0), folder, ONE).lines == found.lines
    assert of(3.0).privacy == Budget(3.0, 1e-5)


@pytest.mark.parametrize(("epsilon", "delta"), [(4.0, 1e-5), (3.0, 1e-4), (2.0, 1e-4)])
def test_a_policy_that_allows_more_than_the_ledger_does_not_start(tmp_path, epsilon, delta):
    found = open_ledger(of(3.0), tmp_path, ONE)
    before = found.lines
    with pytest.raises(ConfigError) as caught:
        open_ledger(of(epsilon, delta), tmp_path, ONE)
    text = str(caught.value)
    assert text.startswith(f"policy.privacy allows epsilon {epsilon:g} at delta {delta:g}, and the")
    assert f"`fedipfs privacy cap --ledger {tmp_path} {ONE} --epsilon {epsilon:g}" in text
    assert found.lines == before


def test_a_policy_that_allows_less_counts_and_what_was_spent_stays_spent(tmp_path):
    found = Ledger.create(tmp_path, ONE, Cap(50.0, 1e-5, "rdp"))
    event = Event(2.0, 0.25, 3)
    told = {"purpose": "training", "run": "r", "round": 1, "coordinator": "c"}
    found.spend([event], **told)
    tight = open_ledger(of(0.01), tmp_path, ONE)
    assert tight.cap == Cap(0.01, 1e-5, "rdp") and len(tight.spends) == 1
    with pytest.raises(BudgetSpent):
        tight.spend([event], **told)


def test_other_records_do_not_get_a_second_budget_by_the_way(tmp_path):
    """They may be a new version of those that have spent theirs."""
    first = open_ledger(of(3.0), tmp_path, ONE)
    with pytest.raises(LedgerError) as caught:
        open_ledger(of(3.0), tmp_path, TWO, data="hospital.csv")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path} has a privacy ledger, but not for hospital.csv ({TWO})")
    assert f"`fedipfs privacy adopt --ledger {tmp_path} {ONE} {TWO}`" in text
    assert f"init --ledger {tmp_path} {TWO} --epsilon 3 --delta 1e-05 --unrelated`" in text
    assert [each.fingerprint for each in ledgers(tmp_path)] == [ONE]
    first.adopt(TWO)
    assert open_ledger(of(3.0), tmp_path, TWO).fingerprint == ONE
