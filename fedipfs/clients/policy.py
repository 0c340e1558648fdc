"""What a site allows: the section `policy` of its site.yaml, as decisions without I/O.

A refusal is a PolicyRefused whose text begins with the rule's name in that file. The coordinator
sees it, so it says no more than the rule needs: not how many examples are here, not whom else the
site works for. gate.py says what each message is asked for, and applies this.

Rules and the work that they are for:

coordinators       all
tasks              to train, to evaluate, to say what the site offers
max_parameters     to train, to evaluate, to fetch a model ahead of its round
min_cohort         to train
min_examples       to train, to evaluate
hours              to train, to evaluate, to fetch
rounds_per_hour    to train
secagg.required    to train, to evaluate
privacy            to train, to evaluate

What is for training is for the first stage of secure aggregation, too: who may not train does not
share keys. Its later stages finish what was begun, whatever the time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from enum import Enum
from typing import Any, NamedTuple, NoReturn

from fedipfs.clients.demands import Demands
from fedipfs.errors import ConfigError, PolicyRefused, one_line

_MOST = 10**12
_SECAGG = (
    "required",
    "min_clients",
    "min_threshold",
    "min_neighbours",
    "min_colluders",
    "clip_min",
    "clip_max",
    "parameters",
)
_TIME = r"([01]\d|2[0-3]):([0-5]\d)|24:00"
_WINDOW = re.compile(rf"\s*({_TIME})\s*-\s*({_TIME})\s*")


class Work(Enum):
    """What a message asks for."""

    TRAIN = "trains"
    BEGIN = "begins to train"  # the first stage of secure aggregation
    STAGE = "goes on"  # its other stages, but for the one that trains
    EVALUATE = "evaluates"
    OFFER = "offers"  # what a node has, for the choice of a cohort
    FETCH = "fetches models"  # of the next round, ahead of it


class Asked(NamedTuple):
    """What a message asks for, and what is known here.

    `task` is its target, None where the message names none; `parameters` are the values of the
    largest array record that came; `cohort` is how many are asked in the round, None where that is
    not said; `examples` are those that are trained on here. `private`: what leaves is noised here,
    record by record or as a part of a noised sum; `masked`: it leaves under masks. `now` is local
    time, aware; `trained` are the times of recent messages to train; `held_out` are the examples
    that are evaluated on, None where none are to be.
    """

    work: Work
    coordinator: str
    task: str | None
    parameters: int
    cohort: int | None
    examples: int
    private: bool
    masked: bool
    now: datetime
    trained: Sequence[datetime] = ()
    held_out: int | None = None


class Window(NamedTuple):
    """Minutes of a day, from `start` until just before `end`; over midnight if `end` is less."""

    start: int
    end: int

    def __contains__(self, minute: object) -> bool:
        assert isinstance(minute, int)
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def __str__(self) -> str:
        return f"from {_clock(self.start)} to {_clock(self.end)}"


class Budget(NamedTuple):
    """What the site's records may spend in privacy, in all."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Policy:
    """The rules of a site, checked.

    tasks            targets that may be trained; nothing else is imported
    max_parameters   of a model that comes
    min_cohort       of clients asked in a round
    min_examples     to train on here, or nothing is trained; to evaluate on, if it is above 1
    coordinators     organizations; None: every coordinator in the trust list
    hours            of local time; empty: always
    rounds_per_hour  messages to train; None: any number
    secagg           demands.py's keys and values, without "secagg-" and with _ for -
    privacy          None: not asked for
    """

    tasks: tuple[str, ...]
    max_parameters: int = 20_000_000
    min_cohort: int = 2
    min_examples: int = 1
    coordinators: tuple[str, ...] | None = None
    hours: tuple[Window, ...] = ()
    rounds_per_hour: int | None = None
    secagg: tuple[tuple[str, bool | int | float | str], ...] = ()
    privacy: Budget | None = None

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Policy:
        """The policy in a site's configuration; keys that are not there have their defaults.

        Raises ConfigError, also for a key that is not known: a rule that is misspelt is not
        dropped.
        """
        _known(section, tuple(cls.__dataclass_fields__), "policy")
        given = dict(section)
        rules: dict[str, Any] = {"tasks": _tasks(given.pop("tasks", None))}
        for name in ("max_parameters", "min_cohort", "min_examples"):
            if name in given:
                rules[name] = _whole(name, given.pop(name))
        if (most := given.pop("rounds_per_hour", None)) is not None:
            rules["rounds_per_hour"] = _whole("rounds_per_hour", most)
        if (names := given.pop("coordinators", None)) is not None:
            rules["coordinators"] = _names("coordinators", names)
        if (hours := given.pop("hours", None)) is not None:
            rules["hours"] = _windows(hours)
        rules["secagg"] = _secagg(given.pop("secagg", None) or {})
        if (budget := given.pop("privacy", None)) is not None:
            rules["privacy"] = _budget(budget)
        return cls(**rules)

    @property
    def requires_masks(self) -> bool:
        """Whether what the site learns leaves under masks or not at all."""
        return dict(self.secagg).get("required") is True

    @property
    def max_bytes(self) -> int:
        """More than any file has with a model of `max_parameters`: 8 bytes each, and 1 MiB."""
        return 8 * self.max_parameters + (1 << 20)

    def node_config(self) -> dict[str, bool | int | float | str]:
        """What of this other code obeys, as it is in a node's configuration.

        See demands.py and private.py; `allowed-targets` are all tasks, with commas.
        """
        found: dict[str, bool | int | float | str] = {"allowed-targets": ",".join(self.tasks)}
        found |= {_demand(name): value for name, value in self.secagg}
        if self.privacy is not None:
            found |= {"ledger-epsilon": self.privacy.epsilon, "ledger-delta": self.privacy.delta}
        return found

    def check_coordinator(self, name: str) -> None:
        """Raises PolicyRefused for a coordinator that the site does not work for."""
        if self.coordinators is not None and name not in self.coordinators:
            _refuse("coordinators", f"this site does not work for {one_line(name, 80)}")

    def check(self, asked: Asked) -> None:
        """Raises PolicyRefused for what the site does not do."""
        self.check_coordinator(asked.coordinator)
        work = asked.work
        if work is Work.STAGE:
            return
        if asked.task is not None:
            self.check_task(asked.task)
        elif work in (Work.TRAIN, Work.EVALUATE, Work.OFFER):
            _refuse("tasks", "the message names no task")
        if asked.parameters > self.max_parameters:
            self.refuse_size(f"{asked.parameters:,} parameters")
        if work in (Work.TRAIN, Work.BEGIN):
            self._check_round(asked)
        # Where there are none at all, others say so.
        if asked.held_out is not None and asked.held_out < self.min_examples > 1:
            _refuse("min_examples", "this site has too few examples to evaluate on")
        if work in (Work.TRAIN, Work.EVALUATE):
            if self.requires_masks and not asked.masked:
                _refuse(
                    "secagg",
                    "what this site learns leaves under masks or not at all: use secagg=on",
                )
            if self.privacy is not None and not asked.private:
                _refuse(
                    "privacy",
                    "nothing leaves this site without noise: run with privacy=dp_sgd, or train "
                    "with privacy=distributed and secagg=on",
                )
        if work is not Work.OFFER and self.hours:
            minute = asked.now.hour * 60 + asked.now.minute
            if not any(minute in window for window in self.hours):
                times = " and ".join(map(str, self.hours))
                does = "trains" if work is Work.BEGIN else work.value
                _refuse("hours", f"this site {does} {times}, and it is {_clock(minute)}")

    def check_task(self, target: str) -> None:
        """Raises PolicyRefused for a task that is none of the site's."""
        if target not in self.tasks:
            _refuse("tasks", f"{one_line(target, 120)} is no task of this site")

    def refuse_size(self, what: str) -> NoReturn:
        """Refuse a model of `what`, which is too large."""
        _refuse(
            "max_parameters",
            f"a model of {what}, and this site takes at most {self.max_parameters:,} parameters",
        )

    def _check_round(self, asked: Asked) -> None:
        among = f"this site trains among at least {self.min_cohort}"
        if asked.cohort is None and self.min_cohort > 1:
            _refuse("min_cohort", f"the message does not say how many are asked, and {among}")
        if asked.cohort is not None and asked.cohort < self.min_cohort:
            _refuse("min_cohort", f"{asked.cohort} are asked in this round, and {among}")
        if asked.examples < self.min_examples:
            _refuse("min_examples", "this site has too few examples to train on")
        if self.rounds_per_hour is not None:
            since = asked.now - timedelta(hours=1)
            # Not those of a clock that was ahead, which would count for as long as it was.
            if sum(since < time <= asked.now for time in asked.trained) >= self.rounds_per_hour:
                times = f"{self.rounds_per_hour} times" if self.rounds_per_hour > 1 else "once"
                _refuse("rounds_per_hour", f"this site trains at most {times} an hour")


