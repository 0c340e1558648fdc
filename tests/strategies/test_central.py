"""Client-level privacy: Flower's where that is right, exact noise, and nothing else is told."""

from __future__ import annotations

import copy
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from flwr.serverapp import strategy as flower
from hypothesis import given
from hypothesis import strategies as st
from one_round import OneRound, values
from scipy import stats
from tied import Tied

from fedipfs.errors import BlockCorrupt, ConfigError, EdgeError, RunFailed
from fedipfs.exchange import from_numpy, from_torch, specs_of
from fedipfs.ipld import dagcbor
from fedipfs.privacy.central import update_multiplier
from fedipfs.store import FolderStore
from fedipfs.strategies import STRATEGIES, Brief, build, load_state, save_state
from fedipfs.strategies.central import CentralDP, central, moving
from fedipfs.strategies.clipped import ClippedSum, length
from fedipfs.tasks.small import Digits

NODES = 8
BEGIN = {"w": np.array([1, 1], "f4"), "v": np.array([1], "f4")}
UNLIKELY = 1e-6  # a p-value: the noise is another each time, and so is the test
QUIET = 1e-9  # a noise multiplier whose noise is far below what is compared
ACCEPTED = {  # and Flower's class of that rule
    "fedavg": flower.FedAvg,
    "average": flower.FedAvg,
    "fedprox": flower.FedProx,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedadagrad": flower.FedAdagrad,
    "fedavgm": flower.FedAvgM,
}
OPTIONS = {
    "fedavgm": {"server_momentum": 0.9},
    "fedprox": {"proximal_mu": 0.1},
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1},
    "bulyan": {"num_malicious_nodes": 1},
    "qfedavg": {"client_learning_rate": 0.1},
    "fedper": {"personal": ["1.*"]},
    "fedsgd": {"optimizer": {"name": "SGD", "lr": 0.1}},
    "best_model": {"selector": "cross"},
}
TRAIN = {"optimizer": {"name": "SGD", "lr": 0.1}, "batch_size": 10, "epochs": 1, "steps": None}


def brief(**changes):
    given = {
        "clients": NODES,
        "train": TRAIN,
        "validation": 0.1,
        "task_target": "digits",
        **changes,
    }
    return Brief(NODES, given.pop("min_successes", 1), **given)


def plain(name: str, task=None):
    return build({"name": name, **OPTIONS.get(name, {})}, brief(task=task))


def private(name: str = "fedavg", z: float = QUIET, clip: float = 1.0, **options):
    return central(plain(name), {"noise_multiplier": z, "clip_norm": clip, **options}, brief())


def updates(scale: float = 1.0, nodes: int = NODES):
    rng = np.random.default_rng(1)
    deltas = scale * rng.normal(size=(nodes, 3)) * np.arange(1, nodes + 1)[:, None] / nodes
    return [{"w": (1 + each[:2]).astype("f4"), "v": (1 + each[2:]).astype("f4")} for each in deltas]


def lengths(found):
    return [
        math.sqrt(sum(np.square(each[key] - BEGIN[key], dtype="f8").sum() for key in BEGIN))
        for each in found
    ]


def zeros(size: int, nodes: int, dtype="f4"):
    """A model of zeros that no client changes."""
    model = {"w": np.zeros(size, dtype)}
    return model, [model] * nodes


# What it computes


@pytest.mark.parametrize("name", ACCEPTED)
def test_without_noise_it_is_flowers_fixed_clipping(store, name):
    clip = 0.8
    own = OPTIONS.get(name, {})
    theirs = flower.DifferentialPrivacyServerSideFixedClipping(
        ACCEPTED[name](**own), 0.0, clip, NODES
    )
    ours = private(name, clip=clip)
    a = b = OneRound(store, BEGIN, updates())
    for number in (1, 2, 3):  # what optimizers remember counts, too
        mine, flowers = a.play(ours, number), b.play(theirs, number)
        for key, expected in values(flowers).items():
            np.testing.assert_allclose(values(mine)[key], expected, rtol=0, atol=1e-6)
        a, b = (OneRound(store, model, updates(1 / number)) for model in (mine, flowers))
    assert not np.allclose(values(mine)["w"], BEGIN["w"])


