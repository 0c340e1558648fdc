"""Commands that are interrupted, for tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from hostile_http import HostileServer


def interrupt_upload(
    node: HostileServer, *argv: str, within_s: float
) -> subprocess.CompletedProcess[bytes]:
    """`fedipfs` with these words, given Ctrl-C once it uploads to `node`; it ends in `within_s`."""
    command = [sys.executable, "-m", "fedipfs", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 30
            while not node.calls("/dag/import"):
                assert time.monotonic() < deadline, "nothing was uploaded"
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=within_s)
        finally:
            process.kill()  # nothing if it has ended
    return subprocess.CompletedProcess(command, process.returncode, out, err)
