"""DP-SGD with Opacus: gradients that are clipped example by example, summed, and noised.

Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1. Opacus knows what each
kind of layer needs; who is in a batch and the noise are drawn from our own generator (noise.py).
The batch's size is nowhere used: the sum is divided by the expected size, which everybody knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.grad import conv2d_weight

from fedipfs.privacy.base import GHOST, Mechanism
from fedipfs.privacy.opacus_compat import GradSampleModule, GradSampleModuleFastGradientClipping
from fedipfs.tasks import Task

_MOST_VALUES = 1 << 26  # of per-example gradients: with more, memory is what takes the time
_SUM = {"loss_reduction": "sum", "batch_first": True}

# From a layer, its inputs and the gradient by its output: something of each example's gradient.
_Sampler = Callable[[Any, list[Tensor], Tensor], Mapping[Any, Tensor]]


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
        ghost = self.mode == GHOST
        layers = [each for each in self.model.modules() if not (ghost and type(each) in _NORMS)]
        own = [p for each in layers for p in each.parameters(recurse=False) if p.requires_grad]
        values = sum(each.numel() for each in own)
        return max(1, min(self.physical_batch, _MOST_VALUES // max(1, values)))

    def __enter__(self) -> PrivateGradients:
        # What a layer notes of its inputs, such as running means, gets no noise: it stays here.
        self._buffers = [(each, each.detach().clone()) for each in self.model.buffers()]
        self._layers = _Layers(self.model, self.mode == GHOST)
        groups = self.optimizer.param_groups
        self._parameters = [p for each in groups for p in each["params"] if p.requires_grad]
        return self

    def __exit__(self, *problem: object) -> None:
        self._layers.forget()
        self._layers.cleanup()
        with torch.no_grad():
            for buffer, came in self._buffers:
                buffer.copy_(came)

    def fill(self, chosen: np.ndarray | None = None) -> None:
        """Set `grad` of every trained parameter to one step's: (clipped sum + noise) / batch_size.

        The examples are `chosen`, else a Poisson batch, which may be empty: then it is noise alone.
        """
        self._secret = int(self.source.integers(1 << 62))  # of what layers draw in this step
        if chosen is None:
            draws = self.source.random(len(self.targets))
            chosen = np.flatnonzero(draws < self.mechanism.sample_rate)
        first, *others = np.array_split(chosen, max(1, math.ceil(len(chosen) / self.at_once)))
        sums = self._clipped(torch.from_numpy(first))
        for part in others:
            for total, more in zip(sums, self._clipped(torch.from_numpy(part)), strict=True):
                total.add_(more)
        deviation = self.mechanism.noise_multiplier * self.mechanism.clip_norm
        for each, total in zip(self._parameters, sums, strict=True):
            if deviation:
                total.add_(gaussian(self.source, each, deviation))
            each.grad = total.div_(self.mechanism.batch_size)

    def _clipped(self, chosen: Tensor) -> list[Tensor]:
        """For each trained parameter the sum of the clipped gradients of the examples `chosen`.

        A loss need only be the mean of something of each example; it is not asked for them one by
        one. An example whose gradient has no finite norm counts as none: no factor would shorten
        it.
        """
        if not len(chosen):  # which no model need see
            return [torch.zeros_like(each) for each in self._parameters]
        # What a layer draws, as dropout does, is not to follow from a seed that others know: then
        # one example more would change what all those behind it get.
        state = torch.get_rng_state()
        self._secret += 1
        torch.default_generator.manual_seed(self._secret)
        if self.inputs.is_cuda:
            torch.cuda.manual_seed_all(self._secret)
        try:
            output = self._layers(self.inputs[chosen])
            total = self.task.loss(output, self.targets[chosen]) * len(chosen)
            norms = self._layers.norms(total, self._parameters)
            finite = norms.isfinite()
            if finite.all():
                factors = (self.mechanism.clip_norm / (norms + 1e-6)).clamp(max=1.0)
                return self._layers.sums(self._parameters, factors)
        finally:
            self._layers.forget()
            torch.set_rng_state(state)
        return self._clipped(chosen[finite.cpu()])


class _Layers(GradSampleModule):
    """A model, with what clipping needs of each of its layers, once `norms` has been asked for.

    That is each example's gradient; or, with `ghost`, where there is a formula for its norm, no
    more than the gradient by the layer's output, from which `sums` comes to the same result ("book-
    keeping", Bu et al. 2023). So nothing goes through the whole model twice.
    """

    def __init__(self, model: nn.Module, ghost: bool) -> None:
        super().__init__(model, loss_reduction="sum")
        for hook in self.autograd_grad_sample_hooks[1::2]:  # those of the way back: see `norms`
            hook.remove()
        self._ghost = ghost
        self._calls: list[tuple[nn.Module, GradientEdge]] = []
        self._kept: list[tuple[list[Any], GradientEdge, Tensor]] = []

    def capture_activations_hook(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        super().capture_activations_hook(layer, inputs, output)
        output = output if isinstance(output, Tensor) else output[0]  # as Opacus does
        self._calls.append((layer, get_gradient_edge(output)))

    def norms(self, total: Tensor, parameters: list[Any]) -> Tensor:
        """The norm of each example's gradient, (examples,), `total` being their sum's loss.

        On the way there are no gradients by weights, which would be those of the whole batch and
        half of the work; and no hooks, which for small models would take as long as the rest.
        """
        calls = self._calls[::-1]
        outputs = [output for _, output in calls]
        backprops = torch.autograd.grad(total, outputs, retain_graph=self._ghost)
        for (layer, output), gradient in zip(calls, backprops, strict=True):
            self._take(layer, output, gradient)
        norms = [
            each._norm_sample
            if hasattr(each, "_norm_sample")
            else torch.linalg.vector_norm(each.grad_sample.flatten(1), dim=1)
            for each in parameters
        ]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def _take(self, layer: nn.Module, output: GradientEdge, gradient: Tensor) -> None:
        """Leave with the layer's parameters what is needed: `grad_sample`, `_norm_sample`."""
        trained: list[Any] = [each for each in layer.parameters() if each.requires_grad]
        tied = any(p._forward_counter > 1 or hasattr(p, "_current_grad_sample") for p in trained)
        norms, gradients = _NORMS.get(type(layer)), _GRADIENTS.get(type(layer))
        if ghost := bool(self._ghost and norms):
            if tied:
                raise NotImplementedError("there is no formula for weights that are used twice")
        elif tied or not gradients:
            return self.capture_backprops_hook(layer, None, (gradient,), **_SUM)
        inputs, gradient = self.rearrange_grad_samples(module=layer, backprops=gradient, **_SUM)
        if norms and (ghost or gradient.dim() == 2):
            for each, values in norms(layer, inputs, gradient).items():
                each._norm_sample = values
        if ghost:
            self._kept.append((trained, output, gradient))
        elif gradients:  # as Opacus would, but that reads and writes all of them twice more
            for each, values in gradients(layer, inputs, gradient).items():
                each.grad_sample = values

    def sums(self, parameters: list[Any], factors: Tensor) -> list[Tensor]:
        """For each of `parameters` the sum of the examples' gradients times `factors`."""
        found = {
            each: torch.mv(each.grad_sample.flatten(1).t(), factors).view_as(each)
            for each in parameters
            if each.grad_sample is not None
        }
        for trained, output, gradient in self._kept:
            gradient = gradient * factors.view(-1, *[1] * (gradient.dim() - 1))
            found |= zip(trained, torch.autograd.grad(output, trained, gradient), strict=True)
        return [found[each] for each in parameters]

    def forget(self) -> None:
        """Keep nothing of any example; a layer that is passed by the next time is missed then."""
        self._calls.clear()
        self._kept.clear()
        for layer in self._module.modules():
            vars(layer).pop("activations", None)
            vars(layer).pop("max_batch_len", None)
        for each in self._module.parameters():
            each.grad_sample, each._forward_counter = None, 0
            vars(each).pop("_norm_sample", None)
            vars(each).pop("_current_grad_sample", None)


