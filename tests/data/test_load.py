"""Where MNIST is looked for, and what happens where it is not."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from fedipfs import data
from fedipfs.errors import ConfigError, DataError


def values(examples):
    return examples.inputs.shape, examples.inputs.dtype, examples.targets.dtype


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("inner", ["MNIST/raw", ""])
def test_the_folder_that_the_user_names(tmp_path, small_mnist, lay, packed, inner):
    lay(small_mnist, tmp_path / "mine" / inner, packed=packed)
    got = data.load("mnist", root=tmp_path / "mine", mirrors=())
    assert (got.name, got.note) == ("mnist", None)
    assert values(got.train) == ((20, 28, 28), np.uint8, np.int64)
    assert values(got.test) == ((5, 28, 28), np.uint8, np.int64)
    assert got.train.targets.tolist() == [i % 10 for i in range(20)]
    assert got.train.inputs.tobytes() == small_mnist["train-images-idx3-ubyte"][16:]


@pytest.mark.parametrize("fallback", ["digits", "error"])
def test_a_named_folder_without_the_files_is_an_error_at_once(tmp_path, fallback, mirror):
    with pytest.raises(DataError) as caught:
        data.load("mnist", root=tmp_path, fallback=fallback, mirrors=[mirror.url])
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert name in message
    assert mirror.asked == []


def test_the_environment_then_the_cache_then_a_download(
    tmp_path, monkeypatch, small_mnist, lay, cache, mirror
):
    mirror.serve(small_mnist)
    assert data.load("mnist", mirrors=[mirror.url]).name == "mnist"
    assert len(mirror.asked) == 4
    assert (cache / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").is_file()
    data.load("mnist", mirrors=[mirror.url])  # from the cache
    assert len(mirror.asked) == 4
    other = {**small_mnist, "t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x05" + bytes(5)}
    lay(other, tmp_path / "named", packed=False)
    monkeypatch.setenv("FEDIPFS_DATA", str(tmp_path / "named"))
    assert data.load("mnist", mirrors=[mirror.url]).test.targets.tolist() == [0] * 5


def test_an_interrupted_download_goes_on(small_mnist, mirror):
    mirror.serve({name: small_mnist[name] for name in list(small_mnist)[:2]})
    with pytest.raises(DataError):
        data.load("mnist", fallback="error", mirrors=[mirror.url])
    mirror.serve(small_mnist)
    data.load("mnist", fallback="error", mirrors=[mirror.url])
    assert len(mirror.asked) == 2 + 1 + 2


def test_without_mnist_digits_stand_in_and_say_so(dead_url):
    began = time.monotonic()
    got = data.load("mnist", mirrors=[dead_url, dead_url])
    assert time.monotonic() - began < 10
    assert got.name == "digits"
    assert got.note is not None
    assert "NOT" in got.note and "digits" in got.note and "data.root" in got.note
    assert "\n" not in got.note
    assert values(got.train) == ((1442, 28, 28), np.uint8, np.int64)
    assert got.train.inputs.max() == 255
    again = data.load("mnist", mirrors=[dead_url])
    np.testing.assert_array_equal(got.test.inputs, again.test.inputs)
    small = data.load("digits")
    np.testing.assert_array_equal(
        got.train.inputs[:, 2:-2:3, 2:-2:3], small.train.inputs.astype(int) * 255 // 16
    )


def test_fallback_error_is_an_error(dead_url):
    with pytest.raises(DataError, match="FEDIPFS_DATA is not set"):
        data.load("mnist", fallback="error", mirrors=[dead_url])


def test_offline_asks_no_mirror(monkeypatch, mirror, small_mnist):
    mirror.serve(small_mnist)
    monkeypatch.setenv("FEDIPFS_OFFLINE", "1")
    assert data.load("mnist", mirrors=[mirror.url]).name == "digits"
    assert mirror.asked == []


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x04" + bytes(4), "do not belong"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x05" + bytes([9, 9, 9, 9, 10]), "label 10"),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\x02\0\0\0\x05\0\0\0\x01" + bytes(5), "28, 28"),
        ("t10k-images-idx3-ubyte", b"", "not an IDX"),
    ],
)
def test_files_that_are_not_mnist_are_an_error_and_no_reason_to_fall_back(
    tmp_path, monkeypatch, small_mnist, lay, name, content, match
):
    lay({**small_mnist, name: content}, tmp_path / "bad", packed=False)
    monkeypatch.setenv("FEDIPFS_DATA", str(tmp_path / "bad"))
    with pytest.raises(DataError, match=match):
        data.load("mnist", mirrors=())


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="mnist, digits, breast_cancer"):
        data.load("cifar")
    with pytest.raises(ConfigError, match=r"data\.fallback=zeros"):
        data.load("mnist", fallback="zeros")


@pytest.mark.parametrize(
    ("name", "shape", "test", "classes"),
    [("digits", (1442, 8, 8), 355, 10), ("breast_cancer", (456, 30), 113, 2)],
)
def test_bundled_sets(name, shape, test, classes):
    got = data.load(name)
    assert got.train.inputs.shape == shape
    assert len(got.test) == test
    share = np.bincount(got.train.targets) / len(got.train)
    np.testing.assert_allclose(share, np.bincount(got.test.targets) / test, atol=0.01)
    assert len(share) == classes
    again = data.load(name)  # from the cache
    np.testing.assert_array_equal(got.train.inputs, again.train.inputs)


def test_measurements_are_standardised_by_the_training_examples():
    train = data.load("breast_cancer").train.inputs
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-4)


def test_a_damaged_cache_is_made_again(cache):
    before = data.load("digits")
    (kept,) = (cache / "scikit-learn").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    after = data.load("digits")
    np.testing.assert_array_equal(before.train.inputs, after.train.inputs)
    assert kept.stat().st_size > 1000


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(data.load("digits").train) == 1442


def test_examples_must_pair_up():
    with pytest.raises(ValueError, match="pair up"):
        data.Examples(np.zeros((3, 2)), np.zeros(2, dtype=np.int64))


REAL = os.environ.get("FEDIPFS_DATA")


@pytest.mark.mnist
@pytest.mark.skipif(not REAL, reason="set FEDIPFS_DATA to a folder with MNIST to run this")
def test_the_real_files():
    assert REAL is not None
    began = time.monotonic()
    got = data.load("mnist", root=REAL)
    assert time.monotonic() - began < 5
    assert (len(got.train), len(got.test)) == (60_000, 10_000)
    assert np.bincount(got.train.targets).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949
    ]  # fmt: skip
    mean, deviation = got.train.inputs.mean() / 255, got.train.inputs.std() / 255
    assert (round(mean, 4), round(deviation, 4)) == (0.1307, 0.3081)