def test_without_noise_a_round_is_flowers_adaptive_clipping_and_the_norm_moves_the_other_way(store):
    """Flower 1.39 shortens the norm when too many updates are clipped; the paper lengthens it."""
    found = updates(4.0)
    clip = 1.0
    share = np.mean([each <= clip for each in lengths(found)])
    assert share < 0.5
    theirs = flower.DifferentialPrivacyServerSideAdaptiveClipping(
        flower.FedAvg(), 0.0, NODES, initial_clipping_norm=clip
    )
    ours = private(clip=clip, adaptive=True, count_stddev=1e-6)
    one = OneRound(store, BEGIN, found)
    mine, flowers = values(one.play(ours)), values(one.play(theirs))
    for key, expected in flowers.items():
        np.testing.assert_allclose(mine[key], expected, rtol=0, atol=1e-6)
    assert ours.clip_norm == pytest.approx(clip * math.exp(-0.2 * (share - 0.5)), abs=1e-6)
    assert theirs.clipping_norm < clip < ours.clip_norm


def test_all_clients_count_alike(store):
    found = updates()
    alike = values(OneRound(store, BEGIN, found, [1] * NODES).play(private(clip=9.0)))
    unlike = OneRound(store, BEGIN, found, [10**k for k in range(NODES)])
    mean = np.mean([each["w"] for each in found], axis=0)
    np.testing.assert_allclose(values(unlike.play(private(clip=9.0)))["w"], mean, atol=1e-6)
    np.testing.assert_allclose(alike["w"], mean, atol=1e-6)


VALUES = st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=3, max_size=3)


@given(st.floats(1e-3, 1e3), st.lists(VALUES, min_size=1, max_size=5), st.data())
def test_one_client_moves_the_mean_by_no_more_than_the_norm_over_their_number(
    tmp_path_factory, clip, deltas, data
):
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    sent = [{"w": np.array(each[:2], "f4"), "v": np.array(each[2:], "f4")} for each in deltas]
    one = OneRound(store, {"w": np.zeros(2, "f4"), "v": np.zeros(1, "f4")}, sent)
    found = [reply.content["arrays"] for reply in one.replies(plain("average"))]
    specs = list(specs_of(one.model).values())

    def mean(chosen) -> np.ndarray:
        total = ClippedSum(specs, clip)
        for update in chosen:
            total.add(update, length(update, specs))
        return np.concatenate([total.sums["w"], total.sums["v"]]) / len(found)

    dropped = data.draw(st.integers(0, len(found) - 1))
    without = [each for node, each in enumerate(found) if node != dropped]
    assert np.linalg.norm(mean(found) - mean(without)) <= clip / len(found) * (1 + 1e-9)


# The noise


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("name", ["fedavg", "fedavgm"])
def test_noise_is_gaussian_for_the_updates_that_are_there(store, name, failing):
    model, sent = zeros(40_000, 5)
    one = OneRound(store, model, sent)
    strategy = CentralDP(STRATEGIES[name](**OPTIONS.get(name, {})), 2.0, 0.3)
    replies = one.replies(strategy)
    for place in range(failing):
        replies[place] = Message(Error(2, "out of memory"), reply_to=replies[place])
    arrays, _ = strategy.aggregate_train(1, replies)
    expected = 2.0 * 0.3 / (5 - failing)
    assert strategy.notes["noise_stddev"] == pytest.approx(expected)
    assert strategy.notes["updates"] == 5 - failing
    noise = arrays["w"].numpy().astype("f8")
    assert stats.kstest(noise / expected, "norm").pvalue > UNLIKELY
    assert np.std(noise) == pytest.approx(expected, rel=0.02)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.03


