"""Training over several processes: equal to one, and nothing is left of it however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import ledgered
import numpy as np
import psutil
import pytest
import torch
from divided import DATA, Divided
from sites import Sites

from fedipfs.clients import ranks, scratch, trainer
from fedipfs.clients.parallel import Recipe, train_parallel, trainer_for
from fedipfs.clients.trainer import Private
from fedipfs.errors import ConfigError, DataError, ParallelFailed

TARGET, ALLOWED = "divided:Divided", ("divided",)
SGD = {"name": "SGD", "lr": 0.1}
ALL = {
    "epochs": 2,
    "batch_size": 7,  # the last of 50 examples is alone, and one of two ranks has none
    "clip_norm": 0.5,
    "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "schedule": {"name": "StepLR", "step_size": 2},
}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Where jobs have their folders."""
    place = tmp_path / "memory"
    place.mkdir()
    monkeypatch.setattr(scratch, "MEMORY", place)
    return place


@pytest.fixture
def mark(monkeypatch):
    """A name in the environment of all that is started."""
    name = f"MARK_{uuid.uuid4().hex}"
    monkeypatch.setenv(name, "1")
    return name


def alive(mark: str) -> list[psutil.Process]:
    """Processes with that mark, besides this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and mark in process.environ():
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def config(**changed):
    return {
        "batch_size": 8,
        "epochs": 1,
        "steps": None,
        "optimizer": SGD,
        "schedule": None,
        "clip_norm": None,
        "device": "cpu",
        **changed,
    }


def several(model, kind="ddp", *, options=None, processes=2, timeout_s=120.0, x=None, **given):
    given = {"config": config(), "seed": 3, "server_round": 3, **given}
    return train_parallel(
        TARGET,
        json.dumps(options or {}),
        ALLOWED,
        model,
        DATA.inputs if x is None else x,
        DATA.targets,
        trainer=kind,
        processes=processes,
        timeout_s=timeout_s,
        **given,
    )


def check_equal(kind, *, options=None, processes=2, mu=0.0, corrected=False, frozen=False, **train):
    """One process and several make the same model of the same."""
    task = Divided(**(options or {}))
    one, other = task.model(), task.model()
    start = {name: each.clone() for name, each in one.state_dict().items()}
    for model in (one, other):
        model.first.requires_grad_(not frozen)
    draw = torch.Generator().manual_seed(5)
    terms = {
        name: torch.randn(each.shape, generator=draw) / 50 for name, each in one.named_parameters()
    }
    given = {
        "config": config(**train),
        "seed": 3,
        "server_round": 3,
        "proximal_mu": mu,
        "correction": terms if corrected else None,
    }
    expected = trainer.train(task, one, DATA.inputs, DATA.targets, **given)
    got = several(other, kind, options=options, processes=processes, **given)
    for name, each in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], each, rtol=1e-5, atol=2e-6)
    moved = {name for name, each in one.state_dict().items() if not torch.equal(each, start[name])}
    assert {"last.weight", "last.bias", "again.weight"} <= moved
    assert ("first.weight" not in moved) == frozen
    assert got == {**expected, "train_loss": pytest.approx(expected["train_loss"], rel=1e-5)}
    assert type(got["num-examples"]) is int and type(got["steps"]) is int
    return other


# ---- the same as one process


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_make_what_one_makes_of_all_that_a_step_has(kind, folders, mark):
    model = check_equal(kind, mu=0.3, corrected=True, **ALL)
    assert all(each.grad is None and each.is_leaf for each in model.parameters())
    assert model.again.weight is model.first_tied
    assert list(folders.iterdir()) == [] and alive(mark) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "NAdam", "Rprop"])
def test_whatever_the_optimizer(kind, name):
    check_equal(kind, optimizer={"name": name, "lr": 0.01}, clip_norm=0.2, frozen=name == "Adam")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_batches_smaller_than_the_number_of_ranks(kind):
    check_equal(kind, processes=3, batch_size=2, steps=30)


@pytest.mark.slow
def test_fsdp_gathers_large_layers_by_themselves():
    options = {"large": True}
    check_equal("fsdp", options=options, clip_norm=1.0, optimizer={"name": "SGD", "lr": 0.01})


def test_what_fsdp_gathers_at_a_time():
    model = Divided(large=True).model()
    (second, first) = [*ranks.units(model)][2:]  # the blocks; their large layers come before
    assert (first, second) == tuple(model.blocks)
    assert [*ranks.units(model)][:2] == [model.blocks[1][1], model.blocks[0][1]]
    model.blocks[1][1].weight = model.blocks[0][1].weight  # tied: with the rest
    assert [*ranks.units(model)] == []
    assert [*ranks.units(Divided().model())] == []


@pytest.mark.slow
def test_one_process_draws_what_one_process_draws():
    check_equal("ddp", processes=1, options={"dropout": 0.5})


@pytest.mark.slow
def test_a_site_trains_so_if_its_own_configuration_says_so(tmp_path, store):
    node = {"trainer": "ddp", "trainer-processes": 2, "trainer-timeout": 120}
    updates = []
    for own in ({}, node):
        sites = Sites(tmp_path, store, node=own)
        reply = sites.send("alpha", "train", sites.ask, sites.model)
        assert not reply.has_error(), reply.error.reason
        updates.append({n: a.numpy() for n, a in reply.content["arrays"].items()})
        metrics = dict(reply.content["metrics"])
        assert metrics["steps"] == 2
    one, two = updates
    assert list(one) == list(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)
    assert any(not np.array_equal(one[name], sites.model[name].numpy()) for name in one)


# ---- how it fails


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ("killed", ParallelFailed, r"ddp: rank 1 died of SIGKILL, perhaps for want of memory"),
        ("no way", ParallelFailed, r"ddp: rank 1 failed \(ValueError: no way and a second line\)"),
        ("data", DataError, "^row 7 is no number$"),
    ],
)
def test_what_goes_wrong_at_a_rank_is_one_line(wrong, error, says, folders, mark):
    model = Divided().model()
    with pytest.raises(error, match=says) as caught:
        several(model, options={"wrong": wrong})
    assert "\n" not in str(caught.value)
    assert list(folders.iterdir()) == [] and alive(mark) == []
    assert all(
        map(torch.equal, model.state_dict().values(), Divided().model().state_dict().values())
    )


@pytest.mark.slow
def test_what_takes_too_long_is_ended(folders, mark):
    for wrong, seconds in ("stuck", 12), ("", 0.5):  # in its work; while it starts
        began = time.monotonic()
        with pytest.raises(ParallelFailed, match=rf"longer than client\.timeout_s={seconds} s"):
            several(Divided().model(), "fsdp", options={"wrong": wrong}, timeout_s=seconds)
        assert time.monotonic() - began < seconds + 10
        assert list(folders.iterdir()) == [] and alive(mark) == []


@pytest.mark.slow
def test_ranks_have_no_secrets(monkeypatch):
    for name in ("FEDIPFS_PASSPHRASE", "FEDIPFS_IDENTITY", "FEDIPFS_HUB_TOKEN", "FEDIPFS_DATA"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(ParallelFailed, match="ValueError: ") as caught:
        several(Divided().model(), options={"wrong": "environment"})
    told = str(caught.value).partition("ValueError: ")[2].rstrip(")").split()
    assert set(told) == {"FEDIPFS_DATA", "FEDIPFS_PARENT"}


@pytest.mark.slow
def test_ranks_import_nothing_from_the_working_folder(tmp_path, monkeypatch):
    for name in ("torch", "json", "divided"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    model = Divided().model()
    before = model.last.weight.clone()
    several(model)
    assert not torch.equal(model.last.weight, before)


SCRIPT = """
import sys
from pathlib import Path
from fedipfs.clients import scratch
from test_parallel import Divided, several
scratch.MEMORY = Path(sys.argv[1])
several(Divided().model(), options={"wrong": "stuck"})
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the death of a parent is told on Linux only")
def test_a_parent_that_is_killed_takes_all_along_and_meanwhile_nobody_else_can_look(folders, mark):
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folders)], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        wait_for(lambda: len(alive(mark)) == 4)  # with the one that asked, and torchrun

        def talking():
            return [
                connection.laddr.ip
                for each in alive(mark)
                for connection in each.net_connections("inet")
            ]

        assert set(wait_for(talking)) == {"127.0.0.1"}
        (folder,) = folders.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = {each.name for each in folder.iterdir() if each.is_file()}
        assert {"job.json", "model.safetensors", "inputs.npy", "targets.npy"} <= files
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not alive(mark) and not [*folders.iterdir()])


