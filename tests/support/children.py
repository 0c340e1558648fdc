"""Forked children: processes that start in a millisecond with all that was imported."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def child(action: Callable[[], object]) -> int:
    """Run `action` in a child; its process id. An exception is printed and makes it exit with 1."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a child; -N if signal N ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
