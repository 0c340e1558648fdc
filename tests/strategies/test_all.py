"""Every strategy that a user can choose: a run, its resume, and Flower's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import lines, play

import fedipfs.conf

CONF = Path(next(iter(fedipfs.conf.__path__)))
CHOICES = sorted(path.stem for path in CONF.glob("strategy/*.yaml"))
RUN = ("+experiment=digits", "clients.total=8", "train.epochs=3", "rounds=2", "run_id=run")
NEEDS = {
    "fedbn": ["+task.options.norm=true"],
    "fedper": ["strategy.personal=['3.*']"],
    "fedbuff": ["clients.clock=simulated"],
    "fedsgd": ["strategy.optimizer.lr=1.0"],  # a round is one step
}
LEARNS = 0.8  # accuracy after two rounds; chance is 0.1
LEARN_LESS = {  # the first steps of adaptive rules are short, and one step a round is little
    "fedadam": 0.35,
    "fedsgd": 0.3,
    "fedyogi": 0.4,
    "qfedavg": 0.4,
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_run_interrupted_after_a_round_ends_as_the_whole_run(tmp_path, choice):
    words = (*RUN, f"strategy={choice}", *NEEDS.get(choice, []))
    whole = play(tmp_path / "whole", *words)
    play(tmp_path / "parts", *words, "rounds=1")
    rest = play(tmp_path / "parts", *words, resume=True)
    assert whole["rounds_completed"] == rest["rounds_completed"] == 2
    assert whole["head_cid"] == rest["head_cid"]
    assert whole["metrics"]["accuracy"] > LEARN_LESS.get(choice, LEARNS)
    for line in lines(tmp_path / "whole" / "run"):
        assert not line["clients"]["failed"]
        assert line["bytes"]["flower_per_client"] < 12_000
