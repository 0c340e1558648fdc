"""What training would see of a site's own data. Everything happens here: nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedipfs import tasks
from fedipfs.data import Examples
from fedipfs.data.blocks import listed
from fedipfs.data.own import Reading, Source
from fedipfs.errors import ConfigError, one_line
from fedipfs.privacy.fingerprint import digests, fingerprint
from fedipfs.tasks import Task

if TYPE_CHECKING:
    from fedipfs.clients.site import SiteFile

BATCH = 32
_SHOWN = 20  # columns, and classes
_MOST_LABELS = 100_000
_LARGE = 2**24  # from here on float32 leaves whole numbers out


@dataclass(frozen=True)
class Values:
    """Of the numbers in some inputs."""

    least: float
    most: float
    mean: float

    def __str__(self) -> str:
        return f"{self.least:.6g} to {self.most:.6g}, mean {self.mean:.6g}"


@dataclass(frozen=True)
class Side:
    """What is there to train on, or to test on; `labels` counts the examples of each."""

    count: int
    shape: tuple[int, ...]
    dtype: str
    values: Values | None
    columns: Mapping[str, Values]
    labels: Mapping[int, int]


@dataclass(frozen=True)
class Fit:
    """Whether a task, with its default options, takes the data: if not, `problem` says why.

    `outputs` are the classes that its model tells apart, None where it gives something else.
    """

    target: str
    parameters: int | None = None
    outputs: int | None = None
    loss: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """What was found. `name` is the data set's in the site's privacy ledger: whoever can guess the
    data can check the guess with it, so it stays here."""

    reading: Reading
    format: str
    train: Side
    test: Side
    fits: tuple[Fit, ...]
    name: str
    warnings: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What has to be put right before a task can be trained."""
        return tuple(f"{fit.target}: {fit.problem}" for fit in self.fits if fit.problem)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def check(site: SiteFile) -> Report:
    """What the site's own data are, and which of the tasks that it allows take them.

    Raises ConfigError and DataError, as Source does.
    """
    policy = site.policy
    return examine(
        site.data,
        policy.tasks,
        max_parameters=policy.max_parameters,
        min_examples=policy.min_examples,
    )


def examine(
    source: Source,
    targets: Sequence[str],
    *,
    max_parameters: int | None = None,
    min_examples: int = 1,
) -> Report:
    """As `check`, of `source` and the tasks that `targets` name: their code is run."""
    reading = source.read()
    train, test = reading.dataset.train, reading.dataset.test
    names = source.inputs if isinstance(source.inputs, tuple) else ()
    warnings = list(_warnings(source, reading, names))
    if len(train) < min_examples:
        warnings.append(
            f"policy.min_examples={min_examples}: nothing is trained on {len(train)} examples"
        )
    return Report(
        reading=reading,
        format=source.format,
        train=_side(train, names),
        test=_side(test, names),
        fits=tuple(_fit(target, reading, max_parameters) for target in targets),
        name=fingerprint(train.inputs, train.targets),
        warnings=tuple(warnings),
    )


# ---- the data


def _side(examples: Examples, names: Sequence[str]) -> Side:
    inputs = examples.inputs
    labels, counts = np.unique(examples.targets, return_counts=True)
    return Side(
        count=len(examples),
        shape=inputs.shape,
        dtype=str(inputs.dtype),
        values=_values(inputs) if inputs.size else None,
        columns={name: _values(inputs[:, i]) for i, name in enumerate(names) if inputs.size},
        labels={int(label): int(count) for label, count in zip(labels, counts, strict=True)},
    )


def _values(array: NDArray[Any]) -> Values:
    return Values(float(array.min()), float(array.max()), float(array.mean(dtype=np.float64)))


def _warnings(source: Source, reading: Reading, names: Sequence[str]) -> Sequence[str]:
    found = []
    train, test = reading.dataset.train, reading.dataset.test
    known = len(reading.classes) if reading.classes else int(train.targets.max()) + 1
    there = np.unique(train.targets)
    missing = sorted(set(range(min(known, _MOST_LABELS))) - set(there.tolist()))
    if missing:
        found.append(
            f"to train on there is no example of {listed([_label(reading, i) for i in missing])}"
        )
    if more := [_label(reading, i) for i in np.unique(test.targets) if i >= known]:
        found.append(f"only to test on there are examples of {listed(more)}")
    if names and len(train) > 1:
        flat = [names[int(i)] for i in np.flatnonzero(np.ptp(train.inputs, axis=0) == 0)]
        if flat:
            found.append(f"the same in all examples to train on: {listed(flat)}")
    if large := _large(reading, names or (str(source.inputs),)):
        found.append(
            f"whole numbers of {_LARGE:,} and more, which float32 does not tell apart: "
            f"{listed(large)}"
        )
    if source.format == "images" and source.classes is None:
        found.append(
            "classes are numbered by the folders that this site has; give data.classes so that all "
            "sites number them alike"
        )
    seen = set(digests(train.inputs, train.targets))
    if twice := len(train) - len(seen):
        found.append(f"{twice:,} of {len(train):,} examples to train on are copies of others")
    tested = digests(test.inputs, test.targets) if len(test) else ()
    if both := sum(each in seen for each in tested):
        found.append(f"{both:,} of {len(test):,} examples to test on are among those to train on")
    if reading.unassigned:
        found.append(f"{reading.unassigned:,} rows are in no part of data.split, and not used")
    return found


