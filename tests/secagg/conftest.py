"""A cohort in one process: a server, clients that forget all but their journals, and a store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedipfs.ipld import CID
from fedipfs.secagg import (
    Client,
    Floors,
    Journal,
    Parameters,
    Request,
    Result,
    Roster,
    Server,
    Session,
    Survivors,
)
from fedipfs.trust import Identity, Member, Statement, TrustList, sign, verify

NOW = datetime(2026, 6, 1, tzinfo=UTC)


@cache
def identity(name: str) -> Identity:
    return Identity.new(name)


class World:
    """Clients `a00`, `a01`, ... and their vectors; `store` holds what was masked, by CID."""

    def __init__(
        self, folder: Path, clients: int = 5, values: int = 40, round: int = 1, **options: Any
    ) -> None:
        names = tuple(f"a{number:02}" for number in range(clients))
        parameters = Parameters.choose(clients, values, encoding="any", **options)
        self.folder, self.names = folder, names
        self.session = Session("run", round, names, parameters)
        self.listed = TrustList(Member(identity(name).public, "participant") for name in names)
        self.server = Server(self.session, self.verify)
        random = np.random.default_rng(7)
        self.vectors = {
            name: random.integers(0, 1 << 32, parameters.dimension, np.uint32) for name in names
        }
        self.store: dict[str, np.ndarray] = {}
        self.roster: Roster
        self.survivors: Survivors
        self.request: Request

    def verify(self, organization: str, statement: Statement, signature: bytes) -> None:
        verify(self.listed, organization, "participant", statement, signature, NOW)

    def sign(self, name: str) -> Callable[[Statement], bytes]:
        return lambda statement: sign(identity(name), statement)

    def client(
        self, name: str, session: Session | None = None, floors: Floors | None = None
    ) -> Client:
        """The client as another process would find it."""
        session = session or self.session
        journal = Journal(self.folder / name, session, durable=False)
        return Client(session, name, self.sign(name), self.verify, floors or Floors(), journal)

    def put(self, vector: np.ndarray) -> str:
        reference = str(CID.of(vector.tobytes()))
        self.store[reference] = vector.copy()
        return reference

    def advertise(self, without: Collection[str] = ()) -> Roster:
        for name in self._but(self.names, without):
            self.server.take(self.client(name).advertise())
        self.roster = self.server.close_advertise()
        return self.roster

    def share(self, without: Collection[str] = ()) -> None:
        for name in self._but(self.server.missing(), without):
            self.server.take(self.client(name).share(self.roster))
        self.deliveries = self.server.close_share()

    def mask(self, without: Collection[str] = ()) -> Survivors:
        for name in self._but(self.server.missing(), without):
            vector = self.vectors[name].copy()
            message = self.client(name).mask(self.deliveries[name], vector, self.put)
            self.server.take(message, vector)
        self.survivors = self.server.close_masked()
        return self.survivors

    def confirm(self, without: Collection[str] = ()) -> Request:
        for name in self._but(self.server.missing(), without):
            self.server.take(self.client(name).confirm(self.survivors))
        self.request = self.server.close_confirm()
        return self.request

    def unmask(self, without: Collection[str] = ()) -> Result:
        for name in self._but(self.server.missing(), without):
            self.server.take(self.client(name).unmask(self.request))
        return self.server.result()

    def until(self, stage: str, **without: Collection[str]) -> World:
        """Play all stages before `stage`, each without those named for it."""
        for each in ("advertise", "share", "mask", "confirm", "unmask"):
            if each == stage:
                break
            getattr(self, each)(without.get(each, ()))
        return self

    def play(self, **without: Collection[str]) -> Result:
        """A whole round."""
        return self.until("unmask", **without).unmask(without.get("unmask", ()))

    def sum(self, names: Iterable[str]) -> np.ndarray:
        """What the round must give."""
        return np.sum([self.vectors[name] for name in names], axis=0, dtype=np.uint32)

    @staticmethod
    def _but(names: Iterable[str], without: Collection[str]) -> list[str]:
        return [name for name in names if name not in without]


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    """Makes worlds; each in a folder of its own."""
    numbers = iter(range(1 << 30))

    def make(**options: Any) -> World:
        return World(tmp_path / f"world-{next(numbers)}", **options)

    return make
