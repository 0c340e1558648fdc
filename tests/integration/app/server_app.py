"""A Flower server as its users write it; its model has a million parameters."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    rng = np.random.default_rng(0)
    model = [rng.standard_normal(shape, "f4") for shape in [(1000, 999), (1000,)]]
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord(model),
        num_rounds=context.run_config["rounds"],
        timeout=60,
    )
    np.savez(context.run_config["result"], *result.arrays.to_numpy_ndarrays())
