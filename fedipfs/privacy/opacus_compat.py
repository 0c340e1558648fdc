"""Opacus without what its import does to the process: it sets up logging for everybody."""

from __future__ import annotations

import logging

_root = logging.getLogger()
_before = _root.handlers[:], _root.level

from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (  # noqa: E402
    GradSampleModuleFastGradientClipping,
)
from opacus.validators import ModuleValidator  # noqa: E402

_root.handlers[:], _ = _before
_root.setLevel(_before[1])


__all__ = [
    "GradSampleModule",
    "GradSampleModuleFastGradientClipping",
    "ModuleValidator",
]
