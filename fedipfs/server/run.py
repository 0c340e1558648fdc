"""One whole run: from a configuration to a model, its CID and its record."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from omegaconf import OmegaConf

from fedipfs.errors import Diverged, RunError, RunInterrupted, StoreError
from fedipfs.exchange import StoredArrays, Vault, store_arrays, stored_cid, tensors_of
from fedipfs.exchange.stages import session_name
from fedipfs.ipld import CID
from fedipfs.observe.memory import peak_rss
from fedipfs.observe.progress import Progress
from fedipfs.observe.report import render
from fedipfs.observe.summary import write_json
from fedipfs.server import records, results, simulation
from fedipfs.server.bench import Bench
from fedipfs.server.best import Best, source
from fedipfs.server.engine.base import NodeGrid, Nodes, Traffic
from fedipfs.server.folder import RunFolder
from fedipfs.server.keep import Keeper
from fedipfs.server.logs import LogFile, QuietFlower
from fedipfs.server.rounds import Federation, Round
from fedipfs.server.settings import cohort_size, recorded
from fedipfs.server.spending import Spending
from fedipfs.server.stopping import Stopping
from fedipfs.strategies import load_state
from fedipfs.weights.compression import Spec

log = logging.getLogger(__name__)


def run(
    config: Mapping[str, Any],
    progress: Progress,
    *,
    resume: bool = False,
    nodes: Nodes | None = None,
) -> dict[str, Any]:
    """Run the federation that the checked `config` describes; returns its summary.

    With `resume`, `config["run_id"]` names a run that is there: its remaining rounds are run,
    with the result that the uninterrupted run would have had. `nodes` are its clients: simulated
    ones on this machine, if not given.

    Raises UserError for what the user can mend, RunFailed, or RunInterrupted for Ctrl-C; the
    folder then holds all completed rounds.
    """
    began = time.monotonic()
    nodes = nodes or simulation.Simulated()
    with QuietFlower():
        progress.phase("loading data and model")
        # A run that goes on takes its model from the store.
        bench = Bench.prepare(
            {**config, "init_from": None} if resume else config, remote=nodes.remote
        )
        gc.freeze()  # Flower's QFedAvg and Bulyan collect garbage for every update
        if resume:
            folder = RunFolder.open(config["runs_dir"], config["run_id"])
        else:
            folder = RunFolder.create(config["runs_dir"], config["run_id"], config["experiment"])
        try:
            with LogFile(folder.path / "log.txt"):
                return _Session(bench, folder, progress, began, nodes).run()
        finally:
            progress.close()
            folder.close()
            gc.unfreeze()


class _Session:
    """The time between opening a run's folder and closing it."""

    def __init__(
        self, bench: Bench, folder: RunFolder, progress: Progress, began: float, nodes: Nodes
    ) -> None:
        config = self.config = {**bench.config, "run_id": folder.run_id}
        self.bench, self.store, self.nodes = bench, bench.store, nodes
        self.folder, self.progress, self.began = folder, progress, began
        self.vault = Vault(bench.store, nodes.party(config, folder.path), config["seal"])
        self.lines: list[dict[str, Any]] = []
        self.asking: dict[str, Any] | None = None  # who was asked, where a resumed run goes on
        self.states: dict[int, list[CID]] = {}
        self.traffic = Traffic()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="fedipfs-commit")
        self._commit_under_way: Future[None] | None = None
        self.settings = {**recorded(config), "dataset": bench.dataset.name}
        metric, direction = config["task"]["metric"], config["task"]["direction"]
        judge = source(config)
        self.best = Best(metric, direction, judge)
        self.stopping = Stopping(config["stop"], metric, direction, judge)
        self._advised = False  # of values that are cut off
        self.stopped: str | None = None  # why the run ended before its last round
        self.spending = Spending.of(
            config["privacy"],
            folder.count("releases"),
            lambda count: folder.write("releases", f"{count}\n"),
            bench.price,
        )
        self.keeper = Keeper(
            self.store,
            folder.run_id,
            models=config["keep"]["models"],
            everything=config["keep"]["everything"],
            best=self.best,
        )
        if folder.head is not None:
            self.head = folder.head
            return
        self.model = store_arrays(self.vault, bench.model)
        self.result = stored_cid(self.model)
        self.recorded = self.vault.put_record(self.settings)
        first = records.run_record(
            self.recorded, self.result, self.model.order, bench.dataset.name, self.vault
        )
        if config["unsealed_because"] and config["seal"] == "none":
            first["unsealed_because"] = config["unsealed_because"]
        self.head = self.first = records.put(self.vault, first, None)

    def run(self) -> dict[str, Any]:
        config, folder = self.config, self.folder
        last = self._last_round()
        if last >= config["rounds"] or self.stopped:
            if not self._concluded():  # killed while the results were written
                return self._conclude()
            why = f": {self.stopped}" if self.stopped else ""
            how = "change the setting" if self.stopped else f"add rounds={last + 1} or more"
            raise RunError(
                f"run {folder.run_id} has finished its {last} rounds{why}; to train on, {how}"
            )
        folder.write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        if not last:
            self.keeper.begin(self.head)
            folder.write("head", f"{self.head}\n")
        status, error = "failed", None
        try:
            opened = self.nodes.open(config, self.vault, self.states, self.progress.client_done)
            with opened as grid:
                self._rounds(grid, last + 1)
            if self.stopping.diverged:
                raise Diverged(self.stopping.diverged)
            status = "finished"
        except Diverged as problem:
            self._settle()
            error = self._back_to_best(problem)
            raise Diverged(error) from problem
        except KeyboardInterrupt:
            status = "interrupted"
            where = "" if config["runs_dir"] == "runs" else f" runs_dir={config['runs_dir']}"
            raise RunInterrupted(
                f"stopped after {len(self.lines)} of {config['rounds']} rounds; go on with: "
                f"python -m fedipfs.server resume={folder.run_id}{where}"
            ) from None
        except Exception as problem:
            error = str(problem)
            raise
        finally:
            self._disk.shutdown()  # what is under way is completed
            summary = self._write_results(status, error)
        self.progress.finish(summary, folder.path, _store_option(config["store"]))
        return summary

    def _conclude(self) -> dict[str, Any]:
        """Write the results of a run that was killed after its last round."""
        if self.stopping.diverged:
            error = self._back_to_best(self.stopping.diverged)
            self._write_results("failed", error)
            raise Diverged(error)
        summary = self._write_results("finished", None)
        self.progress.finish(summary, self.folder.path, _store_option(self.config["store"]))
        return summary

    def _back_to_best(self, why: object) -> str:
        """Make the best model the run's result; what to say of it."""
        best = self.best.so_far
        if best is None:
            return f"{why}; no model was measured before, so there is none to go back to"
        self.result = best.model
        return (
            f"{why}; went back to the model of round {best.round}, {best.model} "
            f"({self.best.metric} {best.value:.4g}): lower the learning rate, or clip"
        )

    def _concluded(self) -> bool:
        """Whether summary.json says that the run has finished, with as many rounds as there are."""
        with contextlib.suppress(RunError, ValueError):
            summary = json.loads(self.folder.read("summary.json"))
            done = summary.get("rounds_completed") == len(self.lines)
            return bool(summary.get("status") == "finished" and done)
        return False

    def _last_round(self) -> int:
        """Put everything where the last completed round left it; 0 if there is none."""
        record = records.get(self.vault, self.head)
        self.recorded = record["config"]
        if self.vault.get_record(self.recorded) != self.settings:
            raise RunError(
                f"{self.folder.path} was run with another configuration or data set than "
                "its config.yaml gives now; start a new run"
            )
        if record["type"] != records.ROUND:
            self.first = self.head
            self.model = StoredArrays.open(self.vault, record["model"], record["order"])
            self.result = stored_cid(self.model)
            self.folder.rewrite([])
            return 0
        self.first = record["run"]
        self.model = StoredArrays.open(self.vault, record["model_out"], record["order"])
        load_state(self.bench.strategy, self.vault, record["strategy"])
        self.result = record["result"] or stored_cid(self.model)
        self.states = {int(node): state for node, state in record["clients"].items()}
        self.asking = record["asking"]
        number = int(record["round"])
        # A line may have been written for a round whose record was not completed.
        self.lines = [line for line in self.folder.lines() if line["round"] <= number]
        self.folder.rewrite(self.lines)
        self.keeper.resume(self.head, self.lines)
        for line in self.lines:
            self.stopped = self.stopping.see(line)
        if self.spending is not None:
            self.spending.restore(record["privacy"])
        return number

    def _rounds(self, grid: NodeGrid, first: int) -> None:
        config, bench, progress = self.config, self.bench, self.progress
        begun = self._begun()
        self.traffic = grid.traffic
        federation = Federation(
            self.vault,
            grid,
            bench.strategy,
            simulation.selection(config, bench.min_successes, grid.name_of),
            self.model,
            self.recorded,
            self.first,
            self.head,
            config["seed"],
            bench.min_successes,
            deadline_s=self._deadline_s(),
            compression=Spec.of(config["compression"]),
            compress_models=bool(config["compression"].get("down")),
            poison=simulation.adversary(config, bench.strategy),
            prefetch=bool(config["store"].get("prefetch")),
            spending=self.spending,
            secagg=config["secagg"],
            session=session_name(str(self.first), begun),
            attempt=begun if self.nodes.remote else None,
            masks=bench.masks,
            on_phase=progress.phase,
        )
        if config["evaluate"]["server"]:
            federation.evaluate = lambda model, result: bench.evaluate(model, config, result)
        if self.asking is not None:
            federation.asking.restore(self.asking, self.vault)
        progress.start(
            self.folder.run_id,
            config["experiment"],
            config["rounds"],
            first,
            bench.dataset.note,
        )
        for text in bench.told:
            progress.tell(text)
        for text in bench.warnings:
            progress.tell(f"WARNING: {text}", important=True)
        for number in range(first, config["rounds"] + 1):
            self.stopped = self._out_of_time()
            if not self.stopped:
                progress.round_started(number, cohort_size(config["clients"]))
                self._round(federation, number)
            if self.stopped:
                break
        self._settle()

    def _deadline_s(self) -> float | None:
        """Of training in a round, and again of evaluating: partners may be away."""
        found: float | None = self.config["clients"]["deadline_s"]
        if found is None and self.nodes.remote:
            found = self.config["engine"]["timeout_s"]
        return found

    def _begun(self) -> int:
        """How many processes have begun on this run before: another number in every one.

        Under secure aggregation it is in what is signed: a round that was interrupted is begun
        anew with other keys, and those who had helped to unmask it would not do so a second time.
        And partners tell by it a round that is asked anew from one that is replayed to them.
        """
        if self.config["secagg"]["name"] == "off" and not self.nodes.remote:
            return 0
        begun = self.folder.count("sessions")
        self.folder.write("sessions", f"{begun + 1}\n")
        return begun

    def _out_of_time(self) -> str | None:
        return self.stopping.out_of_time(time.monotonic() - self.began)

    def _round(self, federation: Federation, number: int) -> None:
        """Play a round, begin to commit it, and see whether it was the last."""
        began, config, store = time.monotonic(), self.config, self.store
        before, counters = self.traffic.copy(), store.counters.copy()
        due = number % config["evaluate"]["every"] == 0 or number == config["rounds"]
        done = federation.play(number, evaluate=lambda: due or self._out_of_time() is not None)
        asked = done.selected * (2 if done.evaluate is not None else 1) or 1
        now = self.traffic
        put = now.store_put - before.store_put + store.counters.put_bytes - counters.put_bytes
        get = now.store_get - before.store_get + store.counters.get_bytes - counters.get_bytes
        own = store.counters
        moved = {
            "flower_per_client": round((now.flower - before.flower) / asked),
            "store_put": put,
            "store_get": get,
            "sent": now.sent - before.sent + own.sent_bytes - counters.sent_bytes,
            "fetched": now.fetched - before.fetched + own.fetched_bytes - counters.fetched_bytes,
        }
        line = results.line(done, moved, time.monotonic() - began)
        self._advise(done)
        self.stopped = self.stopping.see(line)
        if self.stopping.diverged:
            line["diverged"] = self.stopping.diverged
        # Disks are slow to confirm: the next round trains meanwhile, but is not committed before.
        self._settle()
        self._commit_under_way = self._disk.submit(self._commit, done, line)

    def _advise(self, done: Round) -> None:
        """Say once that secure aggregation cuts off too much, and what to do."""
        masked = done.aggregation.get("secagg", {})
        if "suggested_clip" in masked and not self._advised:
            self._advised = True
            self.progress.tell(
                f"WARNING: {100 * masked['clipped']:.2g} % of the values of round {done.number} "
                f"were beyond secagg.clip={self.config['secagg']['clip']:g} and were cut off; set "
                f"secagg.clip={masked['suggested_clip']:g}",
                important=True,
            )

    def _settle(self) -> None:
        """Wait until the round before is safe; raise what kept it from that."""
        pending, self._commit_under_way = self._commit_under_way, None
        if pending is not None:
            pending.result()

    def _commit(self, done: Round, line: dict[str, Any]) -> None:
        """Make a round count. The order makes any moment a safe one to be killed."""
        self.keeper.pin(line, done.record, done.details, done.result, done.needed)
        self.store.flush()
        self.folder.append(line)
        self.folder.write("head", f"{done.record}\n")
        self.keeper.release()
        self.model, self.result, self.head = done.model, done.result, done.record
        self.lines.append(line)
        self.progress.round_done(line)

    def _write_results(self, status: str, error: str | None) -> dict[str, Any]:
        """summary.json, report.html and, after a round, model.safetensors and best.safetensors."""
        folder = self.folder
        try:
            if self.lines:
                folder.write_model("model.safetensors", tensors_of(self.vault, self.result).file())
            if (best := self.best.so_far) is not None:
                folder.write_model("best.safetensors", tensors_of(self.vault, best.model).file())
        except StoreError as problem:
            if status == "finished":
                raise
            # A run that ended because its store is away says so, not that this failed as well.
            log.warning("the models could not be written to %s: %s", folder.path, problem)
        summary = self._summary(status, error)
        write_json(folder.path / "summary.json", summary)
        folder.write("report.html", render(summary, self.lines, folder.read("config.yaml")))
        return summary

    def _summary(self, status: str, error: str | None) -> dict[str, Any]:
        config, lines = self.config, self.lines
        return {
            "run_id": self.folder.run_id,
            "experiment": config["experiment"],
            "dataset": self.bench.dataset.name,
            "strategy": config["strategy"]["name"],
            "engine": config["engine"]["name"],
            "seal": config["seal"],
            **results.outcome(lines, self.result, self.best.so_far, self.head),
            **results.totals(lines),
            "seconds": {
                "total": round(time.monotonic() - self.began, 3),
                "rounds": round(sum(line["seconds"] for line in lines), 3),
            },
            "peak_rss_mb": round(max(self.traffic.peak_rss, peak_rss()) / 1e6, 1),
            "privacy": self.spending and self.spending.summary(),
            "status": status,
            "stopped": self.stopped,
            "error": error,
        }


def _store_option(store: Mapping[str, Any]) -> str | None:
    """What `fedipfs store --store` takes to find a run's blocks; of a cache, the folder."""
    if store.get("kind") == "kubo":
        return f"kubo:{store['address']}"
    return store.get("path")
