"""Where the log goes while a run is under way."""

from __future__ import annotations

import logging
from pathlib import Path

from fedipfs.flower_compat import flower_logger


class LogFile:
    """Sends the log to a run's log.txt."""

    def __init__(self, path: Path) -> None:
        self._handler = logging.FileHandler(path, encoding="utf-8")
        self._handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
        self._root = logging.getLogger()

    def __enter__(self) -> None:
        self._level = self._root.level
        self._root.addHandler(self._handler)
        self._root.setLevel(logging.INFO)

    def __exit__(self, *_: object) -> None:
        self._root.removeHandler(self._handler)
        self._root.setLevel(self._level)
        self._handler.close()


class QuietFlower:
    """Takes Flower's log off the terminal; it goes where the root logger's goes."""

    def __enter__(self) -> None:
        self._logger = flower_logger()
        self._before = (self._logger.handlers, self._logger.propagate)
        self._logger.handlers, self._logger.propagate = [logging.NullHandler()], True

    def __exit__(self, *_: object) -> None:
        self._logger.handlers, self._logger.propagate = self._before
