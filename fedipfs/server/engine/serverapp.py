"""What the SuperExec starts as `flwr-serverapp`: Flower's own program, for one Flower app alone.

Whoever reaches the Control API can submit an app, and its code would run with the coordinator's
keys. So the only one that is run is that of this package (flower_app/), and the only settings are
those of a submission in the coordinator's home, which others cannot make; those of `flwr run` are
taken if OTHERS is set.
"""

from __future__ import annotations

import os

PATH, OTHERS = "FEDIPFS_PATH", "FEDIPFS_FLWR_RUN"  # environment variables


def main() -> None:
    """Run the ServerApp that the arguments name."""
    os.environ["PATH"] = os.environ.pop(PATH, "")
    from fedipfs.flower_deploy import run_serverapp_for
    from fedipfs.server.submission import app_files

    run_serverapp_for(app_files())


if __name__ == "__main__":
    main()
