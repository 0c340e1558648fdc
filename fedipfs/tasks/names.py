"""Which tensors of a model are which, by their names in its state_dict."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache

from torch import nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, under all of their names; no buffers."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: each for name, each in named if each.requires_grad}


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Those of `names` that one of `patterns` matches, as the shell's: `3.*`, `*.bias`."""
    patterns = list(patterns)
    return [name for name in names if any(fnmatchcase(name, each) for each in patterns)]


def split_by(model: nn.Module, patterns: Iterable[str]) -> tuple[str, str] | None:
    """Two names of one tensor (tied weights) of which `patterns` match the first, not the second.

    None if there is no such tensor.
    """
    state = model.state_dict(keep_vars=True)  # the tensors themselves, no views of them
    inside = matching(state, patterns)
    others = {id(each): name for name, each in state.items() if name not in set(inside)}
    ties = ((name, others[id(state[name])]) for name in inside if id(state[name]) in others)
    return next(ties, None)


def batch_norms(model: nn.Module) -> list[str]:
    """Patterns of all tensors of the BatchNorm layers of `model`, and of no others.

    Layers that differ in a number share a pattern (`blocks.*.norm.*`) where that is as exact.
    """
    layers = [name for name, each in model.named_modules() if isinstance(each, _BATCH_NORMS)]
    names = list(model.state_dict())
    inside = {name for name in names if name.rpartition(".")[0] in layers}

    @cache
    def is_exact(pattern: str) -> bool:
        return inside.issuperset(matching(names, [pattern]))

    patterns: dict[str, None] = {}
    for layer in layers:
        exact = f"{layer}.*" if layer else "*"
        short = re.sub(r"(?<![^.])\d+(?![^.])", "*", exact)
        patterns[short if is_exact(short) else exact] = None
    return list(patterns)
