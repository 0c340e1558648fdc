"""`python -m fedipfs.server` as a user meets it: words in, lines and exit codes out."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from runs import QUICK, command, lines, play, start, summary

import fedipfs

pytestmark = pytest.mark.slow  # each starts the real command

EXPERIMENTS = sorted(
    path.stem for path in Path(fedipfs.__file__).parent.joinpath("conf/experiment").glob("*.yaml")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_shortened(tmp_path, name):
    words = ["rounds=1", "train.steps=2", "data.fallback=digits"]
    if name != "lr_mnist_1000":
        words += ["clients.total=4", "clients.per_round=3"]
    result = play(tmp_path, f"+experiment={name}", *words)
    assert result["experiment"] == name
    assert result["status"] == "finished"
    assert "accuracy" in result["metrics"]


def test_a_run_prints_its_rounds_and_what_it_left(tmp_path):
    done = command(*QUICK, "run_id=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    left = summary(tmp_path / "runs" / "one")
    assert left["final_model_cid"] in done.stdout
    assert left["head_cid"] in done.stdout
    assert "fedipfs runs show one" in done.stdout
    assert "round 1/2" in done.stderr
    assert "round 2/2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["+experiment=digitz"], "unknown experiment 'digitz'; did you mean 'digits'? choose one"),
        (
            ["+experiment=digits", "strategy=xx"],
            "unknown strategy 'xx'; choose one of: average, best_model, bulyan,",
        ),
        (["experiment=digits"], "+experiment=digits"),
        (["+rounds=3"], "leave out the plus: rounds=3"),
        (["+experiment=digits", "+experiment=mnist"], "experiment is given more than once"),
        (["rounds=[1"], "cannot read 'rounds=[1'"),
        (["rounds=${nope}"], "rounds: Interpolation key 'nope' not found"),
        (["+experiment=digits", "rounds=0"], "rounds=0"),
        (["seed=99999999999999999999"], "seed=99999999999999999999 is too large"),
        (["clients=3"], "clients=3 takes the place of a whole section"),
        (["train=x"], "set what is in it, as train.batch_size="),
        (["store=3"], "Got int"),
        (["strategy=krum", "strategy.num_malicious_nodes=abc"], "num_malicious_nodes=abc must be"),
        (["+experiment=digits", "strategy=fedadam", "strategy.eta=-1"], "strategy.eta=-1 must be"),
        (["+experiment=digits", "train.optimizer.lr=abc"], "train.optimizer.lr=abc must be"),
        (["train.clip_norm=-1"], "train.clip_norm=-1 is not a number above 0"),
        (["runs_dir=/proc/x"], "runs_dir=/proc/x cannot be used"),
        (["-m", "runs_dir=/proc/x", "seed=1,2"], "choose another runs_dir"),
        (["+experiment=digits", "clients.per_round=11"], "clients.per_round=11"),
        (["+experiment=digits", "roundz=3"], "unknown setting 'roundz'; did you mean 'rounds'?"),
        (["-m", "seed=1,2", "clients.totl=3"], "did you mean 'clients.total'?"),
        (["+experiment=digits", "rounds="], "rounds"),
        (["+experiment=digits", "train.optimizer.name=SDG"], "SDG"),
        (["+experiment=digits", "task.target=os:system"], "os:system"),
        (["+experiment=mnist", "data.root=nowhere"], "nowhere"),
        (["+experiment=digits", "store.path=/proc/nothing"], "/proc/nothing"),
        (["+experiment=digits", "store.path=file"], "file"),
        (["resume=unheard-of"], "unheard-of"),
        (["+experiment=digits", "data.partition=shards", "clients.total=2000"], "2000"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, words, says):
    (tmp_path / "file").write_text("not a store")
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("fedipfs-server: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.glob("runs/*")} <= {"store", "sweeps"}
    assert (tmp_path / "file").read_text() == "not a store"


def test_a_corrupt_store_is_named_and_nothing_is_lost(tmp_path):
    assert command(*QUICK, "run_id=one", cwd=tmp_path).returncode == 0
    head = (tmp_path / "runs/one/head").read_text().strip()
    (block,) = (tmp_path / "runs/store/blocks").rglob(f"*{head[1:]}*")
    block.write_bytes(block.read_bytes()[:-1] + b"?")
    other = command("resume=one", "rounds=3", "engine=deploy", cwd=tmp_path)
    assert other.returncode == 2
    assert "other clients than it began with (engine=" in other.stderr
    done = command("resume=one", "rounds=3", cwd=tmp_path)
    assert done.returncode == 2
    assert head in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs/one/model.safetensors").exists()
    assert len(lines(tmp_path / "runs/one")) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("head", b"", "runs/one/head should hold one CID, not ''; put there the record_cid"),
        ("head", b"bafy\n", "not 'bafy'"),
        ("head", b"\xff\xfe", "runs/one/head cannot be read (not UTF-8)"),
        ("config.yaml", b"a: [1", "runs/one/config.yaml is no configuration (expected ','"),
        ("config.yaml", b"rounds: 2", "the setting experiment is missing"),
        ("config.yaml", b"- 1", "not a mapping"),
        ("config.yaml", b"\xff", "runs/one/config.yaml cannot be read"),
    ],
)
def test_a_garbled_file_is_named_when_its_run_is_resumed(tmp_path, name, content, says):
    folder = tmp_path / "runs" / "one"
    play(tmp_path / "runs", *QUICK, "run_id=one")
    kept = (folder / "model.safetensors").read_bytes()
    (folder / name).write_bytes(content)
    done = command("resume=one", "rounds=3", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr
    assert (folder / "model.safetensors").read_bytes() == kept


def test_a_metric_that_is_not_measured_is_said_at_the_end(tmp_path):
    done = command(*QUICK, "task.metric=f1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: metric f1 is not among loss, accuracy" in done.stderr.splitlines()[-1]


def _wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def _rounds(folder: Path) -> int:
    return len(lines(folder)) if (folder / "metrics.jsonl").exists() else 0


def _family(pid: int) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter()
        if _group(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE
    ]


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


ROUNDS = 14
LONG = (
    "+experiment=digits",
    f"rounds={ROUNDS}",
    "clients.total=4",
    "strategy=fedadam",
    "run_id=one",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The summary of that run, never interrupted."""
    return play(tmp_path_factory.mktemp("whole"), *LONG)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(tmp_path, whole, sig):
    folder = tmp_path / "runs" / "one"
    process = start(*LONG, cwd=tmp_path)
    _wait_for(lambda: _rounds(folder) >= 3)
    if sig == signal.SIGINT:
        os.killpg(process.pid, sig)  # as a terminal does
    else:
        process.send_signal(sig)
    _, stderr = process.communicate(timeout=60)
    if sig == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        assert "python -m fedipfs.server resume=one" in stderr
        assert summary(folder)["status"] == "interrupted"
        assert "Traceback" not in stderr
    _wait_for(lambda: not _family(process.pid), 15)

    done = lines(folder)
    assert 3 <= len(done) < ROUNDS
    resumed = command("resume=one", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [line["round"] for line in lines(folder)] == list(range(1, ROUNDS + 1))
    assert summary(folder)["final_model_cid"] == whole["final_model_cid"]
    assert summary(folder)["head_cid"] == whole["head_cid"]


def _listens(process: subprocess.Popen[str]) -> bool:
    """Whether the server's Python code handles signals; before, the interpreter starts."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        time.sleep(1)
        return True
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", status.read_text())
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def _interrupt(process: subprocess.Popen[str], times: int = 1, apart: float = 0.0) -> str:
    """Ctrl-C, as a terminal does; what the server had to say."""
    for _ in range(times):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(apart)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "ignored" not in stderr
    _wait_for(lambda: not _family(process.pid), 30)
    return stderr


@pytest.mark.parametrize("delay", [0, 0.3, 0.7, 1.2, 2.0])
def test_ctrl_c_before_the_first_round_leaves_nothing_behind(tmp_path, delay):
    process = start(*LONG, cwd=tmp_path)
    _wait_for(lambda: _listens(process))
    time.sleep(delay)
    stderr = _interrupt(process)
    folder = tmp_path / "runs" / "one"
    if folder.exists():  # the machine is fast
        assert "resume=one" in stderr
        assert (folder / "config.yaml").exists()
    else:
        assert stderr.count("\n") == 1
        assert "nothing to go on with" in stderr or "before anything was begun" in stderr


@pytest.mark.parametrize("apart", [0.005, 0.02])
def test_ctrl_c_pressed_twice_ends_as_once(tmp_path, apart):
    folder = tmp_path / "runs" / "one"
    process = start(*LONG, "rounds=500", cwd=tmp_path)
    _wait_for(lambda: _rounds(folder) >= 2)
    stderr = _interrupt(process, 3, apart)
    assert "go on with: python -m fedipfs.server resume=one" in stderr
    assert "nothing to go on with" not in stderr
    assert summary(folder)["status"] == "interrupted"
    assert (folder / "model.safetensors").exists()


def test_ctrl_c_while_a_resumed_run_loads_says_that_it_can_go_on(tmp_path):
    play(tmp_path / "runs", *QUICK, "run_id=one")
    process = start("resume=one", "rounds=500", "engine=local", cwd=tmp_path)
    # The helper that forks workers is started once the settings are read, before data are.
    _wait_for(lambda: len(_family(process.pid)) > 1)
    stderr = _interrupt(process)
    assert "go on with: python -m fedipfs.server resume=one" in stderr
    assert summary(tmp_path / "runs/one")["rounds_completed"] >= 2


def test_ctrl_c_in_a_sweep_leaves_the_table_of_finished_cells(tmp_path):
    process = start("-m", *QUICK, "rounds=1,500", "seed=1", cwd=tmp_path)
    _wait_for(lambda: any(_rounds(path) >= 2 for path in tmp_path.glob("runs/*-digits-*")))
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "go on with: python -m fedipfs.server resume=" in stderr
    (path,) = tmp_path.glob("runs/sweeps/*/sweep.csv")
    (row,) = csv.DictReader(path.open())
    assert (row["rounds"], row["status"]) == ("1", "finished")
    assert str(path.relative_to(tmp_path)) in stdout


def test_killed_at_any_moment_it_still_resumes(tmp_path, whole):
    """Kills at moments spread over a round, between which the run must always find its way."""
    folder = tmp_path / "runs" / "one"
    words: tuple[str, ...] = LONG
    for kill in range(4):
        process = start(*words, cwd=tmp_path)
        seen = _rounds(folder)
        _wait_for(lambda seen=seen, p=process: _rounds(folder) > seen or p.poll() is not None)
        time.sleep(0.03 * kill)
        process.kill()
        process.communicate()
        words = ("resume=one",)
    done = command("resume=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(folder)["final_model_cid"] == whole["final_model_cid"]


def test_what_may_not_change_on_resume_is_refused(tmp_path):
    assert command(*QUICK, "run_id=one", cwd=tmp_path).returncode == 0
    done = command("resume=one", "rounds=3", "seed=9", cwd=tmp_path)
    assert done.returncode == 2
    assert "seed cannot change when a run is resumed" in done.stderr
    done = command("resume=one", "rounds=3", "engine=serial", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "runs/one")["rounds_completed"] == 3


def test_a_run_whose_clients_all_fail_exits_with_3(tmp_path):
    task = tmp_path / "bad_task.py"
    task.write_text(
        "from fedipfs.tasks.small import Digits\n"
        "class Bad(Digits):\n"
        "    def loss(self, output, target):\n"
        "        raise ArithmeticError('no loss today')\n"
    )
    words = [*QUICK, "evaluate.server=false", "task.target=bad_task.py:Bad", "run_id=one"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "no loss today" in done.stderr
    assert done.stderr.rstrip().count("\n") <= 2
    assert summary(tmp_path / "runs/one")["status"] == "failed"


def test_a_sweep_ends_with_a_table_and_a_csv_and_shares_the_store(tmp_path):
    words = ["-m", *QUICK, "strategy=fedavg,fedadam", "seed=1,2", "rounds=1"]
    done = command(*words, cwd=tmp_path, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs" / "sweeps").glob("*/sweep.csv")
    rows = list(csv.DictReader(path.open()))
    assert [(row["strategy"], row["seed"]) for row in rows] == [
        ("fedavg", "1"),
        ("fedavg", "2"),
        ("fedadam", "1"),
        ("fedadam", "2"),
    ]
    assert all(0 < float(row["accuracy"]) <= 1 and row["status"] == "finished" for row in rows)
    assert len({row["final_model_cid"] for row in rows}) == 4
    table = done.stdout[done.stdout.index("Sweep") :]
    heading = next(line for line in table.splitlines() if "strategy" in line)
    assert re.findall(r"\w+", heading) == [
        "strategy", "seed", "loss", "accuracy", "seconds", "status"
    ]  # fmt: skip
    assert sum("finished" in line for line in table.splitlines()) == 4  # a line each
    assert rows[0]["experiment"] == "digits" and (tmp_path / "runs" / rows[0]["run_id"]).is_dir()
    assert str(path.relative_to(tmp_path)) in done.stdout


def test_a_bad_cell_does_not_stop_a_sweep(tmp_path):
    words = ["-m", *QUICK, "rounds=1", "clients.per_round=2,9"]
    done = command(*words, cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 2
    (path,) = (tmp_path / "runs" / "sweeps").glob("*/sweep.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert rows[0]["error"] == ""
    assert "clients.per_round=9 is more than" in rows[1]["error"]
    assert "failed" in done.stdout
    assert "clients.per_round=9" in done.stderr


def test_help_names_the_groups(tmp_path):
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("experiment: ", "strategy: ", "mnist", "resume"):
        assert word in done.stdout
