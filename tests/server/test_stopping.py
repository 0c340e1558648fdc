"""When a run ends early, and which model is the best."""

from __future__ import annotations

import math

import pytest

from fedipfs.ipld import CID, RAW
from fedipfs.server.best import Best
from fedipfs.server.stopping import Stopping

NONE = {"wall_s": None, "target": None, "patience": None, "min_delta": 0.0, "divergence": None}
MODELS = [CID.of(bytes([number]), RAW) for number in range(10)]


def line(number, value=None, loss=1.0):
    server = None if value is None else {"accuracy": value, "loss": loss}
    return {"round": number, "server": server, "evaluate": None}


def reasons(options, values, direction="max", loss=None):
    stopping = Stopping({**NONE, **options}, "accuracy", direction)
    losses = loss or [1.0] * len(values)
    pairs = enumerate(zip(values, losses, strict=True), 1)
    return [stopping.see(line(number, value, loss)) for number, (value, loss) in pairs], stopping


def test_nothing_stops_a_run_that_is_not_told_to():
    seen, _ = reasons({}, [0.5, 0.1, math.nan, 0.0], loss=[1, 1e9, math.nan, 5])
    assert seen == [None] * 4


def test_target():
    assert reasons({"target": 0.9}, [0.8, 0.9])[0] == [
        None,
        "accuracy has reached stop.target=0.9",
    ]
    assert reasons({"target": 0.2}, [0.3, 0.2], "min")[0][1] is not None


def test_patience_counts_evaluations_without_improvement():
    seen, _ = reasons({"patience": 2}, [0.5, 0.6, None, 0.6, 0.55, 0.7])
    assert [why is not None for why in seen[:5]] == [False, False, False, False, True]
    assert "has not improved in 2 evaluations" in seen[4]
    seen, _ = reasons({"patience": 2, "min_delta": 0.05}, [0.5, 0.54, 0.56, 0.6])
    assert seen[1:3] == [None, None] and seen[3] is None
    seen, _ = reasons({"patience": 2, "min_delta": 0.05}, [0.5, 0.52, 0.53])
    assert seen[2] is not None


@pytest.mark.parametrize("loss", [math.nan, math.inf, None, 11.0])
def test_divergence(loss):
    seen, stopping = reasons({"divergence": 10.0}, [0.5, 0.6], loss=[1.0, loss])
    assert seen[0] is None and "loss of round 2" in seen[1]
    assert stopping.diverged == seen[1]


def test_a_loss_within_bounds_is_no_divergence():
    seen, stopping = reasons({"divergence": 10.0}, [0.5, 0.4], loss=[1.0, 9.9])
    assert seen == [None, None] and stopping.diverged is None


def test_wall_time():
    stopping = Stopping({**NONE, "wall_s": 10.0}, "accuracy", "max")
    assert stopping.out_of_time(9.9) is None
    assert stopping.out_of_time(10.0) == "10 s have passed (stop.wall_s=10)"


def test_the_best_is_the_first_of_equals_by_either_direction():
    for direction, expected in (("max", 2), ("min", 4)):
        best = Best("accuracy", direction)
        for number, value in enumerate([0.5, 0.9, 0.9, 0.1, math.nan, None], 1):
            best.see(line(number, value), MODELS[number])
        assert best.so_far.round == expected and best.so_far.model == MODELS[expected]
        assert best.so_far.value == {2: 0.9, 4: 0.1}[expected]


def test_a_round_that_diverged_is_never_the_best():
    best = Best("accuracy", "max")
    assert not best.see({**line(1, 0.9), "diverged": "the loss"}, MODELS[1])
    assert best.so_far is None
