"""Whole rounds: the sum is exact whoever drops out where, up to the threshold and not beyond."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedipfs.errors import SecAggFailed, TooLate
from fedipfs.secagg import Masked, Record, Survivors

STAGES = ("advertise", "share", "mask", "confirm", "unmask")


def check(world, result, survivors) -> None:
    assert [each.by for each in result.record.survivors] == sorted(survivors)
    np.testing.assert_array_equal(result.total, world.sum(survivors))


@pytest.mark.parametrize("clients", [3, 4, 5, 10])
def test_the_sum_is_exact(world, clients):
    played = world(clients=clients)
    check(played, played.play(), played.names)


@pytest.mark.parametrize("values", [0, 1, 3, 32767, 32768, 32769, 100_001])
def test_of_any_length(world, values):
    played = world(clients=3, values=values, numbers=("weight",))
    check(played, played.play(), played.names)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_drop_outs_at_every_stage(world, stage, count):
    played = world(clients=10)
    gone = played.names[2 : 2 + count]
    counted = stage in ("confirm", "unmask")  # their vectors are there already
    check(
        played,
        played.play(**{stage: gone}),
        [name for name in played.names if counted or name not in gone],
    )


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(STAGES), max_size=3), st.randoms(use_true_random=False))
def test_drop_outs_at_all_stages_together(world, stages, random):
    played = world(clients=7, values=5)
    gone = random.sample(played.names, len(stages))
    at = {stage: [n for n, s in zip(gone, stages, strict=True) if s == stage] for stage in STAGES}
    lost = {name for stage in STAGES[:3] for name in at[stage]}  # later, the vector is there
    if len(gone) <= 2:
        check(played, played.play(**at), [name for name in played.names if name not in lost])
    else:
        with pytest.raises(SecAggFailed, match="5 are needed"):
            played.play(**at)


@pytest.mark.parametrize("stage", STAGES)
def test_one_drop_out_more_than_the_threshold_permits_ends_the_round(world, stage):
    played = world(clients=10)
    with pytest.raises(SecAggFailed, match=r"^6 clients .* round 1 of run: 7 are needed$"):
        played.play(**{stage: played.names[:4]})
    if stage != "unmask":  # nobody has given away any share
        assert not played.server.unmaskable


def test_the_least_threshold_withstands_the_most_drop_outs(world):
    played = world(clients=10, threshold=6)
    check(played, played.play(mask=played.names[:4]), played.names[4:])


def test_any_threshold_of_answers_unmasks(world):
    played = world(clients=5).until("unmask", mask=["a01"])
    answers = [played.client(name).unmask(played.request) for name in ("a00", "a02", "a03", "a04")]
    expected = played.sum(["a00", "a02", "a03", "a04"])
    for answer in answers:
        assert not played.server.unmaskable
        played.server.take(answer)
    assert played.server.unmaskable
    np.testing.assert_array_equal(played.server.result().total, expected)


def test_answers_in_any_order_give_the_same(world):
    orders = itertools.islice(itertools.permutations(range(4)), 0, 24, 5)
    played = world(clients=4)
    for name in played.names:
        played.server.take(played.client(name).advertise())
    roster = played.server.close_advertise()
    shares = [played.client(name).share(roster) for name in played.names]
    found = []
    for order in orders:
        server = type(played.server)(played.session, played.verify)
        for place in order:
            server.take(roster.clients[place])
        assert server.close_advertise() == roster
        for place in order:
            server.take(shares[place])
        found.append(server.close_share())
    assert all(each == found[0] for each in found)


def test_nothing_but_the_sum_is_left_of_a_vector(world):
    played = world(clients=3, values=1000)
    played.vectors = {name: np.zeros(1000, np.uint32) for name in played.names}
    result = played.play()
    assert not result.total.any()
    for one, other in itertools.combinations(played.store.values(), 2):
        for seen in (one, other, one - other, one + other):
            assert np.count_nonzero(seen) > 990
            assert abs(float(np.mean(seen)) / 2**31 - 1) < 0.1


def test_who_is_late_has_dropped_out_for_ever(world):
    played = world(clients=5).until("mask")
    late = played.client("a02").mask(played.deliveries["a02"], played.vectors["a02"], played.put)
    played.mask(without=["a02"])
    with pytest.raises(TooLate, match="a02 answers masked after it was closed"):
        played.server.take(late, played.store[late.vector])
    with pytest.raises(TooLate, match="a02 does not count as a survivor"):
        played.client("a02").confirm(played.survivors)
    played.confirm()
    check(played, played.unmask(), ["a00", "a01", "a03", "a04"])


@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_record_gives_the_sum_to_an_auditor(world, stage):
    played = world(clients=7, values=33)
    result = played.play(**{stage: ["a03", "a05"]})
    record = Record.from_bytes(result.record.to_bytes())
    total = record.audit(played.verify, played.store.__getitem__)
    np.testing.assert_array_equal(total, result.total)
    assert record.dropped == (("a03", "a05") if stage == "mask" else ())


def test_a_k_regular_graph(world):
    # 48 clients of whom 5 drop out at various stages.
    options = {"complete": False, "colluders": 0.05, "dropouts": 0.15}
    played = world(clients=48, values=20, **options)
    parameters = played.session.parameters
    assert parameters.neighbours < 30 and not parameters.complete
    gone = {"advertise": ["a03"], "share": ["a11"], "mask": ["a12", "a30"], "unmask": ["a40"]}
    result = played.play(**gone)
    lost = {"a03", "a11", "a12", "a30"}
    check(played, result, [name for name in played.names if name not in lost])
    assert result.record.dropped == ("a12", "a30")
    total = result.record.audit(played.verify, played.store.__getitem__)
    np.testing.assert_array_equal(total, result.total)


def test_survivors_of_a_k_regular_graph_who_share_no_masks(world):
    # Two gaps of k/2 on the ring part it; whoever sees that refuses.
    played = world(clients=30, values=4, complete=False, colluders=0.04, dropouts=0.1)
    played.until("mask")
    graph = played.server._peers._graph
    gap = graph.neighbours // 2
    ring = [played.names[place] for place in graph._ring]
    gone = ring[:gap] + ring[15 : 15 + gap]
    assert len(played.names) - len(gone) >= played.session.parameters.quorum
    for name in played.names:
        if name not in gone:
            vector = played.vectors[name].copy()
            message = played.client(name).mask(played.deliveries[name], vector, played.put)
            played.server.take(message, vector)
    with pytest.raises(SecAggFailed, match="fall into groups that share no masks"):
        played.server.close_masked()
    seen = Survivors(tuple(played.server._answers(Masked)))
    with pytest.raises(SecAggFailed, match=r"fall into groups|hold shares"):
        played.client(ring[gap]).confirm(seen)
