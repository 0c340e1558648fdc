"""What a run has cost is counted from what clients say, and no client's words end the run."""

from __future__ import annotations

import json
import math
import time

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.flower_compat import set_identity
from fedipfs.ipld import dagcbor
from fedipfs.privacy import noise
from fedipfs.privacy.accounting import epsilon
from fedipfs.server.records import plain
from fedipfs.server.spending import Spending

SECTION = {
    "name": "dp_sgd",
    "epsilon": 3.0,
    "noise_multiplier": 1.5,
    "clip_norm": 0.8,
    "delta": 1e-5,
    "sample_rate": 0.1,
    "accountant": "rdp",
    "metrics_noise_multiplier": 20.0,
}
STEPS, METRICS = (1.5, 0.1), (20.0, 1.0)


def question() -> Message:
    set_identity(run_id=1, node_id=1)
    return Message(RecordDict(), 2, "train")


def answer(**record) -> Message:
    content = RecordDict({"privacy": ConfigRecord(record)} if record else {})
    return Message(content, reply_to=question())


def events(*paid: tuple[float, float, float]) -> Message:
    return answer(events=[float(value) for event in paid for value in event])


def spending(**changed) -> Spending:
    made = Spending.of({**SECTION, **changed})
    assert made is not None
    return made


def test_without_privacy_there_is_nothing_to_count():
    assert Spending.of({"name": "none"}) is None


def test_what_each_client_paid_adds_up_over_rounds_and_the_worst_counts():
    kept = spending()
    kept.heard("a", events((*STEPS, 10), (*METRICS, 1)))
    kept.heard("b", events((*STEPS, 10)))
    first = kept.close()
    kept.heard("a", events((*STEPS, 10)))
    kept.heard("a", events((*METRICS, 1)))
    second = kept.close()
    assert first["clients"]["b"]["events"] == second["clients"]["b"]["events"] == [[*STEPS, 10]]
    assert second["clients"]["a"]["events"] == [[*STEPS, 20], [*METRICS, 2]]
    for name, accountant in (("epsilon", "rdp"), ("epsilon_rdp", "rdp"), ("epsilon_prv", "prv")):
        exact = epsilon([(*STEPS, 20), (*METRICS, 2)], 1e-5, accountant)
        assert second["clients"]["a"][name] == second[name] == exact
    assert second["epsilon"] > first["epsilon"] > second["clients"]["b"]["epsilon"] > 0
    assert {key: second[key] for key in ("name", "delta", "accountant")} == {
        "name": "dp_sgd",
        "delta": 1e-5,
        "accountant": "rdp",
    }


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_accountant_that_counts_is_the_one_that_was_chosen(accountant):
    kept = spending(accountant=accountant)
    kept.heard("a", events((*STEPS, 100)))
    record = kept.close()
    assert record["epsilon"] == record[f"epsilon_{accountant}"]
    assert record["epsilon_prv"] < record["epsilon_rdp"]


def test_before_anybody_has_answered_nothing_is_spent():
    record = spending().close()
    assert (record["clients"], record["epsilon"]) == ({}, 0.0)


def test_a_client_that_failed_says_nothing_of_what_it_paid():
    """Its own ledger knows."""
    kept = spending()
    kept.heard("a", Message(Error(2, "out of memory"), reply_to=question()))
    assert kept.close()["clients"] == {}


def test_it_goes_on_from_its_record_as_if_it_had_not_stopped():
    """The record comes back from DAG-CBOR, in which a run that is resumed finds it."""
    whole, parts = spending(), spending()
    for kept in (whole, parts):
        kept.heard("a", events((*STEPS, 7), (*METRICS, 1)))
        kept.heard("b", events((*STEPS, 7)))
    whole.close()
    record = dagcbor.decode(dagcbor.encode(plain(parts.close())))
    resumed = spending()
    resumed.restore(record)
    for kept in (whole, resumed):
        kept.heard("b", events((*STEPS, 5)))
    assert whole.close() == resumed.close()
    assert whole.summary() == resumed.summary() | {"noise": whole.summary()["noise"]}


def test_the_notes_are_of_the_round_and_whose_noise_it_was_is_kept():
    kept = spending()
    said = {"ledger": "ab" * 32, "clipping": "ghost", "noise": noise.KNOWN}
    kept.heard("a", answer(events=[*STEPS, 1.0], **said))
    assert kept.close()["clients"]["a"].items() >= said.items()
    assert not kept.close()["clients"]["a"].keys() & said.keys()
    assert noise.KNOWN in kept.summary()["noise"]


def test_the_summary_has_what_was_planned_beside_what_was_spent():
    kept = spending()
    kept.heard("a", events((*STEPS, 10)))
    got = kept.summary()
    assert {key: got[key] for key in ("unit", "planned_epsilon", "noise_multiplier")} == {
        "unit": "record",
        "planned_epsilon": 3.0,
        "noise_multiplier": 1.5,
    }
    assert got["clip_norm"] == 0.8 and got["sample_rate"] == 0.1
    assert got["epsilon"] == epsilon([(*STEPS, 10)], 1e-5, "rdp")


# ---- clients that say anything

NUMBER = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([*STEPS, *METRICS, 1.0, 2.0, 1e7, 2.0**40, 1e-300, 1e300]),
)
SAID = st.one_of(
    st.lists(NUMBER, max_size=12),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6),
    st.lists(st.text(max_size=3), max_size=6),
    st.lists(st.binary(max_size=3), max_size=6),
    st.lists(st.booleans(), max_size=6),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.booleans(),
    st.integers(-5, 5),
    NUMBER,
)


@given(st.lists(st.tuples(st.sampled_from("ab"), SAID, SAID), max_size=5))
def test_whatever_clients_say_the_round_gets_a_record(messages):
    kept = spending()
    for client, events_, ledger in messages:
        kept.heard(client, answer(events=events_, ledger=ledger, noise=ledger))
    record = kept.close()
    restored = spending()
    restored.restore(dagcbor.decode(dagcbor.encode(plain(record))))
    assert restored.close()["epsilon"] == record["epsilon"]
    assert math.isfinite(record["epsilon"])
    for each in record["clients"].values():
        assert {tuple(event[:2]) for event in each["events"]} <= {STEPS, METRICS}
    json.dumps(kept.summary(), allow_nan=False)


def test_mechanisms_that_the_run_does_not_have_are_left_out_or_many_would_cost_time():
    kept = spending()
    lie = [(0.3 + 1e-3 * i, 0.013, 1000 + i) for i in range(300)]
    began = time.process_time()
    kept.heard("a", events(*lie, (*STEPS, 3)))
    record = kept.close()
    assert record["clients"]["a"]["events"] == [[*STEPS, 3]]
    assert time.process_time() - began < 5  # a minute, with a bound for each


def test_more_steps_than_can_be_accounted_for_count_as_the_most():
    kept = spending()
    for _ in range(3):
        kept.heard("a", events((*STEPS, 9e6)))
    assert kept.close()["clients"]["a"]["events"] == [[*STEPS, 10_000_000]]


def test_long_words_are_cut_and_stay_on_one_line():
    kept = spending()
    kept.heard("a", answer(events=[*STEPS, 1.0], noise="x\n" * 5000, clipping="\x1b[2J"))
    said = kept.close()["clients"]["a"]
    assert len(said["noise"]) < 500 and "\n" not in said["noise"]
    assert "\x1b" not in said["clipping"]
