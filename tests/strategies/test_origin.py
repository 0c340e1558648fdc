"""Steps count from what the clients got, which compression.down makes another model than ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fleet import QUADRATIC, Fleet
from flwr.app import ConfigRecord, MetricRecord

from fedipfs.exchange import StoredArrays, from_numpy, from_torch, store_arrays
from fedipfs.strategies import ClientUpdate

OPTIONS = {
    "fednova": {},
    "scaffold": {"server_learning_rate": 0.5},
    "centered_clipping": {"tau": 0.1, "iterations": 1},
    "rfa": {"iterations": 1},
    "krum": {"num_malicious_nodes": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_clients_that_changed_nothing_leave_the_model_that_they_got(store, name):
    """Ours is 10; they got 10.25 and answer that, after unlike many steps."""
    fleet = Fleet(store, QUADRATIC, clients=4, data={}, options={"counts": [4] * 4})
    strategy = fleet.build(name, **OPTIONS[name])

    def stored(value: float, base: StoredArrays | None = None) -> StoredArrays:
        arrays = store_arrays(store, from_torch({"weight": torch.tensor([[value]])}))
        return StoredArrays(arrays.vault, arrays.weights, base=base, asked=1)

    begin, got = stored(10.0), stored(10.25)
    list(strategy.configure_train(1, begin, ConfigRecord(), fleet.grid))
    control = {"control": store_arrays(store, from_numpy({"weight": np.zeros((1, 1), "f4")}))}
    updates = [
        ClientUpdate(node, stored(10.25, got), 10, MetricRecord({"steps": steps}), control)
        for node, steps in ((2, 1), (3, 3), (4, 2))
    ]
    assert strategy.combine(1, updates)["weight"].numpy() == pytest.approx(10.25)
    if name == "centered_clipping":  # and what the round did is 0, seen from there
        assert strategy.before.cid == got.cid
