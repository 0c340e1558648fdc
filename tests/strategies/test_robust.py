"""Robust rules: equal to Flower's where there are such, right where a hand can follow, bounded."""

from __future__ import annotations

import tracemalloc
from statistics import median

import ml_dtypes
import numpy as np
import pytest
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st
from one_round import OneRound, values

from fedipfs.errors import ConfigError, Diverged, RunFailed
from fedipfs.exchange import to_dtype
from fedipfs.ipld import dagcbor
from fedipfs.store import FolderStore
from fedipfs.strategies import STRATEGIES, Brief, build, load_state, save_state
from fedipfs.strategies.bulyan import nearest_to_median
from fedipfs.tasks.small import Digits
from fedipfs.weights import spec_of

ROBUST = {
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 2, "num_nodes_to_select": 4},
    "bulyan": {"num_malicious_nodes": 2},
    "fedmedian": {},
    "fedtrimmedavg": {"beta": 0.2},
    "rfa": {},
    "centered_clipping": {"tau": 1.0},
}
FLOWERS = {
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
}
BEGIN = {"w": np.zeros(1, "f4")}


def make(name: str, nodes: int = 11, **options):
    return build({"name": name, **ROBUST[name], **options}, Brief(nodes, 1))


def points(*numbers: float) -> list[dict[str, np.ndarray]]:
    return [{"w": np.array([number], "f4")} for number in numbers]


def random_round(store, seed: int, nodes: int = 11, large: int = 300_000) -> OneRound:
    """Updates of several tensors around a model, two of them far off."""
    rng = np.random.default_rng(seed)
    shapes = {"z": (6, 5), "a": (7,), "s": (), "m": (large,)}
    model = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    far = rng.choice(nodes, 2, replace=False)

    def update(node: int) -> dict[str, np.ndarray]:
        # Distances that Flower's float32 can tell apart.
        size = (3.0 if node in far else 0.1) * (1 + 0.1 * node)
        return {n: (v + size * rng.normal(size=v.shape)).astype("f4") for n, v in model.items()}

    examples = [float(number) for number in rng.integers(1, 100, nodes)]
    return OneRound(store, model, [update(node) for node in range(nodes)], examples)


# Of an even number Bulyan's median lies between two values, and among many values some are as
# near on one side as on the other in float32; Flower takes either.
@pytest.mark.parametrize(("nodes", "large"), [(11, 300_000), (12, 300)])
@pytest.mark.parametrize("name", FLOWERS)
def test_it_equals_flowers_class(store, name, nodes, large):
    for seed in (1, 2):
        one = random_round(store, seed, nodes, large)
        ours, our_metrics = values(one.play(make(name, nodes))), dict(one.metrics)
        theirs = values(one.play(FLOWERS[name](**ROBUST[name])))
        assert list(ours) == list(theirs)
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-6, err_msg=key)
        assert our_metrics == pytest.approx(dict(one.metrics))


@pytest.mark.parametrize("name", ROBUST)
def test_far_updates_do_not_carry_the_model_away(store, name):
    one = random_round(store, 3)
    honest = [u for u in one.updates if np.abs(u["m"] - one.model["m"].numpy()).mean() < 1]
    for update in one.updates:
        if not any(update is each for each in honest):
            update["m"] = update["m"] + np.float32(1e30)
    mean = np.mean([update["m"] for update in honest], axis=0)
    assert np.abs(values(one.play(make(name)))["m"] - mean).max() < 1.0


@settings(max_examples=10)
@given(order=st.permutations(range(7)), name=st.sampled_from(sorted(ROBUST)))
def test_the_order_of_the_replies_does_not_matter(tmp_path_factory, order, name):
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    options = {"num_malicious_nodes": 1} if "num_malicious_nodes" in ROBUST[name] else {}
    rng = np.random.default_rng(5)
    model = {"w": np.zeros(99, "f4")}
    one = OneRound(store, model, [{"w": rng.normal(size=99).astype("f4")} for _ in range(7)])
    cids = []
    for arrival in (range(7), order):
        strategy = make(name, 7, **options)
        replies = one.replies(strategy)
        cids.append(strategy.aggregate_train(1, [replies[i] for i in arrival])[0].cid)
    assert cids[0] == cids[1]


@pytest.mark.parametrize("name", ROBUST)
def test_a_nan_update_is_left_out_by_name(store, name):
    one = random_round(store, 4, nodes=12)
    one.updates[5]["m"][299_999] = np.nan
    strategy = make(name)
    result = values(one.play(strategy))
    assert list(strategy.excluded) == [7]
    assert "'m' holds NaN" in strategy.excluded[7]
    assert all(np.isfinite(array).all() for array in result.values())


