"""`python -m fedipfs.server +experiment=mnist`: the command line of a run."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedipfs.errors import ConfigError, FedIPFSError, RunError, RunInterrupted

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PRELOAD = ("fedipfs.clients.preload",)  # what workers need and what takes long to import
_PRIVATE = ("fedipfs.privacy.models", "fedipfs.privacy.ledger")  # and under differential privacy
_ON_RESUME = ("rounds", "engine", "data.root", "runs_dir", "resume")
_COMMANDS = ("init", "admit", "members", "remove", "renew", "up", "app")  # of server/commands.py
_failures: list[FedIPFSError] = []
_began = False  # whether a job has: what fails before is a matter of the command line
_loaded = False  # whether the libraries have been imported that a run needs
_stopping: float | None = None  # when the first signal to end came
_PATIENCE_S = 10.0  # the time for an orderly end; a signal after that ends at once
_nothing = "stopped before anything was begun"  # what to say while there is no run to go on with


def main() -> None:
    """Run the command line and exit as the documentation says (0, 1, 2, 3 or 130)."""
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        from fedipfs.server import commands

        sys.exit(commands.main(sys.argv[1:]))
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _exit_code()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    # All is written; a late signal shall not make another end of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


def _exit_code() -> int:
    # Hydra then raises what it finds wrong instead of printing a page about it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from fedipfs.server.words import problem_of, quoted

        sys.argv[1:] = quoted(sys.argv[1:])
        run = hydra.main(version_base="1.3", config_path="pkg://fedipfs.conf", config_name="config")
        try:
            run(_hydra_job)()
        except (HydraException, OmegaConfBaseException) as error:
            return _complain(problem_of(error), 2)
        return max((failure.exit_code for failure in _failures), default=0)
    except BrokenPipeError:
        raise
    except (KeyboardInterrupt, Exception) as error:
        if not (_stopping or isinstance(error, KeyboardInterrupt)):
            if not _began and isinstance(error, OSError):  # the folder of a sweep
                return _complain(f"{error.filename}: {error.strerror}; choose another runs_dir", 2)
            if not _began and isinstance(error, ValueError):
                return _complain(f"{error}; --help shows how settings are given", 2)
            traceback.print_exc()
            return 1
        if not any(isinstance(failure, RunInterrupted) for failure in _failures):
            _complain(_nothing, 130)
        if (sweep := sys.modules.get("fedipfs.server.sweep")) and sweep.SweepTable.latest:
            sweep.SweepTable.latest.show()
        return 130


def _hydra_job(config: DictConfig) -> float | None:
    """One job: a run, or one cell of a sweep. Returns the target metric to the sweeper.

    Errors that are no bugs are reported here and kept, as Hydra would add words of its own; the
    other cells of a sweep are still worth running.
    """
    global _began
    _began = True
    try:
        return _job(config)
    except (KeyboardInterrupt, Exception) as error:
        failure: BaseException = error
        if not isinstance(error, RunInterrupted) and (
            _stopping or isinstance(error, KeyboardInterrupt)
        ):
            failure = RunInterrupted(_what_is_left())
        _note_failure(failure)
        if not isinstance(failure, FedIPFSError):
            raise
        _failures.append(failure)
        _complain(failure, failure.exit_code)
        if isinstance(failure, RunInterrupted):
            raise KeyboardInterrupt from None  # ends a sweep, too
        return None


def _job(config: DictConfig) -> float | None:
    from fedipfs.server import folder, settings
    from fedipfs.server.engine.pool import warm_up
    from fedipfs.server.words import resolved

    global _loaded, _nothing
    _loaded = _loaded or folder.RunFolder.latest is not None
    folder.RunFolder.latest = None  # that of a sweep's last cell
    _nothing = "stopped before the first round; there is nothing to go on with"
    values = resolved(config)
    resume = values["resume"]
    if resume is not None:
        _nothing = _go_on(str(resume), str(values["runs_dir"]))
        values = _resumed(values)
    remote = _remote(values, fresh=resume is None)
    checked = settings.check(values)
    folder.usable(checked["runs_dir"])
    if checked["engine"]["name"] == "local":
        private = checked["privacy"]["name"] == "dp_sgd"
        warm_up(_PRELOAD + _PRIVATE * private)  # while this process imports and loads, too
    from fedipfs.observe.progress import Progress
    from fedipfs.server import sweep

    if remote:
        from fedipfs.server.remote import run

        _loaded = True  # the run's folder is opened by its ServerApp, which has to be told to end
    else:
        from fedipfs.server.run import run

    with Progress() as progress:
        summary = run(checked, progress, resume=resume is not None)
    _nothing = f"stopped after run {summary['run_id']} had finished"
    sweep.cells.append(summary)
    wanted, metrics = checked["task"]["metric"], summary["metrics"]
    if metrics and wanted not in metrics:
        _complain(
            f"warning: metric {wanted} is not among {', '.join(metrics)}; name one of them as "
            "task.metric",
            0,
        )
    return float(metrics[wanted]) if wanted in metrics else None


def _remote(values: dict[str, Any], *, fresh: bool) -> bool:
    """Whether the run is with real partners; a fresh one is fitted to those that there are."""
    if values["engine"].get("name") != "deploy":
        return False
    if fresh:
        from fedipfs.server.membership import Home, Registry
        from fedipfs.server.remote import fitted

        values |= fitted(values, Registry.open(Home.load()))
    return True


def _resumed(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run to resume, with what may change taken from the command line."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from fedipfs.server import settings
    from fedipfs.server.folder import RunFolder
    from fedipfs.server.words import resolved

    given = [item.lstrip("+").partition("=")[0] for item in HydraConfig.get().overrides.task]
    for key in given:
        if not any(key == name or key.startswith(f"{name}.") for name in _ON_RESUME):
            raise ConfigError(
                f"{key} cannot change when a run is resumed (only {', '.join(_ON_RESUME[:3])} "
                "can); leave it out, or start a new run with init_from=<model CID>"
            )
    folder = RunFolder.open(str(values["runs_dir"]), str(values["resume"]))
    try:
        _ = folder.head  # is it readable? Said here, before anything is loaded
        loaded = OmegaConf.create(folder.read("config.yaml"))
        if not isinstance(loaded, DictConfig):
            raise ValueError("not a mapping")
        saved = resolved(loaded)
        settings.check(saved)
    except (YAMLError, OmegaConfBaseException, ConfigError, ValueError) as error:
        problem = getattr(error, "problem", None) or (str(error).splitlines() or [""])[0]
        raise RunError(
            f"{folder.path / 'config.yaml'} is no configuration ({problem}): restore the file, "
            "or start a new run with init_from=<model CID>"
        ) from None
    finally:
        folder.close()
        RunFolder.latest = None  # the run itself is opened later
    saved["runs_dir"], saved["run_id"] = values["runs_dir"], str(values["resume"])
    if "rounds" in given:
        saved["rounds"] = values["rounds"]
    if "data.root" in given:
        saved["data"]["root"] = values["data"]["root"]
    if any(key.partition(".")[0] == "engine" for key in given):
        was, wanted = (each["engine"].get("name") for each in (saved, values))
        if "deploy" in (was, wanted) and was != wanted:
            raise ConfigError(
                f"engine={wanted} would give the run other clients than it began with "
                f"(engine={was}): start a new run with init_from=<model CID>"
            )
        saved["engine"] = values["engine"]
    return saved


def _what_is_left() -> str:
    """What to tell a user who stopped a run that could not say itself what remains of it."""
    from fedipfs.server.folder import RunFolder

    folder = RunFolder.latest
    if folder is None or not folder.resumable:
        return _nothing
    return _go_on(folder.run_id, str(folder.path.parent))


def _go_on(run_id: str, runs_dir: str) -> str:
    where = "" if runs_dir == "runs" else f" runs_dir={runs_dir}"
    return f"stopped; go on with: python -m fedipfs.server resume={run_id}{where}"


def _note_failure(error: BaseException) -> None:
    """Keep what a sweep's table says of this job."""
    from fedipfs.server import sweep
    from fedipfs.server.folder import RunFolder

    folder = RunFolder.latest
    kept = folder is not None and folder.resumable
    text = str(error) if isinstance(error, FedIPFSError) else f"{type(error).__name__}: {error}"
    sweep.cells.append(
        {
            "run_id": folder.run_id if folder is not None and kept else None,
            "status": "failed",
            "error": " ".join(text.split()),
        }
    )


def _complain(problem: object, code: int) -> int:
    """One line on stderr."""
    text = " ".join(str(problem).split())
    print(f"fedipfs-server: {text}", file=sys.stderr, flush=True)
    return code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """End at the first signal; those that follow do not cut the orderly end short.

    While libraries are imported there is nothing to put in order, and an exception would be
    printed, or lost, by extension modules that import others.
    """
    global _stopping
    folders: Any = sys.modules.get("fedipfs.server.folder")
    opened = hasattr(folders, "RunFolder") and folders.RunFolder.latest is not None
    if _stopping is None:
        _stopping = time.monotonic()
        if _loaded or opened:
            raise KeyboardInterrupt
        _exit_at_once(_nothing)
    elif time.monotonic() - _stopping > _PATIENCE_S:
        _exit_at_once(_what_is_left())


def _exit_at_once(words: str) -> None:
    cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a live display may have hidden it
    os.write(sys.stderr.fileno(), f"{cursor}fedipfs-server: {words}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    main()
