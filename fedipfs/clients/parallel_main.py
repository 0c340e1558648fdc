"""One rank of a parallel training: what torchrun starts, N times. See parallel.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from fedipfs.clients import torchrun


def main(folder: Path) -> None:
    """This rank's part of the job in `folder`; an error is left there, in one line."""
    torchrun.end_with_parent(signal.SIGKILL)
    code = 0
    try:
        from fedipfs.clients import ranks  # it takes torch along, and seconds

        ranks.train(folder)
    except BaseException as problem:
        code = 1
        said = {
            "rank": int(os.environ["RANK"]),
            "when": time.time_ns(),
            "kind": type(problem).__name__,
            "text": " ".join(str(problem).split()),
        }
        path = folder / f"error-{said['rank']}.json"
        path.with_suffix(".part").write_text(json.dumps(said))
        path.with_suffix(".part").replace(path)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what the backends do at exit may wait for ranks that are gone, or abort


if __name__ == "__main__":
    main(Path(sys.argv[1]))
