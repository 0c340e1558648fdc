"""One client that lies, in any way it can think of, costs its own update and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from fedipfs.errors import RunFailed
from fedipfs.exchange import Vault, from_numpy, store_arrays
from fedipfs.server.engine.local import LocalGrid
from fedipfs.server.engine.pool import SerialPool
from fedipfs.server.rounds import Federation
from fedipfs.server.selection import Selection
from fedipfs.store import dag
from fedipfs.strategies import Brief, build

NODES = 6
FAULTS = [
    "steps_list",
    "loss_list",
    "loss_empty",
    "examples_nan",
    "examples_list",
    "long_name",
    "many_metrics",
    "extra_metric",
    "array_name",
    "metric_name",
    "no_metrics",
    "two_metrics",
    "two_arrays",
    "many_values",
    "raise_long",
    "raise_surrogate",
    "system_exit",
    "error_reply",
    "not_a_message",
    "cid_list",
    "raw_arrays",
]
HARMLESS = ["steps_nan", "steps_inf", "order_numbers", "order_swapped", "spoof", "loss_nan"]
STRATEGIES = ["fedavg", "fedadam", "qfedavg", "fedtrimmedavg"]


def federation(store, strategy: str, fault: str, evaluate: int = 0, dtype: str = "f4"):
    options = {
        "app": "hostile_app:app",
        "store": {"kind": "folder", "path": str(store.path), "durable": False},
        "run_id": 1,
        "seed": 1,
        "run_config": {"fault": fault},
        "node_config": {},
        "threads": None,
        "offline": False,
        "keys": None,
        "seal": "none",
    }
    extra = {"client_learning_rate": 0.1} if strategy == "qfedavg" else {}
    model = {"b": np.arange(1, 4).astype(dtype), "a": np.arange(4, 7).astype(dtype)}
    record = dag.put_record(store, {})
    return Federation(
        Vault(store),
        LocalGrid(SerialPool("fedipfs.clients.worker:serve", options), NODES),
        build({"name": strategy, **extra}, Brief(NODES, 1, evaluates=bool(evaluate))),
        Selection(NODES),
        store_arrays(store, from_numpy(model)),
        config=record,
        run=record,
        head=record,
        seed=1,
        min_successes=1,
    )


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The model that the five good clients give, by strategy."""
    from fedipfs.store import FolderStore

    results = {}
    for strategy in STRATEGIES:
        store = FolderStore(tmp_path_factory.mktemp("honest"), durable=False)
        results[strategy] = federation(store, strategy, "examples_nan").play(
            1, evaluate=lambda: False
        )
    return results


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_lies_is_left_out_by_name(store, honest, strategy, fault):
    done = federation(store, strategy, fault).play(1, evaluate=lambda: False)
    assert list(done.failures) == ["client-1"]
    assert 0 < len(done.failures["client-1"]) <= 500
    assert done.model.cid == honest[strategy].model.cid
    assert done.succeeded == NODES - 1
    assert dag.get_record(store, done.record)["failures"] == done.failures


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", HARMLESS)
def test_a_lie_that_decides_nothing_changes_nothing(store, strategy, fault):
    if (strategy, fault) == ("qfedavg", "loss_nan"):
        done = federation(store, strategy, fault).play(1, evaluate=lambda: False)
        assert "train_loss" in done.failures["client-1"]  # there it decides
        return
    good = federation(store, strategy, "").play(1, evaluate=lambda: False)
    done = federation(store, strategy, fault).play(1, evaluate=lambda: False)
    assert done.failures == {}
    assert done.model.cid == good.model.cid
    assert list(done.model) == ["b", "a"]


def test_a_negative_loss_is_refused_where_it_would_decide(store):
    done = federation(store, "qfedavg", "loss_negative").play(1, evaluate=lambda: False)
    assert "not a finite number of at least 0" in done.failures["client-1"]


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [("evaluate_list", "evaluate: its records are"), ("evaluate_raise", "evaluate: RuntimeError")],
)
def test_a_client_that_fails_to_evaluate_is_named(store, strategy, fault, reason):
    done = federation(store, strategy, fault, evaluate=NODES).play(1, evaluate=lambda: False)
    assert done.failures["client-1"].startswith(reason)
    assert done.evaluate == {"loss": 1.0}
    assert done.succeeded == NODES


@pytest.mark.filterwarnings("ignore:overflow")
def test_finite_updates_whose_mean_is_not_fail_the_round(store):
    with pytest.raises(RunFailed, match=r"lower the learning rate"):
        federation(store, "fedavg", "overflow_all", dtype="f8").play(1, evaluate=lambda: False)
