"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import gc
import os
import tempfile

_home = tempfile.TemporaryDirectory(prefix="fedipfs-flwr-")
os.environ.setdefault("FLWR_HOME", _home.name)
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from fedipfs.store import FolderStore  # noqa: E402

pytest_plugins = ["daemon_fixtures"]

settings.register_profile("fedipfs", deadline=None)  # a busy machine is no finding
settings.load_profile("fedipfs")


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """Flower's QFedAvg and Bulyan collect garbage for every update: leave out what is there."""
    gc.freeze()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """An empty folder store."""
    return FolderStore(tmp_path / "store", durable=False)