def _refuse(rule: str, why: str) -> NoReturn:
    raise PolicyRefused(f"policy.{rule}: {why}")


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def _demand(name: str) -> str:
    """What the node's configuration calls a key of the section `secagg`."""
    return f"secagg-{name.replace('_', '-')}"


def _known(found: object, known: Sequence[str], where: str) -> None:
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}={found!r:.80} should be a section with keys of its own")
    for key in found:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {where}.{near[0]}?" if near else f"use {', '.join(known)}"
            raise ConfigError(f"{where}.{one_line(key, 80)} is not known; {hint}")


def _whole(name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MOST:
        raise ConfigError(f"policy.{name}={value!r:.80} should be a whole number from 1 on")
    return value


def _names(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"policy.{name}={value!r:.80} should be a list with at least one name")
    for each in value:
        if not isinstance(each, str) or not each.strip() or each != one_line(each):
            raise ConfigError(f"policy.{name}: {each!r:.80} should be a name")
    return tuple(value)


def _tasks(value: object) -> tuple[str, ...]:
    targets = _names("tasks", value)
    for target in targets:
        place, _, name = target.rpartition(":")
        if not place or not name.isidentifier() or "," in place:
            raise ConfigError(f"policy.tasks: {target!r:.120} should be module:Class")
    return targets


def _windows(value: object) -> tuple[Window, ...]:
    found = []
    for text in value.split(",") if isinstance(value, str) else [""]:
        ends = _WINDOW.fullmatch(text)
        start, end = map(_minute, (ends[1], ends[4])) if ends else (0, 0)
        if start % 1440 == end % 1440:  # nothing, or all of the day?
            raise ConfigError(
                f'policy.hours={value!r:.80} should be text such as "20:00-06:00", or several '
                'such as "08:00-12:00, 20:00-06:00"; null for always'
            )
        found.append(Window(start % 1440, end))
    return tuple(found)


def _minute(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


def _secagg(section: object) -> tuple[tuple[str, bool | int | float | str], ...]:
    _known(section, _SECAGG, "policy.secagg")
    assert isinstance(section, Mapping)
    for name, value in section.items():
        demand = _demand(name)
        try:
            Demands.of({demand: value})
        except ConfigError as error:
            text = str(error).removeprefix("node configuration: ")
            raise ConfigError(text.replace(demand, f"policy.secagg.{name}")) from None
    return tuple(section.items())


def _budget(section: object) -> Budget:
    _known(section, Budget._fields, "policy.privacy")
    assert isinstance(section, Mapping)
    for name, most in (("epsilon", 1e6), ("delta", 1.0)):
        value = section.get(name)
        # 1e-5 without a point is text in YAML.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
            raise ConfigError(
                f"policy.privacy.{name}={value!r:.80} should be a number above 0, as in "
                "{epsilon: 3.0, delta: 1.0e-5}"
            )
    return Budget(float(section["epsilon"]), float(section["delta"]))