def _large(reading: Reading, names: Sequence[str]) -> Sequence[str]:
    """The inputs whose values are all whole, and some too large for float32 to hold each."""
    found = set()
    for side in _sides(reading):
        arrays = side.inputs.T if len(names) > 1 else [side.inputs]
        for name, array in zip(names, arrays, strict=True):
            most = max(-float(array.min()), float(array.max())) if array.size else 0
            if most >= _LARGE and (np.floor(array) == array).all():
                found.add(name)
    return [name for name in names if name in found]


def _label(reading: Reading, number: int) -> str:
    if reading.classes and number < len(reading.classes):
        return f"{number} ({one_line(reading.classes[number], 40)})"
    return str(number)


# ---- the tasks


def _fit(target: str, reading: Reading, max_parameters: int | None) -> Fit:
    """Try one batch: the first examples, and the one with the highest label."""
    try:
        task = tasks.load(target, allowed=[target.rpartition(":")[0]])
    except ConfigError as error:
        return Fit(target, problem=str(error))
    train = reading.dataset.train
    rows = np.unique([*range(min(BATCH, len(train))), int(np.argmax(train.targets))])
    step, parameters = "makes no model", None
    try:
        model = task.model().eval()
        parameters = sum(each.numel() for each in model.parameters())
        if max_parameters is not None and parameters > max_parameters:
            problem = f"policy.max_parameters={max_parameters} is less than its parameters"
            return Fit(target, parameters, problem=problem)
        step = f"does not take inputs of the shape {_shape(train.inputs.shape[1:])}"
        inputs = task.inputs(train.inputs[rows])
        with torch.inference_mode():
            output = model(inputs)
            outputs = int(output.shape[1]) if output.ndim == 2 else None
            most = max(int(each.targets.max()) for each in _sides(reading) if len(each))
            if outputs is not None and outputs > 1 and most >= outputs:
                problem = f"its {outputs} outputs are for the labels 0 to {outputs - 1}, and there "
                problem += f"is the label {_label(reading, most)}"
                return Fit(target, parameters, outputs, problem=problem)
            step = "does not take the labels"
            loss = float(_loss(task, output, train.targets[rows]))
    except Exception as error:  # a task's code may fail in any way
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        return Fit(target, parameters, problem=f"{step} ({reason})")
    if not np.isfinite(loss):
        return Fit(target, parameters, outputs, loss, f"the loss of a new model is {loss}")
    return Fit(target, parameters, outputs, loss)


def _loss(task: Task, output: torch.Tensor, targets: NDArray[np.int64]) -> torch.Tensor:
    target = task.targets(targets)
    task.metrics(output, target)
    return task.loss(output, target)


def _sides(reading: Reading) -> tuple[Examples, Examples]:
    return reading.dataset.train, reading.dataset.test


# ---- the text


def _lines(report: Report) -> Sequence[str]:
    reading = report.reading
    lines = [
        "Nothing of this leaves this machine.",
        "",
        f"{report.format}: {_count(reading.files, 'file')}, {_count(reading.rows, 'row')}"
        + (f", of which data.filter leaves out {reading.filtered:,}" if reading.filtered else ""),
    ]
    for title, side in (("to train on", report.train), ("to test on", report.test)):
        lines += ["", f"{title}: {_count(side.count, 'example')}"]
        if not side.count:
            continue
        lines.append(f"  inputs   {_shape(side.shape)} of {side.dtype}, {side.values}")
        lines += _cut([f"    {_name(name)}  {each}" for name, each in side.columns.items()])
        lines.append("  labels")
        lines += _cut(
            [
                f"    {_label(reading, label)}  {count:,} ({count / side.count:.1%})"
                for label, count in side.labels.items()
            ]
        )
    lines += ["", "tasks that policy.tasks allows, with their default options:"]
    lines += [f"  {line}" for fit in report.fits for line in _task_lines(fit)]
    lines += ["", f"in the privacy ledger these data are {report.name}"]
    if report.warnings:
        lines += ["", "look at this:", *(f"  {each}" for each in report.warnings)]
    return lines


def _task_lines(fit: Fit) -> Sequence[str]:
    facts = [] if fit.parameters is None else [f"{fit.parameters:,} parameters"]
    if fit.outputs is not None:
        facts.append(f"{fit.outputs} outputs")
    if fit.problem is None:
        facts.append(f"takes the data, and a new model's loss is {fit.loss:.4g}")
    lines = [f"{fit.target}: {', '.join(facts)}" if facts else fit.target]
    return lines if fit.problem is None else [*lines, f"  DOES NOT FIT: {fit.problem}"]


def _cut(lines: Sequence[str]) -> Sequence[str]:
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"    and {more} more"]


def _name(name: str) -> str:
    return one_line(name, 40)


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
