"""Is this store fit for use? Each check looks at one thing and says how to mend it.

    for finding in examine(checks("runs/store")):
        print(finding.level, finding.text)

What is written for a check is taken away again. The services' checks are in doctor_services.py.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedipfs.errors import FedIPFSError, StoreBadAnswer, StoreFull
from fedipfs.ipld import CID
from fedipfs.observe.summary import size
from fedipfs.store import layout
from fedipfs.store.base import Store
from fedipfs.store.files import TEMPORARY, os_errors
from fedipfs.store.folder import FolderStore
from fedipfs.store.spec import Spec, open_store, options_of

Level = Literal["ok", "warning", "problem"]

DEADLINE_S = 15.0  # of one check
LITTLE, TOO_LITTLE = 10**9, 10**8  # free bytes below which to warn, and which are a problem
TRIAL = 64 << 10  # bytes that are written and read back
PIN = "fedipfs doctor"  # the name of pins that are only tried
_ELSEWHERE = ("nfs", "cifs", "smb", "fuse.sshfs", "9p", "afs", "ceph", "lustre", "glusterfs")
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check of one `part` of the store found; `remedy` says how to mend it, if need be."""

    part: str
    check: str
    level: Level
    text: str
    remedy: str = ""


class Check(NamedTuple):
    """`look` finds something out about a part; it may raise a FedIPFSError."""

    part: str
    name: str
    look: Callable[[], Iterable[Finding]]


def examine(checks: Iterable[Check], deadline_s: float = DEADLINE_S) -> Iterator[Finding]:
    """The findings of each check in turn, as it ends; one that takes too long is a problem."""
    for check in checks:
        yield from _within(check, deadline_s)


def _within(check: Check, deadline_s: float) -> list[Finding]:
    found: list[Finding] = []
    bugs: list[BaseException] = []

    def look() -> None:
        try:
            found.extend(check.look())
        except FedIPFSError as error:  # its message says what to do
            found.append(Finding(check.part, check.name, "problem", str(error)))
        except BaseException as error:
            bugs.append(error)

    # A system call (a dead NFS server, a resolver) can wait for ever; nobody else should.
    thread = threading.Thread(target=look, daemon=True, name=f"fedipfs-doctor-{check.name}")
    thread.start()
    thread.join(deadline_s)
    if bugs:
        raise bugs[0]
    if thread.is_alive():
        late = f"not over after {deadline_s:g} s"
        return [Finding(check.part, check.name, "problem", late, "see whether it hangs or is slow")]
    return found


def checks(spec: Spec) -> Iterator[Check]:
    """What there is to check of the store that `spec` names (see open_store).

    Lazily: when a part cannot be reached, its other checks do not follow.
    """
    options: dict[str, Any] = {}
    yield Check("store", "settings", lambda: options.update(_settings(spec)) or ())
    if not options:
        return
    services = {key: options.pop(key, None) for key in ("kubo", "gateway")}
    kind = options["kind"]
    if kind in services:
        services[kind] = options
    else:
        yield from Folder(options, spare=services["kubo"] is not None).checks()
    if services["kubo"] is not None:
        from fedipfs.store.doctor_services import Node

        yield from Node({**services["kubo"], "kind": "kubo"}).checks()
    if kind == "gateway" or (services["gateway"] or {}).get("urls"):
        from fedipfs.store.doctor_services import gateway_checks

        yield from gateway_checks({**services["gateway"], "kind": "gateway"})


def _settings(spec: Spec) -> dict[str, Any]:
    """The options of a store; those of a cached one checked, its parts' apart from theirs."""
    options = options_of(spec)
    if options["kind"] != "cached":
        return options
    parts = {key: options.get(key) for key in ("kubo", "gateway")}
    without = {key: None if isinstance(part, Mapping) else part for key, part in parts.items()}
    with tempfile.TemporaryDirectory() as place:
        open_store({**options, **without, "path": f"{place}/store"})
    own = {key: options.get(key) for key in ("kind", "path", "max_bytes")}
    return {**own, **parts}


