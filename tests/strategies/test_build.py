"""Numbers that a strategy cannot work with are refused before a run begins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedipfs.errors import ConfigError
from fedipfs.strategies import Brief, build
from fedipfs.strategies.build import required_successes

BRIEF = Brief(per_round=8, min_successes=4)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fedadam", {"eta": -1}, r"strategy\.eta=-1 must be a number above 0"),
        ("fedadam", {"eta": "fast"}, r"strategy\.eta=fast must be a number"),
        ("fedadam", {"tau": 0}, r"strategy\.tau=0 must be a number above 0"),
        ("fedyogi", {"beta_1": 1.0}, r"strategy\.beta_1=1\.0 must be a number from 0 to below 1"),
        ("fedadagrad", {"eta": float("nan")}, r"strategy\.eta=nan"),
        ("fedavgm", {"server_momentum": -0.1}, r"strategy\.server_momentum=-0\.1"),
        ("fedavgm", {"server_learning_rate": True}, r"server_learning_rate=True"),
        ("fedprox", {"proximal_mu": -1}, r"strategy\.proximal_mu=-1 must be a number of at least"),
        ("qfedavg", {"client_learning_rate": 0.1, "q": -1}, r"strategy\.q=-1"),
        ("qfedavg", {"client_learning_rate": 0}, r"strategy\.client_learning_rate=0"),
        ("fedtrimmedavg", {"beta": 0.6}, r"strategy\.beta=0\.6 must be a number from 0 to below"),
        ("krum", {"num_malicious_nodes": "abc"}, r"num_malicious_nodes=abc must be a whole number"),
        ("krum", {"num_malicious_nodes": -1}, r"num_malicious_nodes=-1"),
        ("bulyan", {"num_malicious_nodes": 1.5}, r"num_malicious_nodes=1\.5"),
        ("multikrum", {"num_nodes_to_select": 0}, r"num_nodes_to_select=0"),
        ("multikrum", {"num_nodes_to_select": 9}, r"=9 is more than clients\.per_round=8"),
        ("fedavg", {"weighted_by_key": 3}, r"strategy\.weighted_by_key=3 must be a text"),
        ("fedavg", {"train_metrics_aggr_fn": "x"}, r"train_metrics_aggr_fn=x must be a function"),
    ],
)
def test_a_number_that_cannot_work_is_named(name, options, says):
    with pytest.raises(ConfigError, match=says):
        build({"name": name, **options}, BRIEF)


def test_numbers_at_the_edge_are_taken():
    assert build({"name": "fedprox", "proximal_mu": 0}, BRIEF).proximal_mu == 0
    assert build({"name": "fedtrimmedavg", "beta": 0.0}, BRIEF).beta == 0
    made = build({"name": "multikrum", "num_malicious_nodes": 2, "num_nodes_to_select": 8}, BRIEF)
    assert (made.num_malicious_nodes, made.num_nodes_to_select) == (2, 8)


@pytest.mark.parametrize(
    ("name", "malicious", "least", "needed"),
    [
        ("fedavg", None, 4, 4),
        ("krum", 1, 4, 5),
        ("krum", 1, 6, 6),
        ("multikrum", 2, 4, 7),
        ("bulyan", 1, 4, 7),
        ("bulyan", None, 1, 3),
    ],
)
def test_a_round_needs_as_many_good_updates_as_the_strategy(name, malicious, least, needed):
    options = {"name": name}
    if malicious is not None:
        options["num_malicious_nodes"] = malicious
    brief = replace(BRIEF, min_successes=least)
    for clip in ({}, {"clip_update_norm": 1.0}):
        assert required_successes(build({**options, **clip}, brief), brief) == needed


def test_a_round_that_could_never_succeed_is_refused():
    with pytest.raises(ConfigError, match=r"needs at least 9 clients a round.*per_round is 8"):
        build({"name": "krum", "num_malicious_nodes": 3}, BRIEF)
