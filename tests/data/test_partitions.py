"""Partitions: every index once, as asked, the same every time."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedipfs import data
from fedipfs.errors import ConfigError

LABELS = np.random.default_rng(7).integers(0, 10, 1003).astype(np.int64)


def divide(labels=LABELS, **asked):
    return data.partition(labels, **{"name": "iid", "clients": 10, "seed": 1, **asked})


def classes(part, labels=LABELS):
    return set(labels[part].tolist())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["iid", "dirichlet", "shards", "pathological"]),
    clients=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    alpha=st.floats(0.05, 100),
    pieces=st.integers(1, 12),
)
def test_every_index_once_or_a_reason(name, clients, seed, alpha, pieces):
    asked = {
        "name": name,
        "clients": clients,
        "seed": seed,
        "alpha": alpha,
        "shards_per_client": pieces,
        "classes_per_client": pieces,
    }
    try:
        parts = divide(**asked)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert len(parts) == clients
    assert all(len(part) and part.dtype == np.int64 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    for once, again in zip(parts, divide(**asked), strict=True):
        np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize("name", data.partitions.NAMES)
def test_another_seed_gives_another_partition(name):
    one, two = divide(name=name, seed=1), divide(name=name, seed=2)
    assert sorted(one[0].tolist()) != sorted(two[0].tolist())


def test_iid_is_flower_datasets_iid_on_shuffled_data():
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    order = np.random.default_rng(3).permutation(len(LABELS))
    for clients in (1, 7, 1000):
        theirs = IidPartitioner(clients)
        theirs.dataset = Dataset.from_dict({"index": order})
        for i, part in enumerate(divide(clients=clients, seed=3)):
            assert part.tolist() == list(theirs.load_partition(i)["index"])


def test_dirichlet_clients_differ_more_the_smaller_alpha():
    def skew(alpha):
        parts = divide(name="dirichlet", alpha=alpha)
        shares = np.array([np.bincount(LABELS[p], minlength=10) / len(p) for p in parts])
        return shares.std(axis=0).mean()

    assert skew(0.1) > 2 * skew(10)


def test_shards_give_each_client_few_classes():
    labels = np.repeat(np.arange(10), 200).astype(np.int64)
    parts = divide(labels, name="shards", clients=100)
    assert {len(part) for part in parts} == {20}
    assert all(len(classes(part, labels)) <= 2 for part in parts)


def test_what_shards_leave_over_goes_to_clients_with_that_class():
    parts = divide(name="shards", clients=30)  # 60 shards of 16, 43 examples over
    assert sum(map(len, parts)) == len(LABELS)
    assert all(len(classes(part)) <= 4 for part in parts)  # a shard may span two classes


@pytest.mark.parametrize(("clients", "count"), [(12, 1), (12, 2), (12, 3), (5, 2), (2, 9), (1, 10)])
def test_pathological_gives_each_client_that_many_classes(clients, count):
    parts = divide(name="pathological", clients=clients, classes_per_client=count)
    assert {len(classes(part)) for part in parts} == {count}
    # Held-out examples are taken from the end, so a client's classes must be mixed.
    assert all(len(classes(part[-len(part) // 2 :])) == count for part in parts)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"name": "by-mood"}, r"data\.partition=by-mood.*iid, dirichlet"),
        ({"clients": 0}, r"clients\.total=0"),
        ({"clients": 1004}, r"clients\.total=1004.*1003"),
        ({"name": "dirichlet", "alpha": 0.0}, r"data\.alpha=0"),
        ({"name": "dirichlet", "alpha": float("nan")}, r"data\.alpha=nan"),
        ({"name": "dirichlet", "alpha": 1e-3, "clients": 100}, r"data\.alpha=0\.001.*raise"),
        ({"name": "shards", "shards_per_client": 0}, r"data\.shards_per_client=0"),
        ({"name": "shards", "shards_per_client": 101}, r"from 1 to 100"),
        ({"name": "pathological", "classes_per_client": 11}, r"from 1 to 10"),
        ({"name": "pathological", "clients": 2, "classes_per_client": 3}, r"all 10 classes"),
        ({"name": "pathological", "clients": 900}, r"classes_per_client=2.*lower"),
        ({"name": "pathological", "clients": 400, "classes_per_client": 5}, r"lower either"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_a_remedy(asked, match):
    with pytest.raises(ConfigError, match=match):
        divide(**asked)


def test_a_second_process_reads_the_cache_and_imports_nothing(cache):
    before = divide(name="dirichlet")
    code = """
import sys, numpy as np
from fedipfs import data
labels = np.random.default_rng(7).integers(0, 10, 1003).astype(np.int64)
parts = data.partition(labels, name="dirichlet", clients=10, seed=1)
assert not {"datasets", "flwr_datasets", "torch", "sklearn"} & set(sys.modules)
print(parts[3].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(before[3].tolist())


def test_a_damaged_cache_is_made_again(tmp_path):
    before = divide(name="shards", cache_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"PK\x03\x04 damaged")
    after = divide(name="shards", cache_dir=tmp_path)
    np.testing.assert_array_equal(before[0], after[0])


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert len(divide(name="shards", cache_dir=tmp_path / "file")) == 10