@pytest.mark.parametrize("name", ROBUST)
def test_what_is_noted_can_be_recorded(store, name):
    one = random_round(store, 4)
    strategy = make(name)
    one.play(strategy)
    assert dagcbor.decode(dagcbor.encode(strategy.notes)) == strategy.notes
    if "updates" in strategy.notes:
        assert [each["node"] for each in strategy.notes["updates"]] == list(range(2, 13))


def test_krum_takes_the_update_nearest_its_neighbours(store):
    # f = 1, K = 5: each counts the two nearest; of 0 1 2 2.5 100 that is 2: 1 and 0.5 squared.
    one = OneRound(store, BEGIN, points(0, 1, 2, 2.5, 100))
    strategy = make("krum", 5)
    assert values(one.play(strategy))["w"] == [2.0]
    scores = [each["score"] for each in strategy.notes["updates"]]
    assert scores == pytest.approx([5, 2, 1.25, 2.5, 98**2 + 97.5**2])
    assert [each["selected"] for each in strategy.notes["updates"]] == [0, 0, 1, 0, 0]
    assert dict(one.metrics) == {"train_loss": 2.0}  # of the chosen one only


def test_multikrum_weighs_the_chosen_by_examples(store):
    one = OneRound(store, BEGIN, points(0, 1, 2, 2.5, 100), [1, 10, 30, 1, 1000])
    strategy = make("multikrum", 5, num_malicious_nodes=1, num_nodes_to_select=2)
    assert values(one.play(strategy))["w"] == [(10 * 1 + 30 * 2) / 40]


def test_krums_ties_go_to_the_lower_node(store):
    one = OneRound(store, BEGIN, points(-1, 1, -1, 1, -1, 1))
    assert values(one.play(make("krum", 6)))["w"] == [-1.0]


def test_bulyan_by_hand(store):
    # f = 1, K = 7: Krum leaves out 50 and -8; of 0 1 2 3 4 the three nearest to the median 2.
    one = OneRound(store, BEGIN, points(0, 1, 2, 3, 4.5, -8, 50))
    assert values(one.play(make("bulyan", 7, num_malicious_nodes=1)))["w"] == [2.0]


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.integers(-4, 4), min_size=n, max_size=n), min_size=1, max_size=5),
            st.integers(1, n),
        )
    ),
    st.sampled_from(["f4", "f8"]),
)
def test_nearest_to_the_median_is_what_sorting_by_distance_finds(given, dtype):
    rows, keep = given
    found = nearest_to_median(np.array(rows, dtype), keep)
    for row, value in zip(rows, found, strict=True):
        middle = median(row)
        nearest = sorted(row, key=lambda v: (abs(v - middle), v))[:keep]
        assert value == pytest.approx(sum(nearest) / keep)


@settings(max_examples=50)
@given(
    st.lists(st.floats(-1e30, 1e30), max_size=5),
    st.sampled_from(["i1", "u1", "i2", "i4", "u4", "i8", "u8"]),
)
def test_what_is_beyond_an_integers_range_becomes_its_end(numbers, kind):
    ends = np.iinfo(kind)
    near = [float(ends.max), float(ends.min), np.nextafter(float(ends.max), 0)]
    spec = spec_of("n", np.zeros(0, kind))
    found = to_dtype(np.array(numbers + near), spec)
    assert found.dtype == np.dtype(kind)
    assert found.tolist() == [
        min(max(round(number), ends.min), ends.max) for number in numbers + near
    ]


@pytest.mark.parametrize("name", ["krum", "multikrum"])
def test_the_one_update_that_is_chosen_is_handed_on_as_it_is(store, name):
    counts = [2**53 + 1, 2**62 + 3, 2**63 - 1, -(2**63), 5]
    updates = [
        {**point, "n": np.array(count, "i8")}
        for point, count in zip(points(0, 2, 2, 2, 100), counts, strict=True)
    ]
    one = OneRound(store, {"w": np.zeros(1, "f4"), "n": np.array(0, "i8")}, updates)
    options = {"num_nodes_to_select": 1} if name == "multikrum" else {}
    strategy = make(name, 5, num_malicious_nodes=1, **options)
    model = one.play(strategy)
    assert values(model)["n"] == counts[1]
    assert model.base is None  # it would hold on to all models before


def test_multikrum_fails_where_it_would_choose_all_that_are_left(store):
    one = OneRound(store, BEGIN, points(0, 1, 2, 3, 4, 5, np.nan))
    strategy = make("multikrum", 7, num_malicious_nodes=1, num_nodes_to_select=6)
    with pytest.raises(RunFailed, match="6 usable updates, min_successes is 7"):
        one.play(strategy)


