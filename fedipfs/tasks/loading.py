"""From `task.target` in the configuration to a Task.

A target is code that runs with the rights of whoever loads it, so only targets that are allowed
are imported: those of this package, and what the person at this machine adds.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fedipfs.errors import ConfigError
from fedipfs.tasks.base import Task

ALLOWED = ("fedipfs.tasks.",)


def load(
    target: str, options: Mapping[str, Any] | None = None, *, allowed: Sequence[str] = ALLOWED
) -> Task:
    """The task that `target`, "module:Class" or "path/to/file.py:Class", names.

    Each of `allowed` is a module ("hospital.tasks"), a package and all in it ("hospital."), a
    file ("tasks/scans.py"), or a folder and all in it ("tasks/"). Nothing is imported before
    that check. Raises ConfigError where the target is not allowed, not found, fails to import,
    is no Task, or does not take `options`, its constructor's keywords.
    """
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"task.target={target} should be module:Class or path/to/file.py:Class")
    is_file = place.endswith(".py")
    if not is_file and not all(part.isidentifier() for part in place.split(".")):
        raise ConfigError(f"task.target={target} names neither a module nor a .py file")
    if not any(_permits(entry, place, is_file) for entry in allowed):
        raise ConfigError(
            f"task.target={target} is not allowed here (allowed: {', '.join(allowed) or 'none'});"
            " add its module or file to the allowed tasks if you trust its code"
        )
    try:
        module = _from_file(Path(place)) if is_file else importlib.import_module(place)
    except Exception as error:  # a task's file may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"task.target={target} cannot be imported ({reason})") from error
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise ConfigError(f"task.target={target}: {place} has no class {name} derived from Task")
    given = dict(options or {})
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"task.options={given} do not fit {target} ({reason})") from error


def _permits(entry: str, place: str, is_file: bool) -> bool:
    if entry.endswith((".py", "/")):
        if not is_file:
            return False
        path, named = Path(place).resolve(), Path(entry).resolve()
        return named in path.parents if entry.endswith("/") else path == named
    if is_file:
        return False
    return place.startswith(entry) if entry.endswith(".") else place == entry


def _from_file(path: Path) -> ModuleType:
    path = path.resolve()
    name = f"fedipfs_task_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as an import does: dataclasses look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
