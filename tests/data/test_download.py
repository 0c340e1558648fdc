"""Downloads: mirrors that are down, wrong, slow or endless. Loopback only."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import time

import pytest

from fedipfs.data import download
from fedipfs.errors import DataError

PLAIN = b"forty-two handwritten digits" * 50


def fetch(urls, path, **limits):
    download.fetch(urls, path, sha256=hashlib.sha256(PLAIN).hexdigest(), size=len(PLAIN), **limits)


def test_the_second_mirror_is_asked_when_the_first_is_down(tmp_path, mirror, dead_url):
    mirror.serve({"file": PLAIN})
    fetch([f"{dead_url}file.gz", f"{mirror.url}file.gz"], tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == PLAIN


def test_when_all_fail_each_reason_is_given(tmp_path, mirror, dead_url):
    with pytest.raises(DataError, match=r"refused.*404"):
        fetch([f"{dead_url}file.gz", f"{mirror.url}file.gz"], tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [PLAIN[:-1] + b"?", PLAIN[:-1], PLAIN + b"?"])
def test_other_bytes_are_refused_and_nothing_is_left(tmp_path, mirror, wrong):
    mirror.serve({"file": wrong})
    with pytest.raises(DataError, match=r"wrong checksum|bytes"):
        fetch([f"{mirror.url}file.gz"], tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_gzip_is_refused(tmp_path, mirror):
    mirror.answer = lambda path: iter([b"<html>Please log in</html>"])
    with pytest.raises(DataError, match="gzip"):
        fetch([f"{mirror.url}file.gz"], tmp_path / "file")


@pytest.mark.parametrize(
    "pieces",
    [
        itertools.repeat(bytes(1 << 16)),  # not even gzip
        itertools.chain([gzip.compress(bytes(1 << 24))], itertools.repeat(b"x" * 1000)),  # a bomb
        itertools.chain([gzip.compress(PLAIN)], itertools.repeat(bytes(1 << 12))),  # padding
        itertools.chain([gzip.compress(b"")[:10]], itertools.repeat(b"\0\0\0\xff\xff" * 900)),
    ],
    ids=["zeros", "bomb", "padding", "empty blocks"],
)
def test_an_endless_response_is_cut_off(tmp_path, mirror, pieces):
    mirror.answer = lambda path: pieces
    with pytest.raises(DataError):
        fetch([f"{mirror.url}file.gz"], tmp_path / "file", total_s=5)
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_does_not_answer_is_given_up(tmp_path, mirror):
    mirror.answer = lambda path: time.sleep(1)
    began = time.monotonic()
    with pytest.raises(DataError, match="no answer within"):
        fetch([f"{mirror.url}file.gz"], tmp_path / "file", timeout_s=0.1)
    assert time.monotonic() - began < 0.8


def test_a_mirror_that_trickles_is_given_up(tmp_path, mirror):
    def trickle():
        for byte in gzip.compress(PLAIN):
            time.sleep(0.05)
            yield bytes([byte])

    mirror.answer = lambda path: trickle()
    began = time.monotonic()
    with pytest.raises(DataError, match="too slow"):
        fetch([f"{mirror.url}file.gz"], tmp_path / "file", timeout_s=1, total_s=0.3)
    assert time.monotonic() - began < 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path, mirror):
    mirror.serve({"file": PLAIN})
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"taken.*cannot be written"):
        fetch([f"{mirror.url}file.gz"], tmp_path / "taken" / "file")