def test_noise_of_flower_has_the_same_distribution(store):
    model, sent = zeros(20_000, 4)
    one = OneRound(store, model, sent)
    theirs = flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAvg(), 1.5, 0.2, 4)
    replies = one.replies(theirs)
    for reply in replies:  # Flower divides by the length of an update
        reply.content["arrays"] = from_numpy({"w": model["w"] + np.float32(1e-9)})
    noise, _ = theirs.aggregate_train(1, replies)
    ours = one.play(private(z=1.5, clip=0.2))
    assert stats.ks_2samp(noise["w"].numpy(), ours["w"].numpy()).pvalue > UNLIKELY


def test_noise_is_added_before_the_servers_optimizer(store):
    """Adam's first step has one length in every direction, whatever the noise."""
    model, sent = zeros(1000, 4)
    strategy = central(plain("fedadam"), {"noise_multiplier": 50, "clip_norm": 1.0}, brief())
    moved = values(OneRound(store, model, sent).play(strategy))["w"]
    assert 0 < np.abs(moved).max() < 0.2  # the noise itself has a deviation of 12


def test_seeding_every_generator_changes_nothing(store):
    model, sent = zeros(8, 4)
    one = OneRound(store, model, sent)

    def play():
        strategy = private(z=1.0)
        replies = one.replies(strategy)
        np.random.seed(7)
        random.seed(7)
        torch.manual_seed(7)
        return strategy.aggregate_train(1, replies)[0]["w"].numpy()

    assert not np.array_equal(play(), play())


def test_each_round_and_each_tensor_has_noise_of_its_own(store):
    model = {"a": np.zeros(8, "f4"), "b": np.zeros(8, "f4")}
    one, strategy = OneRound(store, model, [model] * 3), private(z=1.0)
    first, second = values(one.play(strategy)), values(one.play(strategy, 2))
    assert len({bytes(each) for each in (*first.values(), *second.values())}) == 4


# What moves, and what does not


def test_counters_stay_as_they_were(store):
    model = {"w": np.zeros(2, "f4"), "n": np.array(5, "i8"), "m": np.array([True])}
    sent = {"w": np.ones(2, "f4"), "n": np.array(9000, "i8"), "m": np.array([False])}
    for name in ("fedavg", "fedadam"):
        found = values(OneRound(store, model, [sent] * 2).play(private(name)))
        assert (found["n"], found["m"]) == (5, [True])
        assert found["w"].all()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_every_floating_point_type_is_noised(store, dtype):
    model, sent = zeros(5000, 2, dtype)
    found = values(OneRound(store, model, sent).play(private(z=1.0)))["w"]
    assert found.dtype == dtype
    assert np.std(found.astype("f8")) == pytest.approx(0.5, rel=0.1)


def test_frozen_layers_stay_and_tied_weights_stay_tied(store):
    task = Tied()
    module = task.model()
    for parameter in module.head.parameters():
        parameter.requires_grad_(False)
    leaders = moving(module)
    assert leaders["decoder.weight"] == "encoder.weight"
    assert leaders["decoder.shift"] == "encoder.shift"
    assert not any(name.startswith("head") for name in leaders)
    model = {name: each.detach().numpy() for name, each in module.state_dict().items()}
    moved = {name: each + np.float32(0.01) for name, each in model.items()}
    strategy = CentralDP(plain("fedavg"), 1.0, 1.0, leaders=leaders)
    found = values(OneRound(store, model, [moved] * 2).play(strategy))
    np.testing.assert_array_equal(found["decoder.weight"], found["encoder.weight"])
    np.testing.assert_array_equal(found["decoder.shift"], found["encoder.shift"])
    np.testing.assert_array_equal(found["head.weight"], model["head.weight"])
    assert np.std(found["encoder.weight"] - model["encoder.weight"]) == pytest.approx(0.5, rel=0.1)
    made = central(plain("fedavg"), {"noise_multiplier": 1, "clip_norm": 1}, brief(task=task))
    tied = values(OneRound(store, model, [moved] * 2).play(made))
    np.testing.assert_array_equal(tied["decoder.weight"], tied["encoder.weight"])
    assert not np.array_equal(tied["head.weight"], model["head.weight"])


