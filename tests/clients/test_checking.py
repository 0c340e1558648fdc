"""What `fedipfs-client check` says of a site's data: real sets, real tasks, and mistakes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedipfs import data
from fedipfs.clients.checking import check, examine
from fedipfs.clients.policy import Policy
from fedipfs.data.own import Source
from fedipfs.errors import DataError
from fedipfs.privacy.fingerprint import fingerprint

DIGITS = "fedipfs.tasks.small:Digits"
MNIST = "fedipfs.tasks.vision:Mnist"
CANCER = "fedipfs.tasks.small:BreastCancer"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Source:
    """scikit-learn's digits as .npz files, a part to train and a part to test on."""
    folder = tmp_path_factory.mktemp("digits")
    real = data.load("digits")
    for name, part in (("train", real.train), ("test", real.test)):
        np.savez(folder / f"{name}.npz", image=part.inputs, digit=part.targets)
    split = {"train": "train.npz", "test": "test.npz"}
    section = {"format": "numpy", "inputs": "image", "target": "digit", "split": split}
    return Source.of(section, folder)


def csv(tmp_path: Path, text: str, **section) -> Source:
    (tmp_path / "x.csv").write_text(text)
    return Source.of({"format": "csv", "path": "x.csv", "target": "y", **section}, tmp_path)


def test_digits_as_training_would_see_them(digits):
    found = examine(digits, [DIGITS, MNIST])
    real = data.load("digits").train
    assert (found.train.count, found.test.count) == (1442, 355)
    assert (found.train.shape, found.train.dtype) == ((1442, 8, 8), "uint8")
    assert found.train.values is not None
    assert (found.train.values.least, found.train.values.most) == (0, 16)
    assert found.train.values.mean == pytest.approx(real.inputs.mean())
    assert found.train.labels == {i: int((real.targets == i).sum()) for i in range(10)}
    assert found.name == fingerprint(real.inputs, real.targets)
    assert found.warnings == ()
    good, bad = found.fits
    assert (good.parameters, good.outputs, good.problem) == (4810, 10, None)
    assert good.loss == pytest.approx(np.log(10), abs=0.3)
    assert bad.parameters == 77_938 and "does not take inputs of the shape (8, 8)" in str(
        bad.problem
    )
    assert found.problems == (f"{MNIST}: {bad.problem}",)
    text = str(found)
    for line in (
        "Nothing of this leaves this machine.",
        "numpy: 2 files, 1,797 rows",
        "to train on: 1,442 examples",
        "  inputs   (1442, 8, 8) of uint8, 0 to 16, mean 4.",
        "to test on: 355 examples",
        f"  {DIGITS}: 4,810 parameters, 10 outputs, takes the data",
        "    DOES NOT FIT: does not take inputs",
        f"in the privacy ledger these data are {found.name}",
    ):
        assert line in text
    assert "look at this" not in text


def test_measurements_by_name(tmp_path):
    real = data.load("breast_cancer").train
    names = [f"m{i}" for i in range(30)]
    rows = [
        ",".join([*map(repr, x.tolist()), "mb"[y]])
        for x, y in zip(real.inputs, real.targets, strict=True)
    ]
    text = "\n".join([",".join([*names, "y"]), *rows])
    found = examine(csv(tmp_path, text, inputs=names, classes=["m", "b"]), [CANCER])
    assert found.problems == () and found.fits[0].parameters == 530
    assert list(found.train.columns) == names
    assert found.train.columns["m3"].mean == pytest.approx(real.inputs[:, 3].mean(), abs=1e-6)
    text = str(found)
    assert "    m0  " in text and "    and 10 more" in text and "m25" not in text
    assert "    0 (m)  170 (37.3%)" in text and "    1 (b)  286 (62.7%)" in text
    assert "to test on: 0 examples" in text


def test_what_a_partner_should_look_at(tmp_path):
    text = "a,b,y,part\n1,0,x,t\n1,2,x,t\n1,2,x,t\n1,2,x,e\n1,2,x,\n9,9,z,t\n"
    source = csv(
        tmp_path,
        text,
        inputs=["a", "b"],
        classes=["w", "x"],
        split={"column": "part", "train": ["t"], "test": ["e"]},
        filter="y != 'z'",
    )
    found = examine(source, [], min_examples=4)
    assert [each.partition(":")[0] for each in found.warnings] == [
        "to train on there is no example of 0 (w)",
        "the same in all examples to train on",
        "1 of 3 examples to train on are copies of others",
        "1 of 1 examples to test on are among those to train on",
        "1 rows are in no part of data.split, and not used",
        "policy.min_examples=4",
    ]
    assert "the same in all examples to train on: a" in str(found)
    assert "csv: 1 file, 6 rows, of which data.filter leaves out 1" in str(found)


def test_whole_numbers_that_float32_does_not_hold_are_named(tmp_path):
    text = "a,b,c,y\n16777217,1,3e8,0\n1,16777215,0.5,1\n"
    (warning,) = examine(csv(tmp_path, text, inputs=["a", "b", "c"]), []).warnings
    assert warning == "whole numbers of 16,777,216 and more, which float32 does not tell apart: a"
    (warning,) = examine(csv(tmp_path, text, inputs="a"), []).warnings
    assert warning.endswith(": a")
    assert examine(csv(tmp_path, text, inputs=["b"]), []).warnings == ()