def _of_convolution(
    layer: nn.Conv2d, inputs: list[Tensor], gradient: Tensor
) -> Mapping[Any, Tensor]:
    """Each example's gradient, from one convolution in which every example is a group of its own.

    Opacus unfolds the inputs, which takes up to twice as long.
    """
    if isinstance(layer.padding, str):
        return GradSampleModule.GRAD_SAMPLERS[nn.Conv2d](layer, inputs, gradient)
    found: dict[Any, Tensor] = {}
    if layer.weight.requires_grad:
        count, shape = len(gradient), layer.weight.shape
        found[layer.weight] = conv2d_weight(
            inputs[0].reshape(1, -1, *inputs[0].shape[2:]),
            [count * shape[0], *shape[1:]],
            gradient.reshape(1, -1, *gradient.shape[2:]),
            layer.stride,
            layer.padding,
            layer.dilation,
            count * layer.groups,
        ).view(count, *shape)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = gradient.sum((2, 3))
    return found


def _norms_of_linear(
    layer: nn.Linear, inputs: list[Tensor], gradient: Tensor
) -> Mapping[Any, Tensor]:
    """The norm of each example's gradient, float64 as long as it is a product.

    Opacus multiplies squares: in float32 that of 1e-23 is zero, however large the other one is.
    """
    if gradient.dim() != 2:
        found = _OPACUS[nn.Linear](layer, [inputs[0].double()], gradient.double())
    else:  # an outer product
        norm = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64)
        other = torch.linalg.vector_norm(inputs[0], dim=1, dtype=torch.float64)
        found = {layer.weight: norm * other, layer.bias: norm}
    return {p: values.to(p.dtype) for p, values in found.items() if p is not None}


_OPACUS: Mapping[type, _Sampler] = GradSampleModuleFastGradientClipping.NORM_SAMPLERS
_NORMS: Mapping[type, _Sampler] = {**_OPACUS, nn.Linear: _norms_of_linear}
_GRADIENTS: Mapping[type, _Sampler] = {
    nn.Conv2d: _of_convolution,
    nn.Linear: GradSampleModule.GRAD_SAMPLERS[nn.Linear],
}
