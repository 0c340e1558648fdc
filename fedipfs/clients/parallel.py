"""Local training over several processes, one a GPU: `client.trainer=ddp` or `fsdp`.

A job has a folder: the weights and what is to be added to gradients as safetensors, the examples
as .npy files that all ranks map into memory, the rest as JSON. torchrun starts the ranks (see
ranks.py), and rank 0 leaves the trained weights there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedipfs import errors
from fedipfs.clients import scratch, torchrun
from fedipfs.clients.trainer import Private, make_optimizer, plan
from fedipfs.data.base import Labels
from fedipfs.errors import ConfigError, DataError, FedIPFSError, ParallelFailed, one_line
from fedipfs.tasks.evaluation import find_device

TRAINERS = ("one", "ddp", "fsdp")
JOB, MODEL, CORRECTION, RESULT = "job.json", "model.safetensors", "correction.safetensors", "result"
_MAIN = "fedipfs.clients.parallel_main"
# What has every element of a weight to itself, so that a rank can work on its part alone.
_BY_ELEMENT = {"adadelta", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam"}
_BY_ELEMENT |= {"rmsprop", "rprop", "sgd"}
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DEADLY = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)  # others fail for it, too

log = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """How another process makes a task: as tasks.load is called, options as JSON."""

    target: str
    options: str
    allowed: Sequence[str]


def trainer_for(
    node_config: Mapping[str, Any], recipe: Recipe, *, private: bool
) -> Callable[..., dict[str, float]] | None:
    """What trains at this site in the place of trainer.train, and as that is called, if it asks so.

    The node's configuration says `trainer` (one, ddp, fsdp), `trainer-processes` (0: one a GPU)
    and `trainer-timeout`, in seconds. ConfigError if it cannot be right: also where records are to
    be `private`, as DP-SGD is made by one process.
    """
    kind = str(node_config.get("trainer") or "one")
    if kind not in TRAINERS:
        raise ConfigError(f"client.trainer={kind} is unknown; choose one, ddp or fsdp")
    if kind == "one":
        return None
    if private:
        _refuse_private(kind)

    def parallel(task: Any, *arguments: Any, **options: Any) -> dict[str, float]:
        return train_parallel(
            *recipe,
            *arguments,
            trainer=kind,
            processes=int(node_config.get("trainer-processes") or 0),
            timeout_s=float(node_config.get("trainer-timeout") or 600),
            **options,
        )

    return parallel


def train_parallel(
    target: str,
    options: str,
    allowed: Sequence[str],
    model: nn.Module,
    inputs: NDArray[Any],
    targets: Labels,
    *,
    trainer: str,
    processes: int,
    timeout_s: float,
    config: Mapping[str, Any],
    seed: int,
    server_round: int,
    proximal_mu: float = 0.0,
    correction: Mapping[str, Tensor] | None = None,
    private: Private | None = None,
) -> dict[str, float]:
    """Train `model` in place over `processes` processes (0: one a GPU); otherwise as trainer.train.

    The batches are those of one process, each divided among the ranks, and a step is made with
    the mean gradient over the whole batch: weights and metrics are those of trainer.train up to
    the order of sums, if the task's loss is the mean over examples and nothing is drawn in the
    model (dropout differs from rank to rank). `ddp`: every rank holds the whole model (Li et al.
    2020, "PyTorch Distributed"); `fsdp`: a share of it (Zhao et al. 2023, "PyTorch FSDP").

    Raises what trainer.train raises, ConfigError for what cannot be divided, and ParallelFailed
    where a rank fails, dies, or `timeout_s` passes.
    """
    if private is not None:
        _refuse_private(trainer)
    plan(config, targets)
    make_optimizer(model.parameters(), config, server_round=server_round)
    place = find_device(config.get("device", "cpu"))
    processes = _processes(processes, place)
    _check(trainer, model, config)
    threads = max(1, torch.get_num_threads() // processes)
    job = {
        "target": target,
        "options": options,
        "allowed": list(allowed),
        "trainer": trainer,
        "trained": [name for name, each in model.named_parameters() if each.requires_grad],
        "config": {**config, "device": place.type},
        "seed": seed,
        "server_round": server_round,
        "proximal_mu": proximal_mu,
        "timeout_s": timeout_s,
        "threads": threads,
    }
    state, terms = apart(model.state_dict()), apart(correction or {})
    size = inputs.nbytes + targets.nbytes + 2 * _bytes(state) + _bytes(terms)
    with scratch.folder(size) as folder:
        _write_arrays(folder, inputs, targets)
        safetensors.torch.save_file(state, folder / MODEL)
        if correction is not None:
            safetensors.torch.save_file(terms, folder / CORRECTION)
        (folder / JOB).write_text(json.dumps(job))
        try:
            code = torchrun.run(
                folder,
                _MAIN,
                processes=processes,
                threads=threads,
                timeout_s=timeout_s,
            )
        except TimeoutError:
            raise ParallelFailed(
                f"client.trainer={trainer} took longer than client.timeout_s={timeout_s:g} s; "
                "allow more, or train with more processes"
            ) from None
        if code:
            raise _failure(folder, trainer, code)
        metrics: dict[str, float] = json.loads((folder / f"{RESULT}.json").read_text())
        model.load_state_dict(safetensors.torch.load_file(folder / f"{RESULT}.safetensors"))
    model.train()
    return metrics


def _refuse_private(trainer: str) -> None:
    raise ConfigError(
        f"client.trainer={trainer} cannot train with DP-SGD, which privacy asks for; set "
        "client.trainer=one"
    )


def _processes(asked: int, place: torch.device) -> int:
    if place.type == "cuda":
        there = torch.cuda.device_count()
        if asked > there:
            raise ConfigError(f"client.processes={asked}, but this machine has {there} GPUs")
        return asked or there
    if asked < 1:
        raise ConfigError(
            "client.processes=null is one process a GPU, and none is used here; say how many, "
            "or set client.device=cuda"
        )
    return asked


def _check(trainer: str, model: nn.Module, config: Mapping[str, Any]) -> None:
    """ConfigError if the model or its optimizer cannot be divided among processes."""
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORM) or getattr(module, "track_running_stats", False):
            kind = type(module).__name__
            raise ConfigError(
                f"client.trainer={trainer} divides each batch, and layer {name} ({kind}) needs it "
                "whole; use a task with GroupNorm in its place, or client.trainer=one"
            )
    if trainer != "fsdp":
        return
    optimizer = str(config["optimizer"]["name"])
    if optimizer.lower() not in _BY_ELEMENT:
        raise ConfigError(
            f"client.trainer=fsdp divides each weight, and train.optimizer.name={optimizer} needs "
            "it whole; use client.trainer=ddp"
        )
    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            raise ConfigError(
                f"client.trainer=fsdp cannot divide {name}, a single number; use client.trainer=ddp"
            )


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each by itself in memory, as safetensors wants it: tied weights twice."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.detach().cpu().contiguous()
        if place in seen:
            apart[name] = apart[name].clone()
        seen.add(place)
    return apart


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(each.nbytes for each in tensors.values())


def _write_arrays(folder: Path, inputs: NDArray[Any], targets: Labels) -> None:
    try:
        np.save(folder / "inputs.npy", inputs, allow_pickle=False)
        np.save(folder / "targets.npy", targets, allow_pickle=False)
    except ValueError:
        raise DataError(
            f"inputs of dtype {inputs.dtype} cannot be handed to other processes; give numbers, "
            "or set client.trainer=one"
        ) from None


def _failure(folder: Path, trainer: str, code: int) -> FedIPFSError:
    """Why there is no result: of several ranks' reasons the first, as the others follow from it."""
    printed = (folder / torchrun.LOG).read_text(errors="replace")[-(1 << 14) :]
    log.debug("client.trainer=%s failed:\n%s", trainer, printed)
    codes: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        codes = json.loads((folder / torchrun.FAILED).read_text())
    for rank, ended in codes.items():
        if ended in _DEADLY:
            name = signal.Signals(-ended).name
            hint = ", perhaps for want of memory" if ended == -signal.SIGKILL else ""
            return ParallelFailed(f"client.trainer={trainer}: rank {rank} died of {name}{hint}")
    said = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    if said:
        first = min(said, key=lambda each: each["when"])
        kind = getattr(errors, first["kind"], None)
        if isinstance(kind, type) and issubclass(kind, errors.UserError):
            return kind(first["text"])
        return ParallelFailed(
            f"client.trainer={trainer}: rank {first['rank']} failed "
            f"({first['kind']}: {one_line(first['text'], 300)})"
        )
    last = one_line(printed.strip().rpartition("\n")[2], 200)
    return ParallelFailed(f"client.trainer={trainer}: torchrun ended with {code} ({last})")
