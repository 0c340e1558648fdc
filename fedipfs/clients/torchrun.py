"""torchrun on one machine: started, watched and ended together with who asked for it.

`run` starts this module as a process, which is torchrun, and torchrun starts the ranks. Each ends
with its parent, however that ends. Nobody else can reach them: they meet through files in the
job's folder (torchrun's own meeting place would be a port on every interface, at which it
unpickles what comes) and then talk over the loopback interface.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PARENT = "FEDIPFS_PARENT"  # in the environment: the process that a child ends with
LOG, FAILED = "log", "failed.json"  # in a job's folder
_GRACE_S = 5  # to end in good order
_SECRET = re.compile("PASS|SECRET|TOKEN|KEY|CREDENTIAL|AUTH")
_OURS = ("FEDIPFS_DATA", "FEDIPFS_OFFLINE")  # what ranks need of FEDIPFS_*


def run(folder: Path, module: str, *, processes: int, threads: int, timeout_s: float) -> int:
    """`processes` times `python -m module folder`, as ranks of one torchrun; its exit code.

    `threads` is OMP's in each. What they print goes to the file LOG in `folder`, and which of
    them torchrun saw fail to FAILED, as {rank: exit code}, negative for a signal. Raises
    TimeoutError; nothing runs any more when this returns or raises.
    """
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), module, str(processes)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(folder, threads),
            start_new_session=True,  # Ctrl-C is for us to pass on
        )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    finally:
        _end(process)


def end_with_parent(number: signal.Signals) -> None:
    """Have this process sent `number` when the thread that started it ends. Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[PARENT]):  # it has ended already
        os._exit(1)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()  # torchrun ends its ranks
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()  # and they with it
        process.wait()


def _environment(folder: Path, threads: int) -> dict[str, str]:
    """Ours without secrets, and with what keeps ranks to the folder and to this machine."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not _SECRET.search(name.upper())
        and (name in _OURS or not name.startswith(("FEDIPFS_", "FLWR_", "TORCHELASTIC_")))
    }
    return {
        **kept,
        PARENT: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "PYTHONSAFEPATH": "1",  # these alone: not the working folder, unless it is one of them
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # opens no port
    }


def main(arguments: Sequence[str]) -> None:
    """torchrun, as a child of `run`."""
    folder, module, processes = arguments
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # until torchrun has its own
    end_with_parent(signal.SIGTERM)
    parent = os.environ[PARENT]
    os.environ[PARENT] = str(os.getpid())
    try:
        _torchrun(Path(folder), module, processes)
    finally:
        if os.getppid() != int(parent):  # nobody else will
            shutil.rmtree(folder, ignore_errors=True)


def _torchrun(folder: Path, module: str, processes: str) -> None:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.main(
            [
                "--nnodes=1",
                f"--nproc-per-node={processes}",
                "--rdzv-backend=c10d",
                "--rdzv-conf=store_type=file",
                f"--rdzv-endpoint={folder / 'rendezvous'}",
                "--rdzv-id=fedipfs",
                "--local-addr=127.0.0.1",
                "--module",
                module,
                str(folder),
            ]
        )
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        with contextlib.suppress(OSError):
            (folder / FAILED).write_text(json.dumps(codes))
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
