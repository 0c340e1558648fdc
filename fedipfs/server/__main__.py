"""`python -m fedipfs.server +experiment=mnist`: the command line of a run."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedipfs.errors import ConfigError, FedIPFSError, RunInterrupted

_PRELOAD = ("fedipfs.clients.preload",)  # what workers need and what takes long to import
_ON_RESUME = ("rounds", "engine", "data.root", "runs_dir", "resume")
_failures: list[FedIPFSError] = []


def main() -> None:
    """Run the command line and exit as the documentation says (0, 1, 2, 3 or 130)."""
    # Hydra then raises what it finds wrong instead of printing a page about it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _hydra_main()
        code = max((failure.exit_code for failure in _failures), default=0)
    except (HydraException, OmegaConfBaseException) as error:
        code = _complain(error, 2)
    except KeyboardInterrupt:
        code = 130
        if not any(isinstance(failure, RunInterrupted) for failure in _failures):
            _complain("stopped before the first round; there is nothing to go on with", code)
    except BrokenPipeError:
        code = 141
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.exit(code)


@hydra.main(version_base="1.3", config_path="pkg://fedipfs.conf", config_name="config")
def _hydra_main(config: DictConfig) -> float | None:
    """One job: a run, or one cell of a sweep. Returns the target metric to the sweeper.

    Errors that are no bugs are reported here and kept, as Hydra would add words of its own; the
    other cells of a sweep are still worth running.
    """
    try:
        return _job(config)
    except FedIPFSError as error:
        _failures.append(error)
        _complain(error, error.exit_code)
        if isinstance(error, RunInterrupted):
            raise KeyboardInterrupt from None  # ends a sweep, too
        return None


def _job(config: DictConfig) -> float | None:
    from fedipfs.server import settings
    from fedipfs.server.engine.pool import warm_up

    values: Any = OmegaConf.to_container(config, resolve=True)
    resume = values["resume"]
    if resume is not None:
        values = _resumed(values)
    checked = settings.check(values)
    if checked["engine"]["name"] == "local":
        warm_up(_PRELOAD)  # while this process imports and loads, too
    from fedipfs.observe.progress import Progress
    from fedipfs.server import sweep
    from fedipfs.server.run import run

    with Progress() as progress:
        summary = run(checked, progress, resume=resume is not None)
    sweep.cells.append(summary)
    metric = summary["metrics"].get(checked["task"]["metric"])
    return None if metric is None else float(metric)


def _resumed(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run to resume, with what may change taken from the command line."""
    from fedipfs.server.folder import RunFolder

    given = [item.lstrip("+").partition("=")[0] for item in HydraConfig.get().overrides.task]
    for key in given:
        if not any(key == name or key.startswith(f"{name}.") for name in _ON_RESUME):
            raise ConfigError(
                f"{key} cannot change when a run is resumed (only {', '.join(_ON_RESUME[:3])} "
                "can); leave it out, or start a new run with init_from=<model CID>"
            )
    folder = Path(values["runs_dir"]) / str(values["resume"])
    RunFolder.open(values["runs_dir"], str(values["resume"])).close()
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    saved["runs_dir"] = values["runs_dir"]
    if "rounds" in given:
        saved["rounds"] = values["rounds"]
    if "data.root" in given:
        saved["data"]["root"] = values["data"]["root"]
    if any(key.partition(".")[0] == "engine" for key in given):
        saved["engine"] = values["engine"]
    return dict(saved)


def _complain(problem: object, code: int) -> int:
    """One line on stderr."""
    text = " ".join(str(problem).split())
    print(f"fedipfs-server: {text}", file=sys.stderr, flush=True)
    return code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
