"""What each strategy costs beside FedAvg: seconds a round, and bytes in and out of the store.

Runs of the digits (10 clients, a perceptron of 38,410 parameters, five rounds), as the command
makes them, on two workers. Each strategy's runs alternate with FedAvg's; a run's figure is the
median of its rounds after the first. `best_model` has its clients evaluate each other,
`ensemble` evaluates ten models where FedAvg evaluates one, and `fedbuff` makes a model of every
five updates instead of ten.

`--repeats N` runs each N times; `--only NAMES` some of them.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from pathlib import Path
from typing import Any

from _common import WORKERS, configuration, one_thread, quiet_flower, row, scratch, title

import fedipfs.conf

CONF = Path(next(iter(fedipfs.conf.__path__)))
RUN = ["task.options.hidden=512", "clients.total=10", "rounds=5", "train.epochs=1", "run_id=bench"]
NEEDS = {
    "fedbn": ["+task.options.norm=true"],
    "fedper": ["strategy.personal=['3.*']"],
    "fedbuff": ["clients.clock=simulated"],
    "krum": ["strategy.num_malicious_nodes=2"],
    "multikrum": ["strategy.num_malicious_nodes=2"],
}


def play(choice: str, folder: Path) -> dict[str, float]:
    """Median seconds of a round, bytes a round that went into the store and out of it."""
    from fedipfs.observe.progress import Progress
    from fedipfs.server.run import run

    runs = folder / f"{len(list(folder.iterdir()))}"
    words = [*RUN, f"strategy={choice}", *NEEDS.get(choice, []), f"engine.workers={WORKERS}"]
    config = configuration("digits", *words, f"runs_dir={runs}", "store.durable=false")
    run(config, Progress(io.StringIO(), quiet=True))
    text = (runs / "bench" / "metrics.jsonl").read_text()
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()][1:]
    return {
        "seconds": statistics.median(line["seconds"] for line in lines),
        "put": statistics.median(line["bytes"]["store_put"] for line in lines),
        "get": statistics.median(line["bytes"]["store_get"] for line in lines),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--only", nargs="*")
    given = options.parse_args()
    choices = given.only or sorted(path.stem for path in CONF.glob("strategy/*.yaml"))
    one_thread()
    quiet_flower()
    title("a round beside FedAvg's", f"median of {given.repeats} pairs of runs")
    with scratch() as folder:
        for choice in choices:
            pairs = [(play(choice, folder), play("fedavg", folder)) for _ in range(given.repeats)]
            ratio = {
                key: statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)
                for key in pairs[0][0]
            }
            bytes_ = f"put {ratio['put']:.2f} x, get {ratio['get']:.2f} x"
            row(f"{choice}: {bytes_}", f"{ratio['seconds']:.2f} x")


if __name__ == "__main__":
    main()