def test_statistics_of_batch_norm_are_noised_and_its_counter_is_not(store):
    module = torch.nn.BatchNorm1d(500)
    model = {name: each.numpy() for name, each in module.state_dict().items()}
    strategy = CentralDP(plain("fedavg"), 1.0, 1.0, leaders=moving(module))
    found = values(OneRound(store, model, [model] * 4).play(strategy))
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert np.std(found[name] - model[name]) == pytest.approx(0.25, rel=0.15), name
    assert found["num_batches_tracked"] == 0


# Adaptive clipping


def test_both_kinds_of_noise_cost_what_one_would():
    for z, s in ((1.0, 5.0), (4.0, 4.0), (0.5, 0.3)):
        u = update_multiplier(z, s)
        # What one client adds, (d, bit - 1/2), is at most (1 / u, 1 / (2 s)) long in deviations.
        assert math.hypot(1 / u, 0.5 / s) == pytest.approx(1 / z)


def test_the_norm_finds_the_quantile_of_the_lengths(store):
    found = updates(3.0)
    one, strategy = OneRound(store, BEGIN, found), private(adaptive=True, clip=0.01)
    for number in range(1, 60):
        one.play(strategy, number)
    low, high = np.quantile(lengths(found), [0.4, 0.6])
    assert low * 0.8 < strategy.clip_norm < high * 1.2


def test_the_count_gets_its_noise_and_the_updates_get_more(store):
    options = {"adaptive": True, "count_stddev": 0.6}
    one = OneRound(store, *zeros(20_000, 10))
    noise = values(one.play(strategy := private(z=1.0, **options)))["w"]
    expected = update_multiplier(1.0, 0.6) / 10
    assert np.std(noise) == pytest.approx(expected, rel=0.03)
    assert strategy.notes["noise_stddev"] == pytest.approx(expected)
    one, fractions = OneRound(store, *zeros(1, 10)), []
    for _ in range(200):
        one.play(strategy := private(z=1.0, **options))
        fractions.append(strategy.notes["fraction_fitting"])
        seen = min(max(fractions[-1], 0.0), 1.0)
        assert strategy.clip_norm == pytest.approx(math.exp(-0.2 * (seen - 0.5)))
    # All fit, so what is not 1 is noise of 0.6 updates in 10.
    assert stats.kstest((np.array(fractions) - 1) * 10 / 0.6, "norm").pvalue > UNLIKELY


def test_few_clients_get_a_count_that_can_be_noised():
    for count, expected in ((10, 4.0), (1000, 50.0)):
        options = {"noise_multiplier": 4.0, "clip_norm": 1.0, "adaptive": True}
        made = central(plain("fedavg"), options, Brief(count, 1))
        assert made.count_stddev == expected
        assert update_multiplier(4.0, made.count_stddev) < 4.0 * 1.16


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_state_goes_on(store, name):
    one = OneRound(store, BEGIN, updates(3.0))
    strategy, restored = (private(name, adaptive=True, clip=0.1) for _ in range(2))
    model = one.play(strategy)
    assert strategy.clip_norm != 0.1
    load_state(restored, store, save_state(strategy, store)[0])
    assert restored.clip_norm == strategy.clip_norm
    again = OneRound(store, model, one.updates)
    ours, theirs = values(again.play(restored, 2)), values(again.play(strategy, 2))
    for key, expected in theirs.items():  # but for the noise, which is fresh
        np.testing.assert_allclose(ours[key], expected, rtol=0, atol=1e-6)


# What is told


