"""What passes between the command of a run and its ServerApp."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedipfs.errors import RunError
from fedipfs.server.submission import Submission, app_files


def test_a_submission_says_who_lives(tmp_path):
    made = Submission.create(tmp_path, {"rounds": 3}, resume=True)
    assert made.path.stat().st_mode & 0o077 == 0
    found = Submission.named(tmp_path, made.name)
    assert found.job["config"] == {"rounds": 3} and found.job["resume"] is True
    assert found.state == "new"
    with found.held():
        assert made.state == "held"
    assert made.state == "left"
    found.interrupted()  # nobody asks it to end
    made.stop()
    with pytest.raises(KeyboardInterrupt):
        found.interrupted()
    made.remove()
    assert not made.path.exists()


def test_a_process_that_is_killed_is_gone(tmp_path):
    made = Submission.create(tmp_path, {}, resume=False)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from fedipfs.server.submission import Submission\n"
        f"with Submission.named(Path({str(tmp_path)!r}), {made.name!r}).held():\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    assert made.state == "held"
    process.kill()
    process.wait(10)
    assert made.state == "left"


@pytest.mark.parametrize("name", ["../escape", "", "nobody"])
def test_only_a_submission_can_be_named(tmp_path, name):
    (tmp_path / "escape").mkdir()
    (tmp_path / "escape" / "job.json").write_text("{}")
    (tmp_path / "submissions").mkdir()
    with pytest.raises(RunError, match="no submission"):
        Submission.named(tmp_path, name)


def test_the_app_that_travels_holds_no_code_of_ours():
    """It imports what is installed: a partner sees all of it at a glance."""
    files = app_files()
    assert sorted(files) == ["client_app.py", "pyproject.toml", "server_app.py"]
    assert sum(map(len, files.values())) < 2000
    for name in ("client_app.py", "server_app.py"):
        lines = [line for line in files[name].decode().splitlines() if line and line[0] != '"']
        assert len(lines) == 2
