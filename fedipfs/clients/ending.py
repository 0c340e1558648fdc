"""How a site's processes end: by a signal, or with the process that supervises them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

LEASH = "FEDIPFS_PARENT"  # the environment variable with the process that a child ends with
_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """A signal asked this process to end: raised where it was, `signum` says by which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 0 where a service manager asked."""
        return 130 if self.signum == signal.SIGINT else 0


def stop_on_signals() -> None:
    """Have SIGINT and SIGTERM raise Stopped, once; later ones do not cut the orderly end short."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def on_leash(end: int = signal.SIGKILL) -> None:
    """In a child: end by the signal `end` as soon as the process that supervises this one is gone.

    Linux only; elsewhere a child outlives a supervisor that is killed.
    """
    parent = os.environ.pop(LEASH, None)  # not for what this process starts itself
    if parent is None or sys.platform != "linux":
        return
    sent = end if end == signal.SIGKILL else _once(end)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, sent)
    if os.getppid() != int(parent):  # it ended meanwhile
        os._exit(1)


def _once(end: int) -> int:
    """A signal that sends `end` to this process, the first time that it comes.

    Linux tells a child of each thread of its parent that ends, and who is asked to end a second
    time may do so at once.
    """

    def pass_on(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)
        os.kill(os.getpid(), end)

    signal.signal(signal.SIGUSR1, pass_on)
    return signal.SIGUSR1
