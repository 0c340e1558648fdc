"""What stays pinned, what may go, and that no moment to be killed is a bad one."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from parties import blocks
from runs import QUICK, lines, play

from fedipfs.exchange import Vault
from fedipfs.ipld import CID
from fedipfs.server import parties, records
from fedipfs.server.best import Best
from fedipfs.server.folder import RunFolder
from fedipfs.server.keep import Keeper
from fedipfs.store import FolderStore, dag

SEALS = ["none", "all"]


def words(seal: str, *more: str) -> tuple[str, ...]:
    return (*QUICK, "clients.total=3", "keep.models=2", f"seal={seal}", "run_id=one", *more)


def store_of(runs_dir) -> FolderStore:
    return FolderStore(runs_dir / "store", durable=False)


def vault_of(runs_dir, run_id: str = "one") -> Vault:
    party = parties.reader(runs_dir / run_id)
    return Vault(store_of(runs_dir), party, "none" if party is None else "all")


def head_of(runs_dir, run_id: str = "one") -> CID:
    return CID.parse((runs_dir / run_id / "head").read_text().strip())


def best_of(folder) -> CID:
    """The model of the round with the best accuracy, the earliest of equals."""
    measured = [(line["server"]["accuracy"], line["model_cid"]) for line in lines(folder)]
    return CID.parse(max(measured, key=lambda pair: pair[0])[1])


def named(store: FolderStore, kind: str, run_id: str = "one") -> dict[str, set[CID]]:
    """By name, the roots pinned for `kind`; "" for the records."""
    found: dict[str, set[CID]] = {}
    for root, names in store.pins().items():
        for name in names:
            if name == (f"{run_id}/{kind}" if kind else run_id) or (
                kind and name.startswith(f"{run_id}/{kind}/")
            ):
                found.setdefault(name, set()).add(root)
    return found


def assert_kept(runs_dir, rounds: int, models: int, run_id: str = "one") -> None:
    """The pins are exactly those that were promised, and all that they lead to is there."""
    store, folder = store_of(runs_dir), runs_dir / run_id
    vault, head = vault_of(runs_dir, run_id), head_of(runs_dir, run_id)
    told = lines(folder)
    assert [line["round"] for line in told] == list(range(1, rounds + 1))
    chain = {cid for cid, _ in records.chain(vault, head)}
    assert len(chain) == rounds + 1
    assert named(store, "", run_id) == {run_id: chain}
    assert named(store, "model", run_id) == {
        f"{run_id}/model/{line['round']}": {CID.parse(line["model_cid"])} for line in told[-models:]
    }
    assert named(store, "best", run_id) == {f"{run_id}/best": {best_of(folder)}}
    assert named(store, "start", run_id) == {}
    ((state, (hold,)),) = [
        (name, tuple(roots)) for name, roots in named(store, "state", run_id).items()
    ]
    assert int(state.rpartition("/")[2]) <= rounds
    assert records.get(vault, head)["strategy"] in set(dag.walk(store, hold))
    sealed = [cid for cid in chain if "details" in dag.get_record(store, cid)]
    assert len(named(store, "details", run_id)) == len(sealed) in (0, rounds)
    mine = [
        name
        for names in store.pins().values()
        for name in names
        if name == run_id or name.startswith(f"{run_id}/")
    ]
    assert len(mine) == len(chain) + min(models, rounds) + 2 + len(sealed)


@pytest.mark.parametrize("seal", SEALS)
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_after_a_run_exactly_what_was_promised_is_pinned(tmp_path, seal, strategy):
    summary = play(tmp_path, *words(seal, "rounds=4", f"strategy={strategy}"))
    assert_kept(tmp_path, rounds=4, models=2)
    assert summary["best_model_cid"] == str(best_of(tmp_path / "one"))
    store = store_of(tmp_path)
    before = set(blocks(store))
    report = store.gc(0)
    assert report.complete and report.missing == []
    assert report.removed > 0
    gone = before - set(blocks(store))
    vault = vault_of(tmp_path)
    for _, record in records.chain(vault, head_of(tmp_path)):
        for update in record.get("updates", ()):
            assert not store.has(update["cid"]) and update["cid"] in gone
    kept = {line["model_cid"] for line in lines(tmp_path / "one")[-2:]}
    for text in kept | {summary["best_model_cid"], summary["final_model_cid"]}:
        assert vault.weights(CID.parse(text)).tensors()


@pytest.mark.parametrize("seal", SEALS)
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_a_run_goes_on_after_everything_else_was_collected(tmp_path, seal, strategy):
    wanted = play(tmp_path / "whole", *words(seal, "rounds=5", f"strategy={strategy}"))
    for rounds in (2, 3, 5):
        play(
            tmp_path,
            *words(seal, f"rounds={rounds}", f"strategy={strategy}"),
            resume=rounds > 2,
        )
        assert_kept(tmp_path, rounds=rounds, models=2)
        report = store_of(tmp_path).gc(0)
        assert report.missing == []
    ours, theirs = (
        folder / "one" / "model.safetensors" for folder in (tmp_path, tmp_path / "whole")
    )
    assert ours.read_bytes() == theirs.read_bytes()
    if seal == "none":
        assert str(head_of(tmp_path)) == wanted["head_cid"]


@pytest.mark.parametrize("seal", SEALS)
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_everything_is_kept_for_audit(tmp_path, seal, strategy):
    def play_until(rounds: int, **options) -> None:
        more = ("keep.everything=true", f"rounds={rounds}", f"strategy={strategy}")
        play(tmp_path, *words(seal, *more), **options)

    play_until(2)
    store = store_of(tmp_path)
    assert store.gc(0).missing == []
    play_until(3, resume=True)
    assert store.gc(0).missing == []
    head = head_of(tmp_path)
    assert store.pins() == {head: ("one",)}
    reached = set(dag.walk(store, head))
    assert all(store.has(cid) for cid in reached)
    assert reached == set(blocks(store))
    vault, models = vault_of(tmp_path), {line["model_cid"] for line in lines(tmp_path / "one")}
    seen = set()
    for _, record in records.chain(vault, head):
        seen |= {str(record[key]) for key in ("model_out",) if key in record}
        for update in record.get("updates", ()):
            assert vault.weights(update["cid"]).tensors()
        assert vault.get_record(record["config"])["seed"] == 1
    assert seen == models


def test_two_equal_runs_do_not_take_each_others_models(tmp_path):
    base = (*QUICK, "clients.total=3", "keep.models=1")
    one = play(tmp_path, *base, "run_id=one")
    two = play(tmp_path, *base, "run_id=two", "rounds=4")
    store = store_of(tmp_path)
    assert_kept(tmp_path, rounds=2, models=1)
    assert_kept(tmp_path, rounds=4, models=1, run_id="two")
    for root, names in store.pins().items():  # the second is given up
        for name in names:
            if name == "two" or name.startswith("two/"):
                store.unpin(root, name)
    store.gc(0)
    assert_kept(tmp_path, rounds=2, models=1)
    assert Vault(store).weights(CID.parse(one["final_model_cid"])).tensors()
    assert not store.has(CID.parse(two["head_cid"]))
    play(tmp_path, *base, "run_id=one", "rounds=3", resume=True)


def test_names_that_begin_alike_belong_to_different_runs(tmp_path):
    base = (*QUICK, "clients.total=2", "keep.models=1")
    play(tmp_path, *base, "run_id=a")
    play(tmp_path, *base, "run_id=a-b")
    play(tmp_path, *base, "run_id=a", "rounds=4", resume=True)
    assert_kept(tmp_path, rounds=2, models=1, run_id="a-b")
    assert_kept(tmp_path, rounds=4, models=1, run_id="a")


def test_without_a_measure_there_is_no_best_model(tmp_path):
    summary = play(tmp_path, *words("none", "evaluate.server=false"))
    assert summary["best_model_cid"] is None
    assert named(store_of(tmp_path), "best") == {}


def test_of_a_loss_less_is_better(store):
    models = [dag.put_record(store, number) for number in range(4)]
    for metric, direction, best in (("regret", "min", 2), ("accuracy", "max", 1)):
        kept = Best(metric, direction)
        keeper = Keeper(store, metric, models=1, everything=False, best=kept)
        keeper.begin(models[0])
        for number, value in enumerate([0.5, 0.9, 0.1, float("nan")], 1):
            record = dag.put_record(store, {"round": number, "of": metric})
            line = {"round": number, "server": {metric: value}}
            keeper.pin(line, record, None, models[number - 1], [])
            keeper.release()
        assert keeper.best == models[best]
        assert kept.so_far.round == best + 1
        assert named(store, "best", metric) == {f"{metric}/best": {models[best]}}


# ---- killed in the middle


class Killed(BaseException):
    """The process ends here: nothing after this moment is done."""


class Fuse:
    """Ends the process at the n-th of the steps that make a round count."""

    def __init__(self, monkeypatch) -> None:
        self.left: int | None = None
        for owner, name in [
            *((FolderStore, name) for name in ("pin", "flush", "unpin")),
            (RunFolder, "append"),
            (RunFolder, "write"),
            (Keeper, "release"),
        ]:
            self._wrap(monkeypatch, owner, name)

    def _wrap(self, monkeypatch, owner, name) -> None:
        real = getattr(owner, name)

        def step(*args, **options):
            if self.left is not None and "report.html" not in args:  # by then the round counts
                self.left -= 1
                if self.left < 0:
                    raise Killed
            return real(*args, **options)

        monkeypatch.setattr(owner, name, step)


def killed_at_each_step(fuse: Fuse, begun: Path, *words: str) -> Iterator[Path]:
    """Copies of `begun` in which going on was ended at the first step, at the second, and so on."""
    for step in itertools.count():
        here = begun.parent / f"at-{step}"
        shutil.copytree(begun, here)
        fuse.left = step
        try:
            play(here, *words, resume=True)
            return
        except Killed:
            fuse.left = None
        yield here
        shutil.rmtree(here)


@pytest.mark.parametrize("seal", [pytest.param("none", marks=pytest.mark.slow), "all"])
def test_killed_at_any_step_of_a_commit_nothing_is_lost(tmp_path, monkeypatch, seal):
    """All that is not pinned is collected at once; then the run goes on to the same model."""
    base = words(seal, "keep.models=1", "strategy=fedadam")
    play(tmp_path / "whole", *base, "rounds=3")
    wanted = (tmp_path / "whole" / "one" / "model.safetensors").read_bytes()
    play(tmp_path / "begun", *base, "rounds=2")
    steps, fuse = 0, Fuse(monkeypatch)
    for here in killed_at_each_step(fuse, tmp_path / "begun", *base, "rounds=3"):
        steps += 1
        assert store_of(here).gc(0).missing == []
        play(here, *base, "rounds=3", resume=True)
        assert (here / "one" / "model.safetensors").read_bytes() == wanted
        assert_kept(here, rounds=3, models=1)
    assert steps > 10


@pytest.mark.parametrize("seal", [pytest.param("none", marks=pytest.mark.slow), "all"])
def test_killed_in_the_first_round_it_begins_anew(tmp_path, monkeypatch, seal):
    base = words(seal, "keep.models=1")
    fuse = Fuse(monkeypatch)
    for step in (3, 4, 6, 8):
        here = tmp_path / str(step)
        fuse.left = step
        with pytest.raises(Killed):
            play(here, *base)
        fuse.left = None
        if not (here / "one" / "config.yaml").exists():
            continue
        store_of(here).gc(0)
        assert play(here, *base, resume=True)["rounds_completed"] == 2
        chain = {cid for cid, _ in records.chain(vault_of(here), head_of(here))}
        assert chain <= named(store_of(here), "")["one"]


@pytest.mark.slow
def test_an_interrupted_audit_keeps_the_last_round_whole(tmp_path, monkeypatch):
    base = words("all", "keep.everything=true", "strategy=fedadam")
    play(tmp_path / "begun", *base)
    steps, fuse = 0, Fuse(monkeypatch)
    for here in killed_at_each_step(fuse, tmp_path / "begun", *base, "rounds=3"):
        steps += 1
        assert store_of(here).gc(0).missing == []
        play(here, *base, "rounds=4", resume=True)
        assert store_of(here).pins() == {head_of(here): ("one",)}
        assert store_of(here).gc(0).missing == []
    assert steps > 5


def test_a_lost_line_costs_no_record(tmp_path):
    play(tmp_path, *words("all", "rounds=4"))
    (tmp_path / "one" / "metrics.jsonl").write_text("")
    play(tmp_path, *words("all", "rounds=5"), resume=True)
    store_of(tmp_path).gc(0)
    vault = vault_of(tmp_path)
    chain = [record.get("round") for _, record in records.chain(vault, head_of(tmp_path))]
    assert chain == [5, 4, 3, 2, 1, None]