def test_buffers_are_a_mean_of_the_updates_and_never_go_on_beyond(store):
    """Centered clipping goes on where it went: a variance 1 -> 0.01 would be -0.98 next."""
    task = Digits(hidden=2, norm=True)
    names = task.model().state_dict()

    def state(value: float, variance: float) -> dict[str, np.ndarray]:
        found = {name: np.full(each.shape, value, "f4") for name, each in names.items()}
        count = np.array(100 * variance, "i8")
        return {
            **found,
            "2.running_var": np.full(2, variance, "f4"),
            "2.num_batches_tracked": count,
        }

    brief = Brief(3, 1, task=task)
    strategy = build({"name": "centered_clipping", "tau": 1e3, "iterations": 1}, brief)
    model = OneRound(store, state(0, 1), [state(1, 0.01)] * 3).play(strategy)
    assert values(model)["2.running_var"] == pytest.approx(0.01)
    strategy.tau = 1e-3
    found = values(OneRound(store, model, [state(1, 0.02)] * 3).play(strategy, 2))
    assert found["1.bias"] == pytest.approx(2, abs=0.01)  # parameters do go on
    assert found["2.running_var"] == pytest.approx(0.02)
    assert found["2.num_batches_tracked"] == 2


def test_values_beyond_all_bounds_are_divergence(store):
    updates = [{"w": np.array([1.7e308])}] * 2
    with pytest.raises(Diverged, match="lower the learning rate"):
        OneRound(store, {"w": np.zeros(1)}, updates).play(make("fedmedian"))


def test_the_median_and_the_trimmed_mean_by_hand(store):
    odd = OneRound(store, BEGIN, points(5, 1, 100), [1, 1, 1000])
    assert values(odd.play(make("fedmedian")))["w"] == [5.0]
    even = OneRound(store, BEGIN, points(5, 1, 2, 100))
    assert values(even.play(make("fedmedian")))["w"] == [3.5]
    trimmed = make("fedtrimmedavg", beta=0.25)
    assert values(even.play(trimmed))["w"] == [3.5]
    assert trimmed.notes == {"cut_each_side": 1}
    assert values(even.play(make("fedtrimmedavg", beta=0.2)))["w"] == [27.0]  # floor(0.8) = 0


@settings(max_examples=20)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8))
def test_the_median_is_the_median(tmp_path_factory, numbers):
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    one = OneRound(store, BEGIN, points(*numbers))
    assert values(one.play(make("fedmedian")))["w"][0] == np.float32(median(numbers))


def test_the_geometric_median_of_identical_updates_is_that_update(store):
    same = {"w": np.random.default_rng(1).normal(size=50).astype("f4")}
    one = OneRound(store, {"w": np.zeros(50, "f4")}, [same] * 5)
    np.testing.assert_allclose(values(one.play(make("rfa")))["w"], same["w"], rtol=1e-6)


@settings(max_examples=15)
@given(
    st.lists(st.integers(-50, 50), min_size=3, max_size=9, unique=True).filter(lambda n: len(n) % 2)
)
def test_the_geometric_median_of_points_on_a_line_is_their_median(tmp_path_factory, numbers):
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    direction = np.array([3.0, -1.0, 2.0], "f4")
    updates = [{"w": 1 + number * direction} for number in numbers]
    one = OneRound(store, {"w": np.ones(3, "f4")}, updates, [float(1 + n**2) for n in numbers])
    found = values(one.play(make("rfa", iterations=3000)))["w"]
    np.testing.assert_allclose(found, 1 + median(numbers) * direction, atol=0.02)


def test_the_geometric_median_is_the_point_of_least_distance(store):
    rng = np.random.default_rng(7)
    updates = [{"w": rng.normal(size=4).astype("f4")} for _ in range(6)]
    strategy = make("rfa", iterations=500)
    found = values(OneRound(store, {"w": np.zeros(4, "f4")}, updates).play(strategy))["w"]

    def total(point):
        return sum(np.linalg.norm(point - update["w"]) for update in updates)

    best = total(found.astype("f8"))
    assert all(total(found + 0.01 * rng.normal(size=4)) > best - 1e-6 for _ in range(200))
    assert sum(each["weight"] for each in strategy.notes["updates"]) == pytest.approx(1)


def test_centered_clipping_with_a_huge_radius_is_the_mean(store):
    one = random_round(store, 8)
    found = values(one.play(make("centered_clipping", tau=1e9)))
    for name in one.model:
        mean = np.mean([update[name] for update in one.updates], axis=0)
        np.testing.assert_allclose(found[name], mean, rtol=1e-5, atol=1e-6)