class Folder:
    """The checks of a folder store, which need not be there yet.

    With `spare` it is in front of a node: then it may be full, as nothing is lost.
    """

    def __init__(self, options: Mapping[str, Any], *, spare: bool = False) -> None:
        self.options = {**options, "kind": "folder", "durable": False}
        self.path, self.spare = Path(options["path"]), spare
        self._usable = False

    def checks(self) -> Iterator[Check]:
        """Can it be used? The others only then."""
        yield Check("folder", "usable", self.usable)
        if self._usable:
            yield Check("folder", "files", self.files)
            yield Check("folder", "space", self.space)

    def usable(self) -> Iterator[Finding]:
        """A block goes in, comes back the same, is pinned and unpinned."""
        with os_errors(str(self.path)):
            new = not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
            if new:
                place = tempfile.mkdtemp(prefix=TEMPORARY, dir=self._nearest())
                try:
                    self._try(f"{place}/store", create=True)
                finally:
                    shutil.rmtree(place, ignore_errors=True)
            else:
                try:
                    self._try(str(self.path), create=False)
                except StoreFull as error:
                    if not self.spare:
                        raise
                    yield Finding("folder", "usable", "warning", str(error))
        self._usable = True
        what = "can be written and read"
        if new:
            what = "is not there yet; the first to write makes it"
        yield Finding("folder", "usable", "ok", f"{self.path} {what}")

    def _try(self, path: str, *, create: bool) -> None:
        store = open_store({**self.options, "path": path, "create": create})
        block = secrets.token_bytes(TRIAL)
        try:
            read_back(store, block)
            store.pin(CID.of(block), PIN)
            store.unpin(CID.of(block), PIN)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(layout.block_path(f"{path}/blocks", CID.of(block)))

    def files(self) -> Iterator[Finding]:
        """What kind of file system it lies on."""
        kind = _file_system(self._nearest())
        if kind.startswith(_ELSEWHERE):
            yield Finding(
                "folder",
                "files",
                "warning",
                f"on {kind}, another machine's file system: locks and syncs may not hold",
                "keep it on a disk of this machine, and share blocks by store=kubo",
            )
        elif kind in _IN_MEMORY:
            yield Finding(
                "folder",
                "files",
                "warning",
                f"on {kind}, in memory: all of it is gone when the machine restarts",
                "name a folder on a disk as store.path",
            )
        elif kind:
            yield Finding("folder", "files", "ok", f"on {kind}")

    def space(self) -> Iterator[Finding]:
        """What is free on the disk and below the cap."""
        with os_errors(str(self.path)):
            free = shutil.disk_usage(self._nearest()).free
        yield free_space("folder", free, "on its disk", "free some space, or `fedipfs store gc`")
        limit = self.options.get("max_bytes")
        if limit:
            used = FolderStore(self.path, create=False).stat().bytes if self.path.exists() else 0
            scarce = limit - used < limit // 10 and not self.spare
            yield Finding(
                "folder",
                "cap",
                "warning" if scarce else "ok",
                f"{size(used)} of at most {size(limit)} are taken",
                "raise store.max_bytes, or unpin and `fedipfs store gc`" if scarce else "",
            )

    def _nearest(self) -> Path:
        """The folder, or the nearest above it that is there."""
        path = self.path.absolute()
        return next(folder for folder in (path, *path.parents) if folder.exists())


def read_back(store: Store, block: bytes) -> None:
    """Put a block, hand it over, and get it again. Raises StoreError unless CID and bytes fit."""
    cid = store.put(block)
    store.publish()
    if cid != CID.of(block) or store.get(cid) != block:
        raise StoreBadAnswer(f"block {CID.of(block)} came back as other bytes; use another store")


def free_space(part: str, free: int, where: str, remedy: str) -> Finding:
    """What `free` bytes mean."""
    level: Level = "ok" if free >= LITTLE else "warning" if free >= TOO_LITTLE else "problem"
    text = f"{size(max(free, 0))} free {where}"
    return Finding(part, "space", level, text, "" if level == "ok" else remedy)


def _file_system(path: Path) -> str:
    """The type of the file system that holds a folder; "" where the system does not tell."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    real, best, found = os.path.realpath(path), -1, ""
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        inside = place == "/" or real == place or real.startswith(f"{place}/")
        if inside and len(place) >= best:  # what was mounted later lies above
            best, found = len(place), kind
    return found
