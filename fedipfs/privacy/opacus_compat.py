"""Opacus without what its import does to the process: it sets up logging for everybody."""

from __future__ import annotations

import logging
import warnings

_root = logging.getLogger()
_before = _root.handlers[:], _root.level

from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (  # noqa: E402
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping  # noqa: E402
from opacus.utils.batch_memory_manager import BatchSplittingSampler  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

_root.handlers[:], _ = _before
_root.setLevel(_before[1])

# Of a first layer, whose inputs need no gradient: hooks are there for its output.
warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients")

__all__ = [
    "BatchSplittingSampler",
    "DPOptimizer",
    "DPOptimizerFastGradientClipping",
    "GradSampleModule",
    "GradSampleModuleFastGradientClipping",
    "ModuleValidator",
]
