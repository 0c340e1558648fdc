"""The coordinator's side of secure aggregation, where a round cannot be had at all."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, RecordDict
from sites import OPTIONS, Sites

from fedipfs.errors import RunFailed


@pytest.fixture
def sites(tmp_path, store):
    return Sites(tmp_path, store)


def test_a_round_among_sites_gives_a_sum(sites):
    assert sites.play(sites.secure()).note["survivors"] == 3


def test_two_nodes_of_one_organization_are_no_cohort(sites):
    secure = sites.secure()
    secure.name_of = lambda node: "alpha"
    with pytest.raises(RunFailed, match="two nodes are of one organization"):
        sites.play(secure)


def test_a_strategy_that_gives_clients_different_tasks_is_refused(sites):
    messages = []
    for place, mu in enumerate((0.0, 0.0, 1.0)):
        ask = ConfigRecord({**sites.ask, "proximal-mu": mu})
        content = RecordDict({"arrays": sites.model, "config": ask})
        messages.append(sites.grid.create_message(content, "train", 2 + place, ""))
    with pytest.raises(RunFailed, match="gives clients 1 models and 2 tasks"):
        sites.secure().train(1, sites.model, messages)
    assert not sites.journals.exists()  # nobody was asked


def test_weights_that_vanish_are_the_rounds_failure_and_not_a_division_by_zero(sites):
    secure = sites.secure(options={**OPTIONS, "examples": 2**52})
    with pytest.raises(RunFailed, match="the clients' weight sums up to 0"):
        sites.play(secure)
    assert secure.sum is None


def test_terms_that_a_cohort_is_too_small_for_end_the_round(sites):
    with pytest.raises(RunFailed, match=r"round 1: secure aggregation: threshold=4 of 3 clients"):
        sites.play(sites.secure(options={**OPTIONS, "threshold": 4}))


def test_who_is_silent_at_a_stage_is_given_up_at_its_deadline(sites):
    """The message is lost; with three of three needed the round fails and says why."""
    sites.grid._grid.silent.add(3)
    with pytest.raises(RunFailed, match=r"2 clients advertised keys .*beta: no answer within 0.2"):
        sites.play(sites.secure(deadline_s=0.2))