@pytest.mark.parametrize("adaptive", [False, True])
def test_nothing_of_a_single_client_is_told(store, adaptive):
    found = updates(3.0)
    one, strategy = OneRound(store, BEGIN, found), private(adaptive=adaptive, clip=1.3)
    one.play(strategy)
    assert dict(one.metrics) == {}
    notes = strategy.notes
    assert dagcbor.decode(dagcbor.encode(notes)) == notes
    allowed = {"updates", "clip_norm", "noise_multiplier", "noise_stddev"}
    assert notes.keys() == allowed | ({"count_stddev", "fraction_fitting"} if adaptive else set())
    assert notes["updates"] == NODES
    if adaptive:
        exact = np.mean([each <= 1.3 for each in lengths(found)])
        assert notes["fraction_fitting"] != exact


def test_spent_is_one_mechanism_a_round_on_everybody():
    spent = private(z=2.0, adaptive=True).spent(50)
    assert (spent.noise_multiplier, spent.sample_rate, spent.steps) == (2.0, 1.0, 50)


def test_the_forecast_counts_what_moves():
    task = Tied()
    options = {"noise_multiplier": 4.0, "clip_norm": 1.0}
    made = central(plain("fedavg"), options, brief(task=task))
    told = made.forecast(
        from_torch(task.model().state_dict()), rounds=50, delta=1e-5, clients=10, per_round=10
    )
    values = 64 * 64 + 64 + 64 + 64 + 64 * 10 + 10  # a tied matrix and a tied buffer count once
    assert f"{4 * math.sqrt(values) / 10:.3g} times as long" in told.text
    assert told.epsilon_prv == pytest.approx(8.6, rel=0.01)
    assert told.meaningless


# Bad updates


def test_a_nan_update_is_left_out_by_name_and_counts_for_nothing(store):
    found = [*updates(0.1, 3), {"w": np.array([np.nan, 0], "f4"), "v": np.array([0], "f4")}]
    strategy = private(clip=9.0)
    result = values(OneRound(store, BEGIN, found).play(strategy))
    np.testing.assert_allclose(result["w"], np.mean([e["w"] for e in found[:3]], axis=0), atol=1e-6)
    assert "'w' holds NaN" in strategy.excluded[5]
    assert strategy.notes["updates"] == 3


@pytest.mark.parametrize("reads", [0, 2])
def test_an_update_that_cannot_be_read_leaves_nothing_in_the_sum(store, reads):
    """It may fail while it is measured, or, after that, while it is added."""
    one, strategy = OneRound(store, BEGIN, updates(1.0, 4)), private(clip=0.5)
    replies = one.replies(strategy)
    weights = replies[1].content["arrays"].weights
    read, left = weights.piece, [reads]

    def fails(name: str, start: int) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise BlockCorrupt("a block is damaged")
        return read(name, start)

    weights.piece = fails
    arrays, _ = strategy.aggregate_train(1, replies)
    others = [each for node, each in enumerate(one.updates) if node != 1]
    without = OneRound(store, BEGIN, others).play(private(clip=0.5))
    for key, expected in values(without).items():
        np.testing.assert_allclose(arrays[key].numpy(), expected, rtol=0, atol=1e-6)
    assert strategy.excluded == {3: "a block is damaged"}
    assert strategy.notes["updates"] == 3


def test_an_update_of_another_structure_is_left_out(store):
    strategy = private()
    found = [*updates(0.1, 3), {"w": BEGIN["w"]}]
    one = OneRound(store, BEGIN, found)
    one.play(strategy)
    assert "missing" in strategy.excluded[5]


def test_too_few_updates_fail_the_round_though_the_strategy_sees_but_one(store):
    options, needs = {"noise_multiplier": 1, "clip_norm": 1}, brief(min_successes=3)
    strategy = central(build({"name": "fedavg"}, needs), options, needs)
    OneRound(store, BEGIN, updates(1.0, 3)).play(strategy)
    with pytest.raises(RunFailed, match="2 usable updates, min_successes is 3"):
        OneRound(store, BEGIN, updates(1.0, 2)).play(strategy)