def test_centered_clipping_by_hand(store):
    # From 10, tau 2, one step: 11 counts as +1, 30 as +2, 4 as -2, so 10 + 1/3.
    strategy = make("centered_clipping", tau=2.0, iterations=1)
    one = OneRound(store, {"w": np.array([10], "f4")}, points(11, 30, 4))
    model = one.play(strategy)
    assert values(model)["w"] == pytest.approx([10 + 1 / 3])
    assert [each["clipped"] for each in strategy.notes["updates"]] == [False, True, True]
    # The next round is centered where this one went: at 10 + 2/3.
    again = OneRound(store, model, points(11, 30, 4))
    found = values(again.play(strategy, 2))["w"]
    assert found == pytest.approx([10 + 2 / 3 + (1 / 3 + 2 - 2) / 3])
    # From a model that did not come of the last round there is no direction to go by.
    elsewhere = OneRound(store, {"w": np.array([0], "f4")}, points(1, 20, -6))
    assert values(elsewhere.play(strategy, 3))["w"] == pytest.approx([1 / 3])


def test_centered_clipping_goes_on_from_its_state(store):
    strategy, restored = (make("centered_clipping", tau=2.0, iterations=1) for _ in range(2))
    model = OneRound(store, {"w": np.array([10], "f4")}, points(11, 30, 4)).play(strategy)
    load_state(restored, store, save_state(strategy, store)[0])
    again = OneRound(store, model, points(11, 30, 4))
    assert again.play(restored, 2).cid == again.play(strategy, 2).cid


def test_counters_have_no_say_in_distances_and_follow_rounded(store):
    """Batch normalisation counts batches in an integer tensor, which differs with the data."""
    model = {"w": np.zeros(1, "f4"), "n": np.array(100, "i8")}
    updates = [
        {**point, "n": np.array(100 + count, "i8")}
        for point, count in zip(points(0, 1, 2, 2.5, 100), (0, 2000, 50, 3, 3), strict=True)
    ]
    one = OneRound(store, model, updates)
    krum = values(one.play(make("krum", 5)))
    assert (krum["w"], krum["n"]) == ([2.0], 150)  # as without the counter
    assert values(one.play(make("fedmedian")))["n"] == 103
    rfa = values(one.play(make("rfa")))["n"]
    assert rfa.dtype == np.int64
    assert 100 <= rfa <= 2100


@pytest.mark.parametrize("dtype", ["f2", "bf16", "f4", "f8"])
@pytest.mark.parametrize("name", ROBUST)
def test_every_floating_point_dtype_is_combined_and_kept(store, name, dtype):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bf16" else dtype)
    rng = np.random.default_rng(1)
    updates = [{"w": (1 + 0.1 * rng.normal(size=20)).astype(kind)} for _ in range(11)]
    if dtype == "f8":
        updates[0]["w"][:] = 1e308
        updates[1]["w"][:] = -1e308
    model = {"w": np.ones(20, kind)}
    arrays = OneRound(store, model, updates).play(make(name))
    found = arrays.weights.tensor("w")
    assert found.dtype == kind
    assert np.abs(found.astype("f8") - 1).max() < 0.5


def test_fewer_good_updates_than_the_rule_needs_fail_the_round(store):
    for name, needed in (("krum", 5), ("bulyan", 7)):
        one = OneRound(store, BEGIN, points(*range(needed - 1)))
        strategy = STRATEGIES[name](num_malicious_nodes=1)
        assert strategy.required == strategy.min_successes == needed
        with pytest.raises(RunFailed, match=f"{needed - 1} usable updates, min_successes is"):
            one.play(strategy)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("rfa", {"iterations": 0}, r"strategy\.iterations=0 must be a whole number of at least 1"),
        ("rfa", {"nu": 0}, r"strategy\.nu=0 must be a number above 0"),
        ("rfa", {"nu": True}, r"strategy\.nu=True"),
        ("centered_clipping", {"tau": -1}, r"strategy\.tau=-1 must be a number above 0"),
        ("centered_clipping", {"tau": float("inf")}, r"strategy\.tau=inf"),
        ("centered_clipping", {"iterations": 1.5}, r"strategy\.iterations=1\.5"),
        ("centered_clipping", {"radius": 1}, r"unknown option of strategy centered_clipping"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, says):
    with pytest.raises(ConfigError, match=says):
        make(name, **options)


@pytest.mark.parametrize("name", ROBUST)
def test_memory_is_a_few_models_and_a_leaf_an_update(store, name):
    """50 updates of 11M parameters are 2.2 GB; of this smaller model 32 are 256 MB."""
    model = {f"w{i}": np.zeros(500_000, "f4") for i in range(4)}  # 8 MB
    nodes = 32
    rng = np.random.default_rng(1)
    noise = rng.normal(size=500_000).astype("f4")
    updates = [{n: noise * np.float32(k + i) for i, n in enumerate(model)} for k in range(nodes)]
    one = OneRound(store, model, updates)
    strategy = make(name, nodes, **({"tau": 1e3} if name == "centered_clipping" else {}))
    replies = one.replies(strategy)
    updates.clear()
    tracemalloc.start()
    strategy.aggregate_train(1, replies)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    threads = 4
    assert peak < 3 * 8e6 + threads * (nodes + 12) * 2**20, f"{peak / 1e6:.0f} MB"
