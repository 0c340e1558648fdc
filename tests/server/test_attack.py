"""The attack harness: who attacks, what they send, and that it is checked as any update is."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from flwr.app import ConfigRecord
from one_round import OneRound, values
from parties import Parties
from quickstart import make_app
from runs import configure

from fedipfs.errors import BlockCorrupt, ConfigError, NotRecipient
from fedipfs.exchange import from_numpy, store_arrays
from fedipfs.server import settings
from fedipfs.server.attack import Adversary, alie_z, malicious, node_config
from fedipfs.strategies import Brief, build

MODEL = {"w": np.array([10, 20, 30], "f4"), "n": np.array(7, "i8")}
DELTAS = ([1, 2, 3], [3, 2, 1], [-1, 0, 1], [5, 5, 5])
ATTACKS = ["gaussian", "sign_flip", "scale", "alie", "nan"]


def attack(name: str, **options):
    given = {"name": name, "fraction": 0.25, "seed": 3, "std": 0.5, "factor": 4.0, "z": None}
    return {**given, **options}


def one_round(store) -> OneRound:
    updates = [
        {"w": MODEL["w"] + np.array(delta, "f4"), "n": np.array(7 + delta[0], "i8")}
        for delta in DELTAS
    ]
    return OneRound(store, MODEL, updates)


def poisoned(store, name: str, nodes=frozenset({5}), number: int = 1, *, read=False, **options):
    """The replies of nodes 2 to 5 after the attack, and those before it."""
    replies = one_round(store).replies(build({"name": "fedavg"}, Brief(4, 1)))
    adversary = Adversary(attack(name, **options), nodes, read=read)
    return adversary(number, replies), replies


def crafted(store, name: str, **options) -> np.ndarray:
    return values(poisoned(store, name, **options)[0][3].content["arrays"])["w"]


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 2), (0.24, 2), (0.26, 3), (1.0, 10)])
def test_so_many_attack_as_the_fraction_says_by_seed(fraction, count):
    chosen = malicious(attack("nan", fraction=fraction), 10)
    assert len(chosen) == count
    assert chosen <= set(range(10))
    assert malicious(attack("scale", fraction=fraction), 10) == chosen  # whatever the attack
    if count < 10:
        drawn = {malicious(attack("nan", fraction=fraction, seed=n), 10) for n in range(20)}
        assert len(drawn) > 5
    assert malicious({"name": "none"}, 10) == frozenset()


def test_flipped_signs_and_boosts_are_relative_to_the_model(store):
    np.testing.assert_allclose(crafted(store, "sign_flip", factor=1.0), [5, 15, 25])
    np.testing.assert_allclose(crafted(store, "sign_flip", factor=2.0), [0, 10, 20])
    np.testing.assert_allclose(crafted(store, "scale", factor=4.0), [30, 40, 50])


def test_noise_takes_the_place_of_the_update_and_follows_from_the_seed(store):
    noise = crafted(store, "gaussian", std=0.5) - MODEL["w"]
    assert (noise != 0).all()
    np.testing.assert_allclose(
        crafted(store, "gaussian", std=1.0) - MODEL["w"], 2 * noise, atol=1e-5
    )
    assert not np.allclose(crafted(store, "gaussian", number=2) - MODEL["w"], noise)
    assert not np.allclose(crafted(store, "gaussian", seed=4) - MODEL["w"], noise)
    both = poisoned(store, "gaussian", frozenset({4, 5}))[0]
    one, other = (values(reply.content["arrays"])["w"] for reply in both[2:])
    assert not np.allclose(one, other)


def test_noise_has_the_deviation_that_was_asked_for(store):
    model = {"w": np.ones(600_000, "f4")}  # three leaves
    replies = OneRound(store, model, [model]).replies(build({"name": "fedavg"}, Brief(1, 1)))
    (reply,) = Adversary(attack("gaussian", std=2.0), {2}, read=True)(1, replies)
    noise = values(reply.content["arrays"])["w"] - 1
    assert abs(noise.std() - 2) < 0.02
    assert abs(noise.mean()) < 0.02
    assert not np.allclose(noise[: 1 << 18], noise[1 << 18 : 2 << 18])


def test_a_little_is_enough_hides_within_the_honest(store):
    # Honest: 1 3 -1, 2 2 0, 3 1 1 about the model.
    mean, deviation = np.array([1, 4 / 3, 5 / 3]), np.sqrt([8 / 3, 8 / 9, 8 / 9])
    found = crafted(store, "alie", z=1.5)
    np.testing.assert_allclose(found, MODEL["w"] + mean - 1.5 * deviation, rtol=1e-6)
    np.testing.assert_allclose(crafted(store, "alie"), MODEL["w"] + mean, rtol=1e-6)  # z = 0
    everyone = poisoned(store, "alie", frozenset({2, 3, 4, 5}), z=1.5)[0]
    assert values(everyone[3].content["arrays"])["w"].tolist() == [15, 25, 35]


def test_the_papers_z():
    # n = 50, m = 12: s = 26 - 12 = 14 further out of 38, so Phi(z) = 24 / 38.
    assert alie_z(50, 12) == pytest.approx(NormalDist().inv_cdf(24 / 38))
    assert alie_z(10, 2) == 0
    assert alie_z(10, 1) == 0
    assert alie_z(10, 3) == pytest.approx(NormalDist().inv_cdf(4 / 7))
    assert alie_z(10, 8) == 0  # one of two honest clients further out: the median
    assert alie_z(100, 60) > 1.9


@pytest.mark.parametrize("name", ATTACKS)
def test_only_malicious_nodes_change_and_only_their_floating_point_tensors(store, name):
    after, before = poisoned(store, name, frozenset({3, 5, 9}), z=1.5)
    assert len(after) == 4
    for index in (0, 2):
        assert after[index] is before[index]
    for index in (1, 3):
        old, new = (reply.content["arrays"] for reply in (before[index], after[index]))
        assert (new.base, list(new)) == (old.base, list(old))
        assert new.cid is not None  # stored, so that the round's record can link it
        assert new.cid != old.cid
        assert new["n"].numpy() == old["n"].numpy() == 7 + DELTAS[index][0]
        assert after[index].content["metrics"] == before[index].content["metrics"]
        assert after[index].metadata.src_node_id == before[index].metadata.src_node_id


@pytest.mark.parametrize("name", ["none", "label_flip"])
def test_what_does_not_happen_here_leaves_the_replies(store, name):
    after, before = poisoned(store, name)
    assert all(one is other for one, other in zip(after, before, strict=True))


def test_nan_is_caught_as_any_update_with_nan(store):
    replies, _ = poisoned(store, "nan", read=True)
    assert "'w' holds NaN" in replies[3].error.reason
    strategy = build({"name": "fedavg"}, Brief(4, 1))
    one = one_round(store)
    replies = Adversary(attack("nan"), {5}, read=False)(1, one.replies(strategy))
    strategy.aggregate_train(1, replies)
    assert list(strategy.excluded) == [5]
    assert "'w' holds NaN" in strategy.excluded[5]


def test_a_boost_beyond_the_range_is_caught_too(store):
    replies, _ = poisoned(store, "scale", factor=1e30 * 1e9, read=True)
    assert "'w' holds NaN or infinite" in replies[3].error.reason


def test_what_cannot_be_crafted_becomes_an_error_message(store):
    replies = one_round(store).replies(build({"name": "fedavg"}, Brief(4, 1)))

    def damaged(name: str, start: int):
        raise BlockCorrupt("a block is damaged")

    replies[3].content["arrays"].weights.piece = damaged
    (*_, last) = Adversary(attack("scale"), {5}, read=False)(1, replies)
    assert last.error.reason == "a block is damaged"


def test_labels_are_flipped_by_the_clients_own_configuration():
    flip = attack("label_flip", fraction=0.5)
    chosen = malicious(flip, 6)
    for partition in range(6):
        expected = {"label-flip": True} if partition in chosen else {}
        assert node_config(flip, partition, 6) == expected
        assert node_config(attack("scale", fraction=1.0), partition, 6) == {}


def test_where_all_is_sealed_the_crafted_updates_are_too(store, tmp_path):
    parties = Parties(tmp_path, store)
    grid = parties.grid(make_app(parties.mod), read_updates=False)
    model = store_arrays(parties.coordinator, from_numpy(MODEL))
    strategy = build({"name": "fedavg"}, Brief(3, 1))
    replies = grid.send_and_receive(
        strategy.configure_train(1, model, ConfigRecord({"server-round": 1}), grid)
    )
    poisoned = Adversary(attack("sign_flip"), {3}, read=True)(1, replies)
    crafted = poisoned[1].content["arrays"]
    assert strategy.aggregate_train(1, poisoned)[0] is not None
    assert parties.coordinator.weights(crafted.cid).specs == crafted.weights.specs
    with pytest.raises(NotRecipient):
        parties.vaults["alpha"].weights(crafted.cid)


def choice(tmp_path, *words):
    return settings.check(configure(tmp_path, "+experiment=digits", *words))["attack"]


@pytest.mark.parametrize("name", ["gaussian", "sign_flip", "scale", "alie", "label_flip", "'nan'"])
def test_every_attack_can_be_chosen_and_is_recorded(tmp_path, name):
    config = settings.check(configure(tmp_path, "+experiment=digits", f"attack={name}"))
    assert config["attack"]["name"] == name.strip("'")
    assert settings.recorded(config)["attack"] == config["attack"]
    assert len(malicious(config["attack"], config["clients"]["total"])) == 2


def test_nobody_attacks_unless_told(tmp_path):
    assert choice(tmp_path) == {"name": "none"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["attack=gaussian", "attack.fraction=0.01"], r"attack\.fraction=0\.01 of .*=10 is nobody"),
        (
            ["attack=gaussian", "attack.fraction=1.1"],
            r"attack\.fraction=1\.1 is not a number from 0",
        ),
        (["attack=gaussian", "attack.std=x"], r"attack\.std=x is not a number"),
        (["attack=scale", "attack.factor=-1"], r"attack\.factor=-1 is not a number from 0"),
        (["attack=scale", "attack.factor=null"], r"attack\.factor=None"),
        (["attack=alie", "attack.seed=1.5"], r"attack\.seed=1\.5 is not a whole number"),
        (
            ["attack=scale", "+attack.std=1"],
            r"attack\.std is no setting.*comes with attack=gaussian",
        ),
        (["attack=scale", "attack.name=bribe"], r"attack\.name=bribe is not one of none, gaussian"),
        (["attack=scale", "~attack.factor"], r"attack\.factor is missing"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(tmp_path, words, says):
    with pytest.raises(ConfigError, match=says):
        choice(tmp_path, *words)
