"""What each rank of a parallel training does; see parallel.py."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fedipfs import tasks
from fedipfs.clients import parallel
from fedipfs.clients.trainer import (
    Losses,
    descend,
    make_optimizer,
    plan,
    seed_everything,
    shuffled,
)
from fedipfs.data.base import Labels
from fedipfs.tasks import Task

_UNIT = 1 << 20  # parameters: layers of as many are gathered by themselves


class Whole:
    """DDP: each rank has the whole model, and gradients are averaged as they come up."""

    def __init__(self, model: nn.Module, place: torch.device) -> None:
        devices = [place] if place.type == "cuda" else None
        # Parameters that have no gradient keep none, as in one process.
        self.forward = DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=True
        )
        self.trained = [each for each in model.parameters() if each.requires_grad]
        self.clip = torch.nn.utils.clip_grad_norm_

    def clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def collect(self) -> None:
        """DDP has put the gradients where they belong."""

    def terms(self, correction: Sequence[Tensor]) -> list[Tensor]:
        return list(correction)


class Sharded:
    """FSDP: each rank has a share of every weight, and only its optimizer works on it.

    `trained` are plain tensors, views of this rank's shares: optimizers that treat each element by
    itself need not know that there is more.
    """

    def __init__(self, model: nn.Module, place: torch.device) -> None:
        self._mesh = init_device_mesh(place.type, (dist.get_world_size(),))
        for unit in units(model):
            fully_shard(unit, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        self.forward = model
        self._place = place
        # Parameters that are DTensors.
        self._shards: list[Any] = [each for each in model.parameters() if each.requires_grad]
        self.trained = [nn.Parameter(_local(each)) for each in self._shards]

    def clear(self) -> None:
        for parameter in self._shards:  # before the forward pass puts whole ones in their place
            parameter.grad = None

    def collect(self) -> None:
        for mine, shard in zip(self.trained, self._shards, strict=True):
            mine.grad = None if shard.grad is None else _local(shard.grad)

    def clip(self, trained: Sequence[Tensor], clip_norm: float) -> None:
        """As torch.nn.utils.clip_grad_norm_, over all ranks' shares."""
        gradients = [each.grad for each in trained if each.grad is not None]
        norms = [torch.linalg.vector_norm(each).to(self._place) for each in gradients]
        square = torch.stack([torch.zeros((), device=self._place), *norms]).square().sum()
        dist.all_reduce(square)
        share = (clip_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for each in gradients:
            each.mul_(share)

    def terms(self, correction: Sequence[Tensor]) -> list[Tensor]:
        return [
            _local(distribute_tensor(term, self._mesh, shard.placements))
            for term, shard in zip(correction, self._shards, strict=True)
        ]


def units(model: nn.Module) -> Iterator[nn.Module]:
    """What FSDP gathers at a time, inner ones first: large layers of lists and sequences.

    The rest is gathered together, and so are weights that are used in several places.
    """
    uses: dict[nn.Parameter, int] = {}
    for _, each in model.named_parameters(remove_duplicate=False):
        uses[each] = uses.get(each, 0) + 1
    containers = (nn.ModuleList, nn.Sequential)
    found = [
        layer
        for module in model.modules()
        if isinstance(module, containers)
        for layer in module
        if not isinstance(layer, nn.ModuleList | nn.ModuleDict)
        and sum(each.numel() for each in layer.parameters()) >= _UNIT
        and all(uses[each] == 1 for each in layer.parameters())
    ]
    return reversed(list(dict.fromkeys(found)))


class Shares:
    """Fills gradients with this rank's share of one batch after another."""

    def __init__(
        self,
        task: Task,
        form: Whole | Sharded,
        inputs: NDArray[Any],
        targets: Labels,
        batches: Iterator[Tensor],
        place: torch.device,
    ) -> None:
        self._task, self._form, self._place = task, form, place
        self._inputs, self._targets, self._batches = inputs, targets, batches
        self.losses = Losses()

    def fill(self) -> None:
        """Set the gradients to those of the mean loss over the next batch, all ranks' shares."""
        batch, world = next(self._batches), dist.get_world_size()
        share = batch.tensor_split(world)[dist.get_rank()]
        size = len(share)
        if not size:  # fewer examples than ranks: all take part in the exchange, this one with 0
            share = batch[:1]
        rows = share.numpy()
        x = self._task.inputs(np.asarray(self._inputs[rows])).to(self._place)
        y = self._task.targets(np.asarray(self._targets[rows])).to(self._place)
        self._form.clear()
        loss = self._task.loss(self._form.forward(x), y)
        # Ranks are averaged as equals: each is to count as its examples do.
        (loss * (world * size / len(batch))).backward()
        self._form.collect()
        self.losses.add(loss, size)


def train(folder: Path) -> None:
    """This rank's part in the job of `folder`."""
    job = json.loads((folder / parallel.JOB).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = job["config"]
    place = torch.device("cpu")
    torch.set_num_threads(job["threads"])
    if config["device"] == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    store = dist.FileStore(str(folder / "ranks"), world)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=job["timeout_s"]),
    )
    inputs = np.load(folder / "inputs.npy", mmap_mode="r", allow_pickle=False)
    targets = np.load(folder / "targets.npy", mmap_mode="r", allow_pickle=False)
    asked = plan(config, targets)

    task = tasks.load(job["target"], json.loads(job["options"]), allowed=job["allowed"])
    model = task.model()
    model.load_state_dict(safetensors.torch.load_file(folder / parallel.MODEL))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in job["trained"])
    seed_everything(job["seed"] + rank, place)
    model.to(place).train()
    form = (Sharded if job["trainer"] == "fsdp" else Whole)(model, place)
    optimizer = make_optimizer(form.trained, config, server_round=job["server_round"])
    batches = shuffled(asked.examples, asked.batch_size, job["seed"])
    shares = Shares(task, form, inputs, targets, batches, place)
    descend(
        form.trained,
        optimizer,
        shares,
        asked.steps,
        clip_norm=asked.clip_norm,
        proximal_mu=job["proximal_mu"],
        terms=form.terms(terms) if (terms := _correction(folder, job["trained"], place)) else [],
        clip=form.clip,
    )
    state, mean = _gathered(model), _mean(shares.losses, place)
    if rank == 0:
        metrics = {"train_loss": mean, "num-examples": asked.examples, "steps": asked.steps}
        (folder / f"{parallel.RESULT}.json").write_text(json.dumps(metrics))
        safetensors.torch.save_file(
            parallel.apart(state), folder / f"{parallel.RESULT}.safetensors"
        )
    store.set(f"done-{rank}", "")  # a rank that leaves may break off what others still receive
    store.wait([f"done-{each}" for each in range(world)])


def _local(tensor: Any) -> Tensor:
    """This rank's share of a DTensor, in the same memory."""
    share: Tensor = tensor.detach().to_local()
    return share


def _correction(folder: Path, trained: Sequence[str], place: torch.device) -> list[Tensor]:
    path = folder / parallel.CORRECTION
    if not path.exists():
        return []
    terms = safetensors.torch.load_file(path)
    return [terms[name].to(place) for name in trained]


def _gathered(model: nn.Module) -> Mapping[str, Tensor]:
    """The whole state; of use at rank 0 only, but all take part."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            state[name] = whole.detach().cpu()
    return state


def _mean(losses: Losses, place: torch.device) -> float:
    """Over all ranks' examples."""
    both = torch.tensor([losses.total.item(), losses.seen], dtype=torch.float64).to(place)
    dist.all_reduce(both)
    return (both[0] / both[1]).item()
