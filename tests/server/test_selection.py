"""Who is asked: cohorts, rests and returns, requirements, late joiners."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.errors import RunFailed
from fedipfs.server.selection import Selection, fits

NODES = list(range(2, 12))


def cohorts(selection: Selection, rounds: int, nodes=NODES) -> list[list[int]]:
    return [
        selection.cohort(number, selection.fit(number, nodes, {}))
        for number in range(1, rounds + 1)
    ]


@given(st.integers(1, 10), st.integers(0, 2**32), st.integers(1, 100))
def test_a_cohort_is_drawn_from_those_that_are_there_and_by_the_seed(size, seed, number):
    nodes = NODES[::-1]  # in whatever order the grid names them
    drawn = Selection(size, seed=seed).cohort(number, nodes)
    assert len(set(drawn)) == size and set(drawn) <= set(NODES) and drawn == sorted(drawn)
    assert drawn == Selection(size, seed=seed).cohort(number, nodes)


def test_rounds_and_seeds_differ():
    drawn = cohorts(Selection(3, seed=1), 20)
    assert len({tuple(each) for each in drawn}) > 10
    assert drawn != cohorts(Selection(3, seed=2), 20)


def test_a_share_is_of_those_that_fit():
    assert Selection(0.3).size(10) == 3
    assert Selection(0.25).size(10) == 3
    assert Selection(0.1, least=2).size(10) == 2
    assert len(Selection(0.5).cohort(1, NODES[:4])) == 2
    assert len(Selection(8).cohort(1, NODES[:4])) == 4


def test_extra_clients_are_asked_beyond_the_size():
    selection = Selection(4, extra=3)
    assert len(selection.cohort(1, NODES)) == 7
    assert selection.size(len(NODES)) == 4


def test_round_robin_asks_everybody_equally_often_also_after_a_resume():
    selection = Selection(3, select="round_robin", seed=5)
    first = cohorts(selection, 10)
    resumed = Selection(3, select="round_robin", seed=5)
    resumed.restore(selection.state())
    rest = [resumed.cohort(number, NODES) for number in range(11, 21)]
    counts = Counter(node for each in first + rest for node in each)
    assert set(counts.values()) == {6}
    assert first == cohorts(Selection(3, select="round_robin", seed=5), 10)


def test_a_late_joiner_takes_part_from_the_next_round():
    selection = Selection(3, select="round_robin", seed=1)
    cohorts(selection, 4, NODES[:4])
    assert 99 in selection.cohort(5, [*NODES[:4], 99])


def test_who_keeps_failing_rests_and_comes_back_and_rests_longer():
    selection = Selection(9, exclude_after=2, rest_rounds=3)
    seen = []
    for number in range(1, 16):
        cohort = selection.cohort(number, NODES)
        seen.append(2 in cohort)
        fails = [node for node in cohort if node == 2]
        selection.heard(number, [node for node in cohort if node != 2], fails)
    drawn = iter(seen)
    failures = [number for number, there in enumerate(drawn, 1) if there]
    gaps = [later - earlier for earlier, later in pairwise(failures[1:])]
    assert failures and gaps and gaps[0] >= 4 and (len(gaps) < 2 or gaps[1] >= 7)


def test_one_good_answer_wipes_the_slate():
    selection = Selection(10, exclude_after=2, rest_rounds=9)
    selection.heard(1, [], [2])
    selection.heard(2, [2], [])
    selection.heard(3, [], [2])
    assert 2 in selection.cohort(4, NODES)
    selection.heard(4, [], [2])
    assert 2 not in selection.cohort(5, NODES)
    restored = Selection(10, exclude_after=2, rest_rounds=9)
    restored.restore(selection.state())
    assert 2 not in restored.cohort(5, NODES)


def test_those_that_rest_are_asked_where_too_few_others_are_there():
    selection = Selection(5, least=4, exclude_after=1, rest_rounds=50)
    selection.heard(1, [], NODES[:8])
    selection.heard(2, [], NODES[:1])  # this one rests longest
    cohort = selection.cohort(3, NODES)
    assert len(cohort) == 4 and set(NODES[8:]) < set(cohort) and NODES[0] not in cohort


def test_capabilities():
    offers = {"gpu": True, "examples": 120, "cores": 2, "tasks": ["mnist", "digits"]}
    assert fits({}, {})
    assert fits({"gpu": True, "examples_min": 100, "cores_max": 4, "tasks": "digits"}, offers)
    for wanted in ({"gpu": False}, {"examples_min": 121}, {"cores_max": 1}, {"region": "eu"},
                   {"tasks": "cifar"}, {"memory_min": 0}):  # fmt: skip
        assert not fits(wanted, offers), wanted
    assert not fits({"examples_min": 1}, {"examples": "many"})
    assert not fits({"examples_min": 1}, {"examples": True})


def test_too_few_that_fit_is_said_with_what_is_required():
    selection = Selection(5, least=3, requires={"gpu": True})
    with pytest.raises(RunFailed, match=r"round 4: 1 clients are there that offer \{'gpu': True\}"):
        selection.fit(4, NODES, {3: {"gpu": True}})
