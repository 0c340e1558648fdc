"""What is learnt: one class a task, with its model, loss, metrics and data."""

from __future__ import annotations

from fedipfs.tasks import optim
from fedipfs.tasks.base import Task
from fedipfs.tasks.evaluation import evaluate
from fedipfs.tasks.loading import ALLOWED, load

__all__ = ["ALLOWED", "Task", "evaluate", "load", "optim"]
