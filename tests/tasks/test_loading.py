"""Which targets are loaded, and which are refused unread."""

from __future__ import annotations

import pytest

from fedipfs import tasks
from fedipfs.errors import ConfigError

FILE = """
from fedipfs.tasks import Task
from torch import nn

class Mine(Task):
    def __init__(self, width=2):
        if width < 1:
            raise ValueError("width must be positive")
        self.width = width
    def model(self):
        return nn.Linear(self.width, 2)
    def data(self, *, root, fallback):
        raise NotImplementedError

class Unfinished(Task):
    pass

NUMBER = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sub" / "mine.py"
    path.parent.mkdir()
    path.write_text(FILE)
    return path


def test_a_task_of_the_package():
    task = tasks.load("fedipfs.tasks.small:Digits", {"hidden": 8})
    assert sum(p.numel() for p in task.model().parameters()) == 64 * 8 + 8 + 8 * 10 + 10


def test_a_file_when_it_or_its_folder_is_allowed(file):
    for allowed in (str(file), f"{file.parent}/", f"{file.parent.parent}/"):
        task = tasks.load(f"{file}:Mine", {"width": 5}, allowed=[allowed])
        assert task.model().in_features == 5
    assert type(task) is type(tasks.load(f"{file}:Mine", allowed=[str(file)]))


def test_a_relative_path(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert tasks.load("mine.py:Mine", allowed=["mine.py"]).metric == "accuracy"


def test_a_module_when_it_or_its_package_is_allowed(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent.parent))
    (file.parent / "__init__.py").write_text("")
    for allowed in ("sub.mine", "sub."):
        assert tasks.load("sub.mine:Mine", allowed=[allowed]).metric == "accuracy"


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("os:path", tasks.ALLOWED),
        ("fedipfs.tasks_evil:Mine", tasks.ALLOWED),
        ("fedipfs.store:Store", tasks.ALLOWED),
        ("hospital.evil:Mine", ["hospital"]),
        ("hospitals:Mine", ["hospital"]),
        ("{file}:Mine", tasks.ALLOWED),
        ("{file}:Mine", []),
        ("{file}:Mine", ["other.py"]),
        ("{folder}/allowed/../sub/mine.py:Mine", ["{folder}/allowed/"]),
    ],
)
def test_what_is_not_allowed_is_not_run(file, target, allowed):
    file.write_text("raise SystemExit('this file was run')")
    names = {"file": file, "folder": file.parent.parent}
    with pytest.raises(ConfigError, match="not allowed here"):
        tasks.load(target.format(**names), allowed=[entry.format(**names) for entry in allowed])


def test_a_link_out_of_an_allowed_folder_is_not_followed(file):
    allowed = file.parent.parent / "allowed"
    allowed.mkdir()
    (allowed / "link.py").symlink_to(file)
    with pytest.raises(ConfigError, match="not allowed here"):
        tasks.load(f"{allowed}/link.py:Mine", allowed=[f"{allowed}/"])


@pytest.mark.parametrize(
    "target",
    ["", "fedipfs.tasks.small", "fedipfs.tasks.:Digits", ":Digits", "a b:C", "x:y z", "x:"],
)
def test_what_is_no_target_is_refused(target):
    with pytest.raises(ConfigError, match=r"task\.target="):
        tasks.load(target)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("Nobody", {}, "no class Nobody"),
        ("NUMBER", {}, "no class NUMBER"),
        ("Unfinished", {}, "abstract"),
        ("Mine", {"depth": 3}, "depth"),
        ("Mine", {"width": 0}, "must be positive"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(file, name, options, match):
    with pytest.raises(ConfigError, match=match):
        tasks.load(f"{file}:{name}", options, allowed=[str(file)])


@pytest.mark.parametrize("content", ["import nothing_of_that_name", "def broken(:", "1/0"])
def test_a_file_that_does_not_import_is_a_clear_error(file, content):
    file.write_text(content)
    for _ in range(2):  # a second attempt does not find half a module
        with pytest.raises(ConfigError, match="cannot be imported") as caught:
            tasks.load(f"{file}:Mine", allowed=[str(file)])
        assert "\n" not in str(caught.value)


def test_a_missing_file_or_module_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        tasks.load(f"{tmp_path}/none.py:Mine", allowed=[f"{tmp_path}/"])
    with pytest.raises(ConfigError, match="cannot be imported"):
        tasks.load("fedipfs.tasks.none:Mine")
