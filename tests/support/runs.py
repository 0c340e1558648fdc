"""Runs for tests: configurations composed as on the command line, in process or as a command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from fedipfs.observe.progress import Progress
from fedipfs.server import settings
from fedipfs.server.run import run

QUICK = ("+experiment=digits", "rounds=2", "clients.total=4", "train.epochs=1")


def configure(runs_dir: Path, *overrides: str) -> dict[str, Any]:
    """The unchecked configuration that these command line words give."""
    with initialize_config_module("fedipfs.conf", version_base="1.3"):
        config = compose("config", [*overrides, f"runs_dir={runs_dir}"])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def play(runs_dir: Path, *overrides: str, resume: bool = False, serial: bool = True):
    """A run in this process; its summary."""
    words = [*overrides, *(["engine=serial"] if serial else [])]
    config = settings.check(configure(runs_dir, *words))
    return run(config, Progress(io.StringIO(), quiet=True), resume=resume)


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m fedipfs.server` with these words, run to its end in `cwd`."""
    return subprocess.run(
        [sys.executable, "-m", "fedipfs.server", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The same, in the background and in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedipfs.server", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
