"""Imported by the process that workers are forked from, so that they start warm.

Not imported anywhere else: it takes about three seconds, most of them torch's.
"""

from __future__ import annotations

import torch

from fedipfs.clients import app, worker

__all__ = ["app", "worker"]

# The first optimizer imports torch._dynamo; better once here than in every worker.
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