def test_labels_that_a_task_does_not_have_are_named_before_the_loss_is(tmp_path):
    columns = ",".join(f"m{i}" for i in range(30))
    text = f"{columns},y\n" + "".join(f"{'0,' * 30}{label}\n" for label in (0, 1, 7))
    source = csv(tmp_path, text, inputs=columns.split(","))
    (fit,) = examine(source, [CANCER]).fits
    assert fit.problem == "its 2 outputs are for the labels 0 to 1, and there is the label 7"
    split = {"column": "y", "train": [0, 1], "test": [7]}
    source = csv(tmp_path, text, inputs=columns.split(","), split=split)
    found = examine(source, [CANCER])
    assert "there is the label 7" in str(found.fits[0].problem)
    assert any("only to test on there are examples of 7" in each for each in found.warnings)


TASK = """
import torch
from fedipfs.tasks import Task
class Own(Task):
    def data(self, *, root, fallback): raise AssertionError("the data are the site's")
    def model(self): return torch.nn.Linear(2, 1)
    def targets(self, array): return torch.tensor(array, dtype=torch.float32)
    def loss(self, output, target): return ((output[:, 0] - target) ** 2).mean()
    def metrics(self, output, target): return {}
class Broken(Own):
    def model(self): raise RuntimeError("two\\nlines")
class Infinite(Own):
    def loss(self, output, target): return output.sum() / 0
class Picky(Own):
    def loss(self, output, target): raise ValueError("not these")
class Measuring(Own):
    def metrics(self, output, target): return {"accuracy": output[:, 3]}
"""


def test_tasks_of_all_kinds_are_tried_and_none_ends_the_check(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(TASK)
    source = csv(tmp_path, "a,b,y\n1,2,0\n3,4,9\n", inputs=["a", "b"])
    names = ["Own", "Broken", "Infinite", "Picky", "Measuring", "Missing"]
    targets = [f"{path}:{name}" for name in names]
    found = examine(source, [*targets, "no.such.module:Task", CANCER], max_parameters=400)
    problems = [fit.problem for fit in found.fits]
    assert problems[0] is None  # a regression: one output, any label
    assert problems[1] == "makes no model (RuntimeError: two lines)"
    assert problems[2] in ("the loss of a new model is inf", "the loss of a new model is -inf")
    assert problems[3] == "does not take the labels (ValueError: not these)"
    assert "does not take the labels (IndexError: " in str(problems[4])
    assert "has no class Missing" in str(problems[5])
    assert "cannot be imported" in str(problems[6])
    assert problems[7] == "policy.max_parameters=400 is less than its parameters"
    assert "\n" not in "".join(map(str, problems))
    assert len(found.problems) == 7


def test_nothing_but_the_allowed_tasks_is_imported(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("raise SystemExit('this was run')")
    source = csv(tmp_path, "a,b,y\n1,2,0\n", inputs=["a", "b"])
    assert examine(source, [DIGITS]).fits[0].target == DIGITS


def test_a_site_is_checked_with_its_policy(digits):
    policy = Policy.of({"tasks": [DIGITS, MNIST], "max_parameters": 4000, "min_examples": 2000})
    found = check(SimpleNamespace(data=digits, policy=policy))
    assert [fit.target for fit in found.fits] == [DIGITS, MNIST]
    assert "policy.max_parameters=4000" in str(found.fits[0].problem)
    assert found.warnings[-1].startswith("policy.min_examples=2000")


def test_what_is_wrong_with_the_data_is_said_as_it_is_when_they_are_loaded(tmp_path):
    source = csv(tmp_path, "a,b,y\n1,,0\n", inputs=["a", "b"])
    with pytest.raises(DataError, match=r"x\.csv, row 1, b: is missing"):
        examine(source, [DIGITS])


def test_folders_of_images_say_that_they_number_the_classes(tmp_path):
    from PIL import Image

    for name, shade in (("cat", 0), ("dog", 100)):
        (tmp_path / name).mkdir()
        for i in range(2):
            array = np.full((28, 28), i + shade, np.uint8)
            Image.fromarray(array).save(tmp_path / name / f"{name}{i}.png")
    found = examine(Source.of({"format": "images", "path": "."}, tmp_path), [MNIST])
    assert found.problems == ()
    assert any(each.startswith("classes are numbered by the folders") for each in found.warnings)
    given = Source.of({"format": "images", "path": ".", "classes": ["dog", "cat"]}, tmp_path)
    assert found.name != examine(given, []).name  # other numbers, other records
    assert "    0 (dog)  2 (50.0%)" in str(examine(given, []))


@pytest.mark.mnist
@pytest.mark.skipif(
    not os.environ.get("FEDIPFS_DATA"), reason="set FEDIPFS_DATA to a folder with MNIST to run this"
)
def test_mnist_as_a_folder_of_images(tmp_path):
    from PIL import Image

    real = data.load("mnist", fallback="error").test
    for label in range(10):
        (tmp_path / "png" / str(label)).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(real.inputs, real.targets, strict=True)):
        Image.fromarray(image).save(tmp_path / "png" / str(label) / f"{i:05}.png")
    source = Source.of({"format": "images", "path": "png"}, tmp_path)
    order = np.argsort(real.targets, kind="stable")
    got = source.load().train
    np.testing.assert_array_equal(got.inputs, real.inputs[order])
    np.testing.assert_array_equal(got.targets, real.targets[order])
    found = examine(source, [MNIST, DIGITS])
    assert found.name == fingerprint(real.inputs, real.targets)  # whatever their order
    assert [fit.problem is None for fit in found.fits] == [True, False]
