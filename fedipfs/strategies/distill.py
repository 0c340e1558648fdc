"""Ensemble distillation: many models teach one, on inputs without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedipfs.data import Examples
from fedipfs.errors import ConfigError, RunFailed, one_line
from fedipfs.strategies.options import positive, whole
from fedipfs.tasks import Task
from fedipfs.tasks.evaluation import find_device
from fedipfs.tasks.names import batch_norms

Teacher = tuple[torch.nn.Module, Task, float]  # a member, what prepares its inputs, its weight
_OPTIONS = ("steps", "batch_size", "lr", "temperature", "data")


@dataclass(frozen=True)
class Distillation:
    """FedDF, `AvgLogits` (Lin et al. 2020, "Ensemble Distillation for Robust Model Fusion in
    Federated Learning", Algorithm 1).

    The student minimises T^2 KL(softmax(z / T) || softmax(f(x) / T)), z = sum_k a_k f_k(x) being
    the mean of the members' logits and T `temperature` (1 in the paper), for `steps` batches of
    `batch_size` inputs, with Adam from the rate `lr`, annealed to 0 by a cosine (section 4.1). A
    single input that is left over joins the batch before it.
    """

    inputs: NDArray[Any]  # (N, ...), as the task's data set has them
    steps: int
    batch_size: int
    lr: float
    temperature: float

    @classmethod
    def of(cls, options: Mapping[str, Any], held_out: Examples | None, task: Task) -> Distillation:
        """From the section `strategy.distill`; ConfigError for what cannot work.

        The inputs are those of the .npy file `data`, or of `held_out`.
        """
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise ConfigError(
                f"strategy.distill.{unknown[0]} is unknown; choose {', '.join(_OPTIONS)}"
            )
        if (data := options.get("data")) is not None:
            inputs = _inputs(str(data), task)
        elif held_out is not None and len(held_out):
            inputs = held_out.inputs
        else:
            raise ConfigError(
                "strategy.distill needs inputs (no labels): set data.held_out=0.2, or "
                "strategy.distill.data to a .npy file of inputs"
            )
        batch_size = whole("distill.batch_size", options.get("batch_size", 64), 1)
        if min(batch_size, len(inputs)) == 1 and batch_norms(task.model()):
            raise ConfigError(
                f"strategy.distill.batch_size={batch_size} of {len(inputs)} inputs makes batches "
                "of one, which BatchNorm cannot normalise; take 2 or more of both"
            )
        return cls(
            inputs,
            whole("distill.steps", options.get("steps", 500), 1),
            batch_size,
            positive("distill.lr", options.get("lr", 1e-3)),
            positive("distill.temperature", options.get("temperature", 1.0)),
        )

    def teach(
        self,
        student: torch.nn.Module,
        task: Task,
        teachers: Iterable[Teacher],
        *,
        seed: int,
        device: str = "cpu",
    ) -> float:
        """Train `student` in place; returns the mean loss over the last tenth of the steps.

        One teacher is held at a time, and the logits on all inputs, (N, C) float32. The result
        follows from the arguments. RunFailed if the student's weights are no longer finite.
        """
        place = find_device(device)
        target = self._logits(teachers, place) / self.temperature
        inputs = task.inputs(self.inputs).to(place)
        losses: list[Tensor] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # dropout
            shuffle = torch.Generator().manual_seed(seed)
            student.to(place).train()
            optimizer = torch.optim.Adam(student.parameters(), lr=self.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
            batches: list[Tensor] = []
            for _ in range(self.steps):
                if not batches:
                    order = torch.randperm(len(inputs), generator=shuffle).to(place)
                    batches = list(order.split(self.batch_size))
                    if len(batches[-1]) == 1 < min(self.batch_size, len(order)):
                        batches[-2:] = [torch.cat(batches[-2:])]  # BatchNorm needs two
                batch = batches.pop()
                answer = torch.log_softmax(student(inputs[batch]) / self.temperature, dim=1)
                wanted = torch.log_softmax(target[batch], dim=1)
                loss = functional.kl_div(answer, wanted, reduction="batchmean", log_target=True)
                optimizer.zero_grad()
                (loss * self.temperature**2).backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            student.cpu().eval()
        if not all(bool(each.isfinite().all()) for each in student.state_dict().values()):
            raise RunFailed("the distilled model is not finite: lower strategy.distill.lr")
        return float(torch.stack(losses[-max(1, self.steps // 10) :]).mean())

    def _logits(self, teachers: Iterable[Teacher], place: torch.device) -> Tensor:
        total: Tensor | None = None
        weights = 0.0
        with torch.inference_mode():
            for module, task, weight in teachers:
                module.to(place).eval()
                parts = [
                    module(task.inputs(self.inputs[start : start + 256]).to(place)).float()
                    for start in range(0, len(self.inputs), 256)
                ]
                logits = torch.cat(parts) * weight
                total = logits if total is None else total + logits
                weights += weight
        assert total is not None
        return total / weights


def _inputs(path: str, task: Task) -> NDArray[Any]:
    """The array in a .npy file, mapped and not read, if the task's model takes its rows."""
    try:
        inputs = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        why = one_line(error)
        raise ConfigError(f"strategy.distill.data={path} cannot be read: {why}") from None
    if not isinstance(inputs, np.ndarray) or inputs.ndim < 1 or not len(inputs):
        raise ConfigError(f"strategy.distill.data={path} holds no inputs: save an array (N, ...)")
    try:
        with torch.inference_mode():
            task.model().eval()(task.inputs(np.array(inputs[:1])))
    except Exception as error:  # whatever the task's code says
        why = one_line(error, 200)
        raise ConfigError(
            f"strategy.distill.data={path} has inputs {inputs.shape[1:]} of {inputs.dtype}, "
            f"which the task does not take: {why}"
        ) from None
    return inputs
