"""Progress: plain lines into a pipe, a live display on a (pseudo) terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from fedipfs.observe.progress import Progress

SHOW, HIDE = b"\x1b[?25h", b"\x1b[?25l"


def line(number: int, failed: list[dict[str, str]] | None = None) -> dict[str, Any]:
    failed = failed or []
    return {
        "round": number,
        "seconds": 1.9,
        "train": {"train_loss": 0.5},
        "evaluate": None,
        "server": {"loss": 0.25, "accuracy": 0.9},
        "clients": {"selected": 3, "ok": 3 - len(failed), "failed": failed},
    }


def play(progress: Progress, rounds: int = 2) -> None:
    with progress:
        progress.phase("loading data")
        progress.start("r1", "digits", rounds, 1, "no MNIST files:\n using digits")
        for number in range(1, rounds + 1):
            progress.round_started(number, 3)
            for client in range(3):
                progress.client_done(f"client-{client}", ok=client != 1)
            reason = {"client": "client-1", "reason": "ValueError: " + "long " * 40}
            progress.round_done(line(number, [reason]))
        progress.finish({"run_id": "r1", "experiment": "digits", "rounds_completed": rounds})


def test_plain_output_is_a_line_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    play(Progress(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "digits: 2 rounds, run r1"
    assert lines[1] == "*** NOTE: no MNIST files: using digits ***"
    assert [text[:47] for text in lines[2:4]] == [
        "round 1/2  accuracy 0.9000  loss 0.2500  2/3 cl",
        "round 2/2  accuracy 0.9000  loss 0.2500  2/3 cl",
    ]
    assert lines[2].endswith("…)")
    assert lines[4:] == []
    assert "\x1b" not in stream.getvalue()
    assert "Finished: digits, 2 rounds" in capsys.readouterr().out


def test_quiet_leaves_the_note(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    play(Progress(stream, quiet=True))
    assert stream.getvalue().splitlines() == [
        "*** NOTE: no MNIST files: using digits ***",
    ]
    assert capsys.readouterr().out == ""


def test_a_resumed_run_says_where_it_goes_on() -> None:
    stream = io.StringIO()
    Progress(stream).start("r1", "digits", 5, 3, None)
    assert stream.getvalue() == "digits: 5 rounds, going on at round 3, run r1\n"


def test_lines_with_missing_parts_do_not_stop_a_run() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.start("r1", "digits", 10, 1, None)
    progress.round_done({"round": 3, "server": None, "train": {"train_loss": 0.5}})
    assert stream.getvalue().splitlines()[1] == "round  3/10  train_loss 0.5000  0/0 clients  -"


@pytest.mark.parametrize("columns", [20, 80])
def test_a_terminal_gets_a_live_display(columns: int) -> None:
    out, code = on_terminal("play(Progress(), 3)", columns)
    assert code == 0
    assert b"rounds" in out
    assert b"NOTE: no MNIST" in out.replace(b"\r\n", b" ")
    assert out.count(HIDE) == 1
    assert out.rindex(SHOW) > out.rindex(HIDE)
    assert b"Finished: digits" in out


def test_ctrl_c_gives_the_cursor_back() -> None:
    script = """
import time
with Progress() as progress:
    progress.start("r1", "digits", 5, 1, None)
    progress.round_started(1, 10)
    time.sleep(60)
"""
    out, code = on_terminal(script, 80, interrupt_at=b"clients")
    assert code == -signal.SIGINT
    assert out.rindex(SHOW) > out.rindex(HIDE)


def on_terminal(script: str, columns: int, interrupt_at: bytes | None = None) -> tuple[bytes, int]:
    """Run Python code with a pseudo terminal for its output; what it wrote and its exit code."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    path = [str(Path(__file__).parent), *sys.path]
    script = (
        f"import sys; sys.path[:] = {path!r}\nfrom test_progress import Progress, play\n{script}"
    )
    environ = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=other,
        stderr=other,
        env={**environ, "TERM": "xterm-256color"},
    )
    os.close(other)
    out = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        out += piece
        if interrupt_at is not None and interrupt_at in out:
            process.send_signal(signal.SIGINT)
            interrupt_at = None
    os.close(main)
    return out, process.wait(30)
