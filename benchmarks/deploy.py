"""Rounds over a SuperLink: a trivial task, two nodes, everything on this machine.

The alternative is Flower as it comes: `flower-superlink` and two `flower-supernode`, a ClientApp
that imports torch (so does ours), a ServerApp that uses the grid's `send_and_receive`. Then the
same with FedIPFS: TLS, node authentication, signatures, a resident worker; and with `node.poll_s`.
Also the processor time of a site that waits.

    python benchmarks/deploy.py [rounds]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from _common import row, scratch, title

SUPPORT = Path(__file__).parent.parent / "tests" / "support"
sys.path.insert(0, str(SUPPORT))
os.environ["PYTHONPATH"] = str(SUPPORT)

from federation import Federation  # noqa: E402
from proxies import free_ports  # noqa: E402

NODES, IDLE_S, FAST_S = ("north", "south"), 30.0, 0.1
SETTINGS = ("+experiment=mnist", "data.fallback=digits", "train.steps=1", "evaluate.every=100")

APP = {
    "pyproject.toml": """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "trivial"
version = "1.0.0"
[tool.flwr.app]
publisher = "benchmarks"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
out = ""
rounds = 1
""",
    "client_app.py": """import flwr.clientapp
import flwr.app
import torch
app = flwr.clientapp.ClientApp()
@app.train()
def train(message, context):
    return flwr.app.Message(flwr.app.RecordDict(), reply_to=message)
""",
    "server_app.py": """import json
import time
import flwr.app
import flwr.serverapp
app = flwr.serverapp.ServerApp()
@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    seconds = []
    for _ in range(context.run_config["rounds"]):
        began = time.time()
        replies = list(grid.send_and_receive(
            [flwr.app.Message(flwr.app.RecordDict(), node, "train") for node in nodes]))
        assert len(replies) == 2 and not any(reply.has_error() for reply in replies)
        seconds.append(time.time() - began)
    with open(context.run_config["out"], "w") as file:
        json.dump(seconds, file)
""",
}


def stock(folder: Path, rounds: int) -> list[float]:
    """Seconds of each round of Flower as it comes."""
    control, fleet, *ports = free_ports(4)
    app = folder / "trivial"
    app.mkdir(parents=True)
    for name, text in APP.items():
        (app / name).write_text(text)
    home = folder / "flower"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
    )
    env = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "NO_PROXY": "127.0.0.1",
    }
    out = folder / "seconds.json"
    commands = [
        f"flower-superlink --insecure --port {control} --fleet-api-address 127.0.0.1:{fleet} "
        "--disable-runtime-dependency-installation",
        *(f"flower-supernode --insecure --port {p} --superlink 127.0.0.1:{fleet}" for p in ports),
    ]
    started = []
    try:
        for command in commands:
            with open(folder / f"{len(started)}.log", "wb") as log:
                started.append(subprocess.Popen(command.split(), env=env, stdout=log, stderr=log))
            time.sleep(4)
        words = ["flwr", "run", str(app), "here", "--stream", "-c"]
        subprocess.run(
            [*words, f'rounds={rounds} out="{out}"'],
            env=env, check=True, stdout=subprocess.DEVNULL, timeout=60 + 30 * rounds,
        )  # fmt: skip
        return list(json.loads(out.read_text()))
    finally:
        for process in started[::-1]:
            children = psutil.Process(process.pid).children(recursive=True)
            for each in (process, *children):
                each.terminate()
            process.wait(30)
            psutil.wait_procs(children, timeout=10)


def ours(folder: Path, rounds: int, poll_s: float | None) -> tuple[list[float], float]:
    """Seconds of each round with FedIPFS, and the share of a core that an idle site takes."""
    with Federation(
        folder, NODES, settings=SETTINGS, ipfs=False, seal="none", poll_s=poll_s
    ) as federation:
        run = federation.run(rounds + 1)
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["seconds"] for line in lines][1:]  # the first warms up
        time.sleep(2)
        processes = federation.sites["north"].processes()
        before = sum(sum(each.cpu_times()[:2]) for each in processes)
        time.sleep(IDLE_S)
        after = sum(sum(each.cpu_times()[:2]) for each in processes)
    return seconds, (after - before) / IDLE_S


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    title("A round of a trivial task over a SuperLink, two nodes", f"median of {rounds} rounds")
    with scratch() as folder:
        plain = statistics.median(stock(folder / "stock", rounds))
        row("Flower as it comes", f"{plain:.2f} s")
        usual, idle = ours(folder / "ours", rounds, None)
        median = statistics.median(usual)
        row("FedIPFS, stock SuperNode", f"{median:.2f} s", "4 s", median <= 4)
        row("  ratio to Flower as it comes", f"{median / plain:.2f}")
        fast, busy = ours(folder / "fast", rounds, FAST_S)
        median = statistics.median(fast)
        row(f"FedIPFS, node.poll_s={FAST_S}", f"{median:.2f} s", "1.5 s", median <= 1.5)
        row("  ratio to Flower as it comes", f"{median / plain:.2f}")
        row("an idle site, of a core", f"{100 * idle:.1f} %", "3 %", idle <= 0.03)
        row(f"an idle site with node.poll_s={FAST_S}", f"{100 * busy:.1f} %")


if __name__ == "__main__":
    main()
