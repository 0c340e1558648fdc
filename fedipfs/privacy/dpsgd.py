"""DP-SGD with Opacus: gradients that are clipped example by example, summed, and noised.

Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1. Opacus computes and
clips; who is in a batch and the noise are drawn from our own generator (noise.py). The batch's size
is nowhere used: the sum is divided by the expected size, which everybody knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedipfs.privacy.base import GHOST, Mechanism
from fedipfs.privacy.opacus_compat import (
    BatchSplittingSampler,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from fedipfs.tasks import Task

_MOST_VALUES = 1 << 26  # of per-example gradients: with more, memory is what takes the time


class _OwnNoise(DPOptimizer):
    """Opacus' optimizer with noise from a generator that is handed in."""

    source: np.random.Generator

    def add_noise(self) -> None:
        deviation = self.noise_multiplier * self.max_grad_norm
        for each in self.params:
            total = each.summed_grad.view_as(each)
            each.grad = total.add_(gaussian(self.source, each, deviation)) if deviation else total


class _Hooks(_OwnNoise):
    def clip_and_accumulate(self) -> None:
        """As Opacus', but examples whose gradient is not finite count as none."""
        samples = self.grad_samples
        if not all(each.sum().isfinite() for each in samples):
            rows = [each.reshape(len(each), -1).isfinite().all(1) for each in samples]
            for each in samples:
                each[~torch.stack(rows).all(0)] = 0
        super().clip_and_accumulate()


class _Ghost(_OwnNoise, DPOptimizerFastGradientClipping):
    def accumulate(self) -> None:
        """As Opacus', without a copy of each gradient."""
        for each in self.params:
            if each.summed_grad is None:
                each.summed_grad, each.grad = each.grad, None
            else:
                each.summed_grad.add_(each.grad)


def gaussian(source: np.random.Generator, like: Tensor, deviation: float) -> Tensor:
    """Noise N(0, deviation^2) in the shape, dtype and place of `like`."""
    wide = like.dtype == torch.float64
    values = source.standard_normal(tuple(like.shape), dtype=np.float64 if wide else np.float32)
    values *= deviation
    return torch.from_numpy(np.asarray(values)).to(like.device, like.dtype)


@dataclass
class PrivateGradients:
    """Fills the gradients of `model`, step by step; a context: Opacus' hooks go with it.

    `inputs` (N, ...) and `targets` (N,) are tensors in the place of the model, in training mode.
    `mode` is GHOST (norms without per-example gradients, Lee & Kifer 2021; half the memory) or
    HOOKS (per-example gradients, also for tied weights); see models.fitting_mode. A batch goes
    through the model in parts of at most `physical_batch` examples, with the same result.
    """

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    mechanism: Mechanism
    source: np.random.Generator
    mode: str = GHOST
    physical_batch: int = 512

    @property
    def at_once(self) -> int:
        """Examples in memory at once."""
        if self.mode == GHOST:
            return self.physical_batch
        trained = sum(each.numel() for each in self.model.parameters() if each.requires_grad)
        return max(1, min(self.physical_batch, _MOST_VALUES // max(1, trained)))

    def __enter__(self) -> PrivateGradients:
        # What a layer notes of its inputs, such as running means, gets no noise: it stays here.
        self._buffers = [(each, each.detach().clone()) for each in self.model.buffers()]
        ghost, clip = self.mode == GHOST, self.mechanism.clip_norm
        self._hooks: Any = (
            GradSampleModuleFastGradientClipping(
                self.model, loss_reduction="sum", max_grad_norm=clip
            )
            if ghost
            else GradSampleModule(self.model, loss_reduction="sum")
        )
        self._private = (_Ghost if ghost else _Hooks)(
            self.optimizer,
            noise_multiplier=self.mechanism.noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=self.mechanism.batch_size,
        )
        self._private.source = self.source
        self._ends: list[Tensor] = []
        self._watched = [
            each.register_forward_hook(self._note_end, with_kwargs=True)
            for each in self._hooks.iterate_submodules(self.model)
        ]
        return self

    def __exit__(self, *problem: object) -> None:
        for each in self._watched:
            each.remove()
        self._hooks.cleanup()
        self._ends.clear()
        for parameter in self._private.params:
            del parameter.summed_grad
        for module in self.model.modules():  # what Opacus forgets: examples, of the last batch
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)
        with torch.no_grad():
            for buffer, came in self._buffers:
                buffer.copy_(came)

    def _note_end(self, module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        """Keep the output of a trained layer that nothing trained comes before.

        A recurrent layer has several, but is made of layers that have one.
        """
        leaves = tree_leaves((inputs, keywords))
        if isinstance(output, Tensor) and not any(
            isinstance(each, Tensor) and each.requires_grad for each in leaves
        ):
            self._ends.append(output)

    def fill(self, chosen: np.ndarray | None = None) -> None:
        """Set `grad` of every trained parameter to one step's: (clipped sum + noise) / batch_size.

        The examples are `chosen`, else a Poisson batch, which may be empty: then it is noise alone.
        """
        if chosen is None:
            draws = self.source.random(len(self.targets))
            chosen = np.flatnonzero(draws < self.mechanism.sample_rate)
        for part in self._parts(chosen):
            self._private.zero_grad(set_to_none=True)  # but not what this batch has summed so far
            self._backward(self.inputs[part], self.targets[part])
            self._private.pre_step()

    def _parts(self, chosen: np.ndarray) -> Iterator[list[int]]:
        return iter(
            BatchSplittingSampler(
                sampler=[chosen],
                max_batch_size=self.at_once,
                optimizer=self._private,
            )
        )

    def _backward(self, inputs: Tensor, targets: Tensor) -> None:
        """Leave with each parameter what its optimizer sums: clipped or per-example gradients.

        Row i of the sum's gradient by the output belongs to example i, so a loss need only be the
        mean of something of each example; it is not asked for them one by one. An example whose
        gradient has no finite norm counts as none: no factor would shorten it.
        """
        if not len(targets):
            return self._nothing()
        ghost, parameters = self.mode == GHOST, self._private.params
        self._ends.clear()
        output = self._hooks(inputs)
        total = self.task.loss(output, targets) * len(targets)
        (rows,) = torch.autograd.grad(total, output)
        # Hooks take what they need on the way to the first trained layers: so the gradients of the
        # whole batch by weights, half of the work, are not computed here.
        torch.autograd.grad(output, self._ends, rows, retain_graph=ghost)
        if not ghost:
            return
        factors = self._hooks.get_clipping_coef().view(-1, *[1] * (rows.dim() - 1))
        finite = self._hooks.per_sample_gradient_norms.isfinite()
        for each in parameters:
            del each._norm_sample  # a layer that is passed by the next time shall not be overlooked
        self._private.zero_grad(set_to_none=True)
        if not finite.all():
            return self._backward(inputs[finite], targets[finite])
        self._hooks.disable_hooks()
        torch.autograd.backward(output, rows * factors, inputs=parameters)
        self._hooks.enable_hooks()

    def _nothing(self) -> None:
        """An empty batch, which no model need see."""
        for each in self._private.params:
            if self.mode == GHOST:
                each.grad = torch.zeros_like(each)
            else:
                each.grad_sample = each.new_zeros((0, *each.shape))
