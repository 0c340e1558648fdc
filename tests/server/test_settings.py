"""The configuration as it is checked before anything is started."""

from __future__ import annotations

import pytest
from runs import configure

from fedipfs.errors import ConfigError
from fedipfs.server import known, settings

DIGITS = "+experiment=digits"


def checked(tmp_path, *words):
    return settings.check(configure(tmp_path, DIGITS, *words))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=9223372036854775808"], r"seed=9223372036854775808 .* below 2\*\*63"),
        (["seed=-1"], "seed=-1 is not a whole number of at least 0"),
        (["rounds=true"], "rounds=True is not a whole number"),
        (["clients=3"], r"clients=3 takes the place.*clients\.total="),
        (["evaluate=x"], r"evaluate=x takes the place.*evaluate\.server="),
        (["train.clip_norm=-1"], r"train\.clip_norm=-1"),
        (["train.clip_norm=0"], r"train\.clip_norm=0"),
        (["train.clip_norm=nan"], r"train\.clip_norm=nan"),
        (["data.alpha=x"], r"data\.alpha=x is not a number"),
        (["data.validation=nan"], r"data\.validation=nan is not a number from 0 to 0\.9"),
        (["data.shards_per_client=1.5"], r"data\.shards_per_client=1\.5"),
        (["evaluate.server=maybe"], r"evaluate\.server=maybe is neither true nor false"),
        (["engine.workers=0"], r"engine\.workers=0"),
        (["engine.timeout_s=inf"], r"engine\.timeout_s=inf"),
        (["runs_dir=null"], "runs_dir=None is not a text"),
        (["task.options=3"], r"task\.options=3"),
        (["task.metric=null"], r"task\.metric=None"),
        (["++clients.totl=3"], r"unknown setting 'clients\.totl'; did you mean 'clients\.total'"),
        (["+colour=red"], "unknown setting 'colour'; --help lists all"),
        (["~data.alpha"], r"data\.alpha is missing"),
    ],
)
def test_a_wrong_value_is_named_with_the_remedy(tmp_path, words, says):
    config = configure(tmp_path, DIGITS, *words)
    config["runs_dir"] = None if words == ["runs_dir=null"] else config["runs_dir"]
    with pytest.raises(ConfigError, match=says) as caught:
        settings.check(config)
    assert "\n" not in str(caught.value)


def test_no_more_workers_than_clients_a_round(tmp_path):
    words = ["clients.total=20", "clients.per_round=3", "engine.workers=2000000"]
    assert checked(tmp_path, *words)["engine"]["workers"] == 3
    assert checked(tmp_path, "engine.workers=2")["engine"]["workers"] == 2


def test_defaults_that_are_computed(tmp_path):
    config = checked(tmp_path, "clients.per_round=5", "evaluate.federated=true", "run_id=7")
    assert config["clients"]["min_successes"] == 3
    assert config["run_id"] == "7"
    assert settings.check(config) == config


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("roundz", "did you mean 'rounds'?"),
        ("lr", "did you mean 'train.optimizer.lr'?"),
        ("cliets.total", "did you mean 'clients.total'?"),
        ("strategy.etaa", "did you mean 'strategy.eta'?"),
        ("strategy.q", "strategy=qfedavg"),
        ("train.optimizer.momentum", "+train.optimizer.momentum=VALUE"),
        ("xyz", "--help"),
    ],
)
def test_an_unknown_setting_comes_with_the_way_out(key, says):
    assert says in known.unknown(key)
    assert key in known.unknown(key)