@pytest.mark.slow
def test_what_was_left_by_the_dead_is_removed_and_memory_need_not_have_room(
    tmp_path, folders, monkeypatch
):
    left, locked, young = (
        folders / f"fedipfs-train-{name}" for name in ("left", "locked", "young")
    )
    for each in (left, locked, young):
        each.mkdir()
    for each in (left, locked):
        os.utime(each, (0, 0))
    handle = os.open(locked, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    monkeypatch.setattr(scratch, "SPARE", 1 << 60)
    with pytest.raises(ParallelFailed, match="rank 0 failed"):
        several(Divided().model(), options={"wrong": "always"}, processes=1)
    os.close(handle)
    assert sorted(folders.iterdir()) == [locked, young]
    assert list(disk.glob("fedipfs-*")) == []


# ---- what is refused, before anything starts


@pytest.mark.parametrize(
    ("kind", "options", "given", "says"),
    [
        ("ddp", {"norm": True}, {}, r"layer normed \(BatchNorm1d\) needs it whole; .* GroupNorm"),
        ("fsdp", {"norm": True}, {}, r"client\.trainer=fsdp .* layer normed \(BatchNorm1d\)"),
        ("ddp", {}, {"processes": 0}, r"client\.processes=null .* client\.device=cuda"),
        ("fsdp", {}, {"config": config(optimizer={"name": "Adafactor"})}, "Adafactor .*=ddp"),
        ("ddp", {}, {"private": Private(None, 1, 50, None, "hooks", 8)}, "client.trainer=one"),
        ("ddp", {}, {"config": config(batch_size=0)}, r"train\.batch_size=0"),
        ("ddp", {}, {"config": config(optimizer={"name": "Adan"})}, r"name=Adan"),
        ("fsdp", {}, {"config": config(clip_norm=-1)}, r"train\.clip_norm=-1"),
        ("ddp", {}, {"config": config(device="tpu")}, r"train\.device=tpu"),
    ],
)
def test_what_cannot_be_divided_is_refused_at_once(kind, options, given, says, mark):
    with pytest.raises(ConfigError, match=says) as caught:
        several(Divided(**options).model(), kind, **given)
    assert "\n" not in str(caught.value)
    assert alive(mark) == []


def test_a_single_number_cannot_be_sharded():
    model = Divided().model()
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="cannot divide scale"):
        several(model, "fsdp")


