"""Numbers that a strategy cannot work with are refused before a run begins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedipfs.errors import ConfigError
from fedipfs.strategies import Brief, build
from fedipfs.strategies.catalogue import required_successes

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
        (
            "multikrum",
            {"num_nodes_to_select": 9},
            r"needs at least 9 .*m = strategy\.num_nodes_to_select = 9",
        ),
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
    made = build({"name": "multikrum", "num_malicious_nodes": 2, "num_nodes_to_select": 6}, BRIEF)
    assert (made.num_malicious_nodes, made.num_nodes_to_select) == (2, 6)


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


@pytest.mark.parametrize(
    ("options", "least", "says"),
    [
        (
            {"name": "krum", "num_malicious_nodes": 3},
            4,
            r"krum needs at least 9 clients a round \(2 f \+ 3 with .*= 3\).*per_round is 8",
        ),
        (
            {"name": "bulyan", "num_malicious_nodes": 2},
            4,
            r"bulyan needs at least 11 clients a round \(4 f \+ 3 with",
        ),
        (  # whoever takes the mean of all withstands nobody
            {"name": "multikrum", "num_malicious_nodes": 1, "num_nodes_to_select": 8},
            4,
            r"multikrum needs at least 9 clients a round .*m \+ f with m = .*select = 8",
        ),
        ({"name": "fedavg"}, 9, r"^clients\.min_successes=9 is more than clients\.per_round=8; "),
        ({"name": "krum"}, 9, r"^clients\.min_successes=9 is more than clients\.per_round=8; "),
        ({"name": "fedadam"}, 9, r"^clients\.min_successes=9 is more than"),
    ],
)
def test_a_round_that_could_never_succeed_is_refused(options, least, says):
    with pytest.raises(ConfigError, match=says) as caught:
        build(options, replace(BRIEF, min_successes=least))
    assert ("malicious" in str(caught.value)) == ("num_malicious_nodes" in options)
