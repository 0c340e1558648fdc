"""The `fedipfs` command: what it prints, what it stores, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedipfs.cli import main
from fedipfs.errors import DagCborError
from fedipfs.ipld import CID, unixfs
from fedipfs.store import FolderStore, dag

Output = pytest.CaptureFixture[str]
TEXT = b"the same bytes, the same name\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with the default store inside it."""
    monkeypatch.delenv("FEDIPFS_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(TEXT)
    return tmp_path


def out(capsys: Output, *argv: str) -> str:
    """What a command that succeeds prints."""
    code = main(argv)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refused(capsys: Output, *argv: str, code: int = 2) -> str:
    """The one line a command that is refused prints on stderr."""
    assert main(argv) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def command(*argv: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m fedipfs` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fedipfs", *argv],
        capture_output=True,
        timeout=60,
        **options,  # type: ignore[call-overload]
    )


# ---- start-up


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = """
import sys
from fedipfs.cli import main
assert main(["--help"]) == 0
heavy = ["flwr", "torch", "sklearn", "hydra", "numpy", "rich", "omegaconf", "cryptography"]
sys.exit(f"loaded: {[name for name in heavy if name in sys.modules]}"
         if any(name in sys.modules for name in heavy) else 0)
"""
    fastest = 60.0
    for _ in range(5):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
        fastest = min(fastest, time.monotonic() - began)
        assert done.stderr == b""
        assert done.returncode == 0
    assert fastest < 0.5


@pytest.mark.parametrize(
    "argv", [[], ["store"], ["runs"], ["store", "add"], ["store", "gc"], ["runs", "show"]]
)
def test_every_level_has_help(capsys: Output, argv: list[str]) -> None:
    for option in ("--help", "-h"):
        assert "Usage: fedipfs" in out(capsys, *argv, option)


def test_version(capsys: Output) -> None:
    assert out(capsys, "--version").startswith("fedipfs 0.")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts(capsys: Output, shell: str) -> None:
    assert "_FEDIPFS_COMPLETE" in out(capsys, "completion", shell)


def test_completion_knows_commands_and_runs(folder: Path) -> None:
    (folder / "runs" / "2026-digits").mkdir(parents=True)
    (folder / "runs" / "2026-digits" / "head").write_text("")
    environ = {**os.environ, "_FEDIPFS_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    words = command(env={**environ, "COMP_WORDS": "fedipfs store ex"}).stdout
    assert words.split() == [b"plain,export"]
    words = command(env={**environ, "COMP_WORDS": "fedipfs runs show 20", "COMP_CWORD": "3"}).stdout
    assert words.split() == [b"plain,2026-digits"]


def test_server_passes_its_arguments_on(folder: Path) -> None:
    done = command("server", "--help", cwd=folder)
    assert b"+experiment=mnist" in done.stdout
    assert done.returncode == 0


# ---- store


def test_cid_prints_the_name_and_stores_nothing(folder: Path, capsys: Output) -> None:
    expected = str(CID.of(TEXT))
    assert out(capsys, "store", "cid", "a.txt") == f"{expected}\n"
    (folder / "b.txt").write_bytes(b"")
    lines = out(capsys, "store", "cid", "a.txt", "b.txt").splitlines()
    assert lines == [f"{expected}  a.txt", f"{CID.of(b'')}  b.txt"]
    assert not (folder / "runs").exists()


def test_a_model_file_has_the_cid_of_the_run_that_wrote_it(folder: Path, capsys: Output) -> None:
    import numpy as np
    import safetensors.numpy

    from fedipfs import weights
    from fedipfs.store import FolderStore

    tensors = {"w": np.arange(300_000, dtype="f4"), "b": np.ones(3, "f4")}
    stored = weights.put(FolderStore(folder / "elsewhere"), tensors)
    safetensors.numpy.save_file(tensors, "m.safetensors")
    assert main(["store", "cid", "--weights", "m.safetensors"]) == 0
    assert capsys.readouterr().out.split() == [str(stored)]
    assert main(["store", "add", "--weights", "m.safetensors"]) == 0
    assert capsys.readouterr().out.split() == [str(stored)]
    Path("no.safetensors").write_bytes(b"nonsense")
    assert main(["store", "cid", "--weights", "no.safetensors"]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_what_is_added_comes_back(folder: Path, capsys: Output) -> None:
    data = os.urandom(3 * unixfs.CHUNK + 7)
    (folder / "big").write_bytes(data)
    name = out(capsys, "store", "add", "big").strip()
    assert name == out(capsys, "store", "cid", "big").strip()
    done = command("store", "cat", name, cwd=folder)
    assert done.stdout == data
    assert done.returncode == 0
    assert out(capsys, "store", "ls", "--pins") == f"{name}  big\n"
    links = [line.split() for line in out(capsys, "store", "ls", name).splitlines()]
    assert [int(size) for _, size in links] == [unixfs.CHUNK] * 3 + [7]
    stat = json.loads(out(capsys, "store", "stat", "--json"))
    assert stat["blocks"] == 5
    assert stat["pins"] == 1
    assert stat["bytes"] > len(data)
    assert "5" in out(capsys, "store", "stat")
    assert len(out(capsys, "store", "ls").splitlines()) == 5


def test_standard_input(folder: Path) -> None:
    for verb in ("cid", "add"):
        done = command("store", verb, "-", cwd=folder, input=TEXT)
        assert done.stdout.decode().strip() == str(CID.of(TEXT))


def test_the_store_is_named_by_option_or_environment(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    out(capsys, "store", "add", "a.txt", "--store", "one")
    monkeypatch.setenv("FEDIPFS_STORE", f"folder:{folder}/two")
    out(capsys, "store", "add", "a.txt")
    assert out(capsys, "store", "ls", "--store", "one") == out(capsys, "store", "ls")
    assert (folder / "one").is_dir()
    assert (folder / "two").is_dir()
    assert not (folder / "runs").exists()


def test_a_record_is_shown_as_json(folder: Path, capsys: Output) -> None:
    blocks = FolderStore(folder / "runs" / "store")
    leaf = blocks.put(TEXT)
    record = dag.put_record(blocks, {"link": leaf, "n": 1})
    blocks.flush()
    assert json.loads(out(capsys, "store", "cat", str(record))) == {
        "link": {"/": str(leaf)},
        "n": 1,
    }
    assert json.loads(out(capsys, "store", "ls", str(record), "--json")) == [
        {"cid": str(leaf), "size": len(TEXT)}
    ]


def test_links_to_blocks_elsewhere_are_listed_as_missing(folder: Path, capsys: Output) -> None:
    blocks = FolderStore(folder / "runs" / "store")
    absent = CID.of(b"elsewhere")
    record = dag.put_record(blocks, {"link": absent})
    blocks.flush()
    assert out(capsys, "store", "ls", str(record)) == f"{absent}  not in this store\n"


def test_gc_keeps_what_is_pinned(folder: Path, capsys: Output) -> None:
    (folder / "b.txt").write_bytes(b"other")
    kept, lost = out(capsys, "store", "add", "a.txt", "b.txt").splitlines()
    out(capsys, "store", "unpin", lost.split()[0])
    assert out(capsys, "store", "gc").startswith("removed 0 blocks")
    assert out(capsys, "store", "gc", "--grace", "0") == "removed 1 blocks (5 B)\n"
    assert out(capsys, "store", "ls").split()[0] == kept.split()[0]
    out(capsys, "store", "pin", kept.split()[0], "--name", "again")
    assert out(capsys, "store", "ls", "--pins").split()[3] == "again"
    assert "is not pinned" in refused(capsys, "store", "unpin", lost.split()[0])


def test_a_pin_has_names_that_go_one_by_one(folder: Path, capsys: Output) -> None:
    name = out(capsys, "store", "add", "a.txt").strip()
    out(capsys, "store", "pin", name, "--name", "run 2")
    assert out(capsys, "store", "ls", "--pins") == f"{name}  a.txt\n{name}  run 2\n"
    assert json.loads(out(capsys, "store", "ls", "--pins", "--json")) == [
        {"cid": name, "name": "a.txt"},
        {"cid": name, "name": "run 2"},
    ]
    assert "as 'run 1'" in refused(capsys, "store", "unpin", name, "--name", "run 1")
    out(capsys, "store", "unpin", name, "--name", "run 2")
    assert out(capsys, "store", "ls", "--pins") == f"{name}  a.txt\n"
    out(capsys, "store", "pin", name)
    out(capsys, "store", "unpin", name)
    assert out(capsys, "store", "ls", "--pins") == ""


def test_gc_names_missing_leaves_and_goes_on(folder: Path, capsys: Output) -> None:
    (folder / "big").write_bytes(os.urandom(unixfs.CHUNK + 1))
    name = out(capsys, "store", "add", "big").strip()
    loose = out(capsys, "store", "add", "a.txt").strip()
    out(capsys, "store", "unpin", loose)
    leaf = out(capsys, "store", "ls", name).split()[0]
    (block,) = (folder / "runs/store").rglob(f"blocks/*/{leaf}")
    block.unlink()
    assert main(["store", "gc", "--grace", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("removed 1 blocks")
    assert captured.err == f"{leaf} is missing below a pin: import or add it again\n"


def test_gc_removes_nothing_below_a_broken_pin(folder: Path, capsys: Output) -> None:
    (folder / "big").write_bytes(os.urandom(unixfs.CHUNK + 1))
    name = out(capsys, "store", "add", "big").strip()
    (root,) = (folder / "runs/store").rglob(f"blocks/*/{name}")
    root.unlink()
    err = refused(capsys, "store", "gc", "--grace", "0")
    assert "nothing was removed" in err
    assert name in err
    assert len(out(capsys, "store", "ls").splitlines()) == 2


def test_verify_names_a_flipped_bit(folder: Path, capsys: Output) -> None:
    name = out(capsys, "store", "add", "a.txt").strip()
    assert out(capsys, "store", "verify") == "1 blocks, all whole\n"
    (block,) = (
        p for p in (folder / "runs/store").rglob("*") if p.is_file() and TEXT in p.read_bytes()
    )
    block.chmod(0o644)
    block.write_bytes(b"T" + TEXT[1:])
    assert main(["store", "verify"]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{name}\n"
    assert "1 of 1 blocks" in captured.err
    err = refused(capsys, "store", "cat", name)
    assert err.startswith("fedipfs: ")
    assert name in err
    assert err.count("\n") == 1


def test_export_and_import(folder: Path, capsys: Output) -> None:
    data = os.urandom(unixfs.CHUNK + 1)
    (folder / "big").write_bytes(data)
    name = out(capsys, "store", "add", "big").strip()
    out(capsys, "store", "export", name, "big.car")
    assert "big.car exists" in refused(capsys, "store", "export", name, "big.car")
    before = (folder / "big.car").read_bytes()
    out(capsys, "store", "export", name, "big.car", "--force")
    assert (folder / "big.car").read_bytes() == before
    assert out(capsys, "store", "import", "big.car", "--store", "two") == f"{name}\n"
    assert out(capsys, "store", "ls", "--store", "two") == out(capsys, "store", "ls")
    assert name in out(capsys, "store", "ls", "--pins", "--store", "two")
    absent = str(CID.of(b"absent"))
    assert absent in refused(capsys, "store", "export", absent, "x.car")
    assert refused(capsys, "store", "export", name, "nowhere/x.car").startswith(
        "fedipfs: cannot use nowhere/x.car: No such file"
    )
    assert sorted(p.name for p in folder.iterdir() if ".car" in p.name) == ["big.car"]


def test_a_car_goes_through_a_pipe(folder: Path, capsys: Output) -> None:
    name = out(capsys, "store", "add", "a.txt").strip()
    fedipfs = [sys.executable, "-m", "fedipfs", "store"]
    sent = subprocess.run([*fedipfs, "export", name, "-"], capture_output=True, check=True)
    come = subprocess.run(
        [*fedipfs, "import", "-", "--store", "two"], input=sent.stdout, capture_output=True
    )
    assert (come.returncode, come.stdout.decode()) == (0, f"{name}\n")
    assert out(capsys, "store", "ls", "--pins", "--store", "two") == f"{name}  stdin\n"
    assert not (folder / "-").exists()


# ---- refusals


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["store", "cat", "bafkre"], "bafkre"),
        (["store", "cat"], "CID"),
        (["store", "ls", str(CID.of(b"")), "--pins"], "not both"),
        (["store", "gc", "--grace", "-1"], "-1"),
        (["store", "add", "absent"], "absent: No such file"),
        (["store", "add", "."], "Is a directory"),
        (["store", "cid", "absent"], "absent: No such file"),
        (["store", "import", "a.txt"], "CAR"),
        (["store", "import", "absent"], "absent: No such file"),
        (["store", "stat", "--store", "nowhere"], "nowhere"),
        (["store", "cat", str(CID.of(b"absent"))], "runs/store"),
        (["runs", "show", "absent"], "no run 'absent' in runs"),
        (["nothing"], "nothing"),
        (["completion", "csh"], "csh"),
    ],
)
def test_bad_input_is_one_clear_line(
    folder: Path, capsys: Output, argv: list[str], says: str
) -> None:
    err = refused(capsys, *argv)
    assert says in err
    assert "fedipfs" in err


def test_a_missing_store_is_not_made_by_looking(folder: Path, capsys: Output) -> None:
    for argv in (["stat"], ["ls"], ["verify"], ["gc"], ["cat", str(CID.of(b""))]):
        refused(capsys, "store", *argv)
    assert not (folder / "runs").exists()


def test_a_block_that_is_not_there_is_named(folder: Path, capsys: Output) -> None:
    out(capsys, "store", "add", "a.txt")
    absent = str(CID.of(b"absent"))
    for verb in ("cat", "ls", "pin"):
        assert absent in refused(capsys, "store", verb, absent)


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    blocks = FolderStore(folder / "runs" / "store", durable=False)
    name = dag.add(blocks, unixfs.chunk(os.urandom(8 * unixfs.CHUNK)))
    blocks.flush()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedipfs", "store", "cat", str(name)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141
    process.stderr.close()


# ---- runs


def make_run(folder: Path, name: str = "2026-digits") -> list[str]:
    """A finished run of two rounds in `folder`/runs; the CIDs of its records, the last first."""
    blocks = FolderStore(folder / "runs" / "store", durable=False)
    records = [dag.put_record(blocks, {"type": "fedipfs/run/v1", "model": CID.of(b"m")})]
    for number in (1, 2):
        record = {"type": "fedipfs/round/v1", "round": number, "parent": records[-1]}
        record |= {"run": records[0], "model_in": CID.of(b"m"), "model_out": CID.of(b"m")}
        records.append(dag.put_record(blocks, record))
    blocks.flush()
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        "experiment: digits\nstrategy: {name: fedavg}\nstore: {kind: folder, path: runs/store}\n"
    )
    lines = [
        {
            "round": number,
            "seconds": 0.5,
            "server": {"loss": 0.5, "accuracy": 0.9},
            "clients": {
                "selected": 3,
                "ok": 2,
                "failed": [{"client": "client-1", "reason": "ValueError: no"}],
            },
            "model_cid": "bafymodel",
            "record_cid": str(records[number]),
        }
        for number in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "head").write_text(f"{records[-1]}\n")
    summary = {"status": "finished", "dataset": "digits", "rounds_completed": 2}
    summary |= {"experiment": "digits", "metrics": {"accuracy": 0.9}, "seconds": {"total": 1.25}}
    (run / "summary.json").write_text(json.dumps(summary))
    return [str(record) for record in reversed(records)]


def test_runs_are_listed(folder: Path, capsys: Output) -> None:
    assert main(["runs", "ls"]) == 0
    assert capsys.readouterr().err == "no runs in runs\n"
    make_run(folder)
    broken = folder / "runs" / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text("{")
    table = out(capsys, "runs", "ls").splitlines()
    head, *rows = (" ".join(row.split()) for row in table)
    assert head == "RUN EXPERIMENT DATASET STRATEGY ROUNDS METRICS TIME STATUS"
    assert sorted(rows) == [
        "2026-digits digits digits fedavg 2 accuracy 0.9000 1.2 s finished",
        "broken ? ? ? 0 - 0.000 s unfinished",
    ]
    listed = json.loads(out(capsys, "runs", "ls", "--json", "--runs-dir", str(folder / "runs")))
    assert {run["run_id"] for run in listed} == {"2026-digits", "broken"}


def test_a_run_is_shown_with_its_chain_of_records(folder: Path, capsys: Output) -> None:
    chain = make_run(folder)
    text = out(capsys, "runs", "show", "2026")
    assert [line.split() for line in text.splitlines()[-4:]] == [
        ["round", "2", chain[0]],
        ["round", "1", chain[1]],
        ["start", chain[2]],
        ["not", "signed"],
    ]
    assert "round 2: client-1 failed: ValueError: no" in text
    assert "accuracy 0.9000" in text
    shown = json.loads(out(capsys, "runs", "show", "2026", "--json"))
    assert [entry["cid"] for entry in shown["records"]] == chain
    assert shown["records"][0]["record"]["parent"] == {"/": chain[1]}


def test_a_run_whose_store_is_gone_is_shown_all_the_same(folder: Path, capsys: Output) -> None:
    make_run(folder)
    (folder / "runs" / "store").rename(folder / "moved")
    text = out(capsys, "runs", "show", "2026-digits")
    assert "the chain cannot be followed further" in text
    assert "round 1" in out(capsys, "runs", "show", "2026-digits", "--store", "moved")
    (folder / "runs/2026-digits/head").write_text("not a CID")
    assert "the chain cannot be followed further" in out(capsys, "runs", "show", "2026-digits")


def test_an_error_class_decides_the_exit_code(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    out(capsys, "store", "add", "a.txt")

    def fail(*_: object) -> None:
        raise DagCborError("two\nlines")

    monkeypatch.setattr("fedipfs.store.dag.cat", fail)
    assert refused(capsys, "store", "cat", str(CID.of(TEXT))) == "fedipfs: two lines\n"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedipfs.store.dag.cat", stop)
    assert refused(capsys, "store", "cat", str(CID.of(TEXT)), code=130).strip() == ""
