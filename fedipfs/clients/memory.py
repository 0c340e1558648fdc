"""What a site remembers of a run between its messages (`Context.state`), kept at the site.

By coordinator, run and round: a coordinator that resumes, and asks a round again, gets what it
would have got, and none gets, replaces or crowds out what was made for another.
The records themselves are in the store, for this party alone (see state.py), and pinned, so that a
garbage collection leaves them. The file here only says which they are.
"""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import RecordDict

from fedipfs.clients.state import load_state, save_state
from fedipfs.errors import ConfigError
from fedipfs.exchange import Vault
from fedipfs.ipld import CID
from fedipfs.store import dag
from fedipfs.trust import files

_ROUNDS = 3  # of a run that are kept
_RUNS = 16  # the last ones trained for, of each coordinator
_HOLD = "fedipfs/hold/v1"
_MAX_FILE = 1 << 20  # bytes
_Runs = dict[str, dict[int, tuple[str, str]]]


class Memory:
    """The states of one site, `path` being the file that names them. For one process at a time.

    Raises ConfigError for a file that is none.
    """

    def __init__(self, path: Path, vault: Vault, organization: str) -> None:
        self._path, self._vault, self._organization = path, vault, organization
        self._found = _read(path)

    def load(self, by: str, run: str, number: int) -> RecordDict:
        """What the last round before round `number` of the coordinator `by` left, or nothing."""
        rounds = self._found.get(by, {}).get(run, {})
        before = [each for each in rounds if each < number]
        state = CID.parse(rounds[max(before)][0]) if before else None
        return load_state(self._vault, state)

    def save(self, by: str, run: str, number: int, state: RecordDict) -> None:
        """Keep what a message to train left, in the place of this round and those after it.

        `by` is the coordinator that signed the message, which has been checked.
        """
        before = self._found.get(by, {})
        rounds = before.get(run, {})
        if not state and not rounds:
            return  # most strategies leave nothing
        root, *others = save_state(self._vault, state)
        store = self._vault.store
        hold = dag.put_record(store, {"type": _HOLD, "links": [root, *others]})
        store.pin(hold, self._name(by, run, number))
        kept = {each: of for each, of in rounds.items() if each < number}
        for old in sorted(kept)[: 1 - _ROUNDS]:
            del kept[old]
        kept[number] = (str(root), str(hold))
        runs = {each: of for each, of in before.items() if each != run}
        for oldest in list(runs)[: max(0, len(runs) + 1 - _RUNS)]:
            del runs[oldest]
        now = {**runs, run: kept}
        self._found = {**self._found, by: now}
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_whole(self._path, json.dumps(self._found))
        for each, of in before.items():
            for old, (_, pinned) in of.items():
                there = now.get(each, {}).get(old)
                if there is None or there[1] != pinned:
                    store.unpin(CID.parse(pinned), self._name(by, each, old))

    def _name(self, by: str, run: str, number: int) -> str:
        """Of a pin; several organizations may share one store."""
        return f"{self._organization}/{by}/{run}/state/{number}"


def _read(path: Path) -> dict[str, _Runs]:
    """The CIDs of each round's state, and of the record that holds all it leads to."""
    if not path.exists():
        return {}
    text = files.read(path, ConfigError, limit=_MAX_FILE)
    try:
        return {
            str(by): {
                str(run): {int(at): (str(root), str(hold)) for at, (root, hold) in of.items()}
                for run, of in runs.items()
            }
            for by, runs in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"{path} is damaged: move it away; what was remembered of runs is then lost"
        ) from None
