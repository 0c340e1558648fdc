"""A model's floating-point tensors as one vector, and back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fedipfs.exchange import as_numpy, flat_size, flatten, from_numpy, moved_by, store_arrays
from fedipfs.exchange.flat import _PIECE, flat_specs

FLOATS = {"bf16": ml_dtypes.bfloat16, "f2": np.float16, "f4": np.float32, "f8": np.float64}


def model(store, dtype):
    """Names are not in canonical order; integers and booleans are beside."""
    tensors = {
        "z": np.arange(6).reshape(2, 3).astype(dtype),
        "steps": np.array(7),
        "a": np.full(4, 0.5, dtype),
        "on": np.array([True]),
        "scalar": np.array(2.0, dtype),
        "none": np.zeros((0, 3), dtype),
    }
    return store_arrays(store, from_numpy(tensors))


def values(arrays):
    return {name: as_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("dtype", FLOATS)
def test_there_and_back_is_the_same_model(store, dtype):
    base = model(store, FLOATS[dtype])
    vector = flatten(base, lambda name, spec: base.weights.tensor(name))
    assert (
        vector.dtype == ("f8" if dtype == "f8" else "f4") and len(vector) == flat_size(base) == 11
    )
    assert [spec.name for spec in flat_specs(base)] == ["a", "none", "scalar", "z"]
    assert moved_by(base, vector, relative=False).cid == base.cid
    assert moved_by(base, np.zeros_like(vector)).cid == base.cid


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_added_goes_to_the_floats_alone(store, dtype):
    base = model(store, FLOATS[dtype])
    moved = moved_by(base, np.arange(11, dtype="f8"))
    found, before = values(moved), values(base)
    assert list(moved) == list(base) and moved.order == base.order and moved.base is base
    assert found["steps"] == 7 and found["on"] == [True]
    for name, added in (("a", [0, 1, 2, 3]), ("scalar", 4), ("z", [[5, 6, 7], [8, 9, 10]])):
        assert found[name].dtype == FLOATS[dtype]
        np.testing.assert_array_equal(found[name], before[name] + np.array(added, FLOATS[dtype]))
    assert found["none"].shape == (0, 3)


def test_a_tensor_of_many_pieces_is_moved_in_double_precision(store):
    """1 + 2**-24 + 2**-50 rounds up to a float32 only if nothing is rounded before."""
    count = 2 * _PIECE + 5
    base = store_arrays(store, from_numpy({"w": np.ones(count, "f4")}))
    vector = np.full(count, 2.0**-24 + 2.0**-50)
    vector[-1] = 3.0
    found = values(moved_by(base, vector))["w"]
    np.testing.assert_array_equal(found[:-1], np.nextafter(np.float32(1), np.float32(2)))
    assert found[-1] == 4.0