def test_memory_does_not_grow_with_the_updates(store):
    size = 1 << 20  # 4 MiB of float32

    def peak(nodes: int) -> int:
        model, sent = zeros(size, nodes)
        strategy = CentralDP(STRATEGIES["fedavg"](), 1.0, 1.0)
        replies = OneRound(store, model, sent).replies(strategy)
        tracemalloc.start()
        strategy.aggregate_train(1, replies)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(2), peak(12)
    assert many < few + 2 * (1 << 20)
    assert many < 6 * 4 * size


# What it can be had with


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_accepted_or_refused_with_its_reason(name):
    task = Digits(norm=True) if name == "fedbn" else Digits()
    strategy = plain(name, task)
    options = {"noise_multiplier": 1.0, "clip_norm": 1.0}
    if name in ACCEPTED:
        assert central(strategy, options, brief(task=task)).strategy is strategy
    else:
        with pytest.raises(ConfigError, match=f"with {type(strategy).__name__}: ") as error:
            central(strategy, options, brief(task=task))
        assert "not known" not in str(error.value)


def test_what_is_derived_or_wrapped_is_not_taken_for_what_it_derives_from():
    class Own(flower.FedAvg):
        pass

    with pytest.raises(ConfigError, match="Own: it is not known"):
        CentralDP(Own(), 1.0, 1.0)
    clipped = build({"name": "fedavg", "clip_update_norm": 1.0}, brief())
    with pytest.raises(ConfigError, match=r"leave out strategy\.clip_update_norm"):
        CentralDP(clipped, 1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": 0}, r"privacy\.noise_multiplier=0 must be a number above 0"),
        ({"noise_multiplier": None}, r"privacy\.noise_multiplier is missing"),
        ({"noise_multiplier": float("inf")}, r"privacy\.noise_multiplier=inf"),
        ({"clip_norm": -1}, r"privacy\.clip_norm=-1"),
        ({"clip_norm": "1"}, r"privacy\.clip_norm=1 must"),
        ({"clip_norm": True}, r"privacy\.clip_norm=True"),
        ({"clip_norm": None}, r"privacy\.clip_norm is missing"),
        ({"clipnorm": 1}, r"unknown privacy\.clipnorm; did you mean 'clip_norm'\?"),
        ({"adaptive": 1}, r"privacy\.adaptive=1 must be true or false"),
        ({"target_quantile": 1}, r"privacy\.target_quantile=1 must be a number between 0 and 1"),
        ({"clip_lr": 0}, r"privacy\.clip_lr=0"),
        ({"delta": 0}, r"privacy\.delta=0 must be a number between 0 and 1"),
        ({"count_stddev": float("nan")}, r"privacy\.count_stddev=nan"),
        (
            {"adaptive": True, "count_stddev": 0.5},
            r"privacy\.count_stddev=0\.5 must be above half of privacy\.noise_multiplier=1\.0",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        central(plain("fedavg"), {"noise_multiplier": 1.0, "clip_norm": 1.0, **options}, brief())


def test_what_clients_measure_is_not_published():
    with pytest.raises(ConfigError, match=r"evaluate\.federated=true"):
        central(plain("fedavg"), {"noise_multiplier": 1, "clip_norm": 1}, brief(evaluates=True))


def test_what_it_has_not_itself_is_the_strategys():
    made = private("fedadam")
    assert (made.screens_replies, made.eta, made.weighted_by_key) == (True, 0.1, "num-examples")
    assert not hasattr(made, "follow_up")
    assert copy.copy(made).clip_norm == made.clip_norm


def test_without_a_cid_grid_it_says_what_it_needs():
    from grids import DirectGrid
    from quickstart import plain_app

    strategy = CentralDP(flower.FedAdam(), 1.0, 1.0)
    with pytest.raises(EdgeError, match="CidGrid"):
        strategy.start(
            grid=DirectGrid(plain_app, 2),
            initial_arrays=from_numpy({"a": np.zeros(2, "f4")}),
            num_rounds=1,
        )