def test_examples_that_are_no_numbers(folders):
    with pytest.raises(DataError, match="dtype object cannot be handed to other processes"):
        several(Divided().model(), x=np.array([None] * 50))
    assert list(folders.iterdir()) == []


def test_no_examples_is_refused():
    with pytest.raises(DataError, match="no training examples"):
        train_parallel(
            TARGET,
            "{}",
            ALLOWED,
            Divided().model(),
            DATA.inputs[:0],
            DATA.targets[:0],
            trainer="ddp",
            processes=2,
            timeout_s=60,
            config=config(),
            seed=3,
            server_round=1,
        )


def test_the_sites_choice_of_a_trainer():
    recipe = Recipe(TARGET, "{}", ALLOWED)
    assert trainer_for({}, recipe, private=True) is None
    assert trainer_for({"trainer": "one"}, recipe, private=True) is None
    with pytest.raises(ConfigError, match=r"client\.trainer=dpp is unknown"):
        trainer_for({"trainer": "dpp"}, recipe, private=False)
    assert trainer_for({"trainer": "fsdp"}, recipe, private=False) is not None


def test_dp_sgd_is_refused_before_anything_is_paid(store, tmp_path):
    sites = ledgered.Sites(store, tmp_path)
    sites.raw.contexts[2].node_config |= {"trainer": "ddp", "trainer-processes": 2}
    assert sites.refusal("train") == (
        "ConfigError: client.trainer=ddp cannot train with DP-SGD, which privacy asks for; set "
        "client.trainer=one"
    )
    assert sites.ledger().spends == []
    assert not sites.say("train", answer="gradient").has_error()  # is made by one process
