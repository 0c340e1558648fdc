"""safetensors in tensor-aligned leaves: equal weights, equal CIDs; little change, few blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedipfs import weights
from fedipfs.errors import FormatError, WeightsError
from fedipfs.ipld import CID, unixfs
from fedipfs.store import FolderStore, dag
from fedipfs.weights import Weights, layout

DTYPES = [*layout.DTYPES.values()]


def sample(dtype: np.dtype, shape: tuple[int, ...] = (3, 4), seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 2 if dtype.kind == "b" else 100, shape)
    return np.asarray(values).astype(dtype)


def file_of(tensors: dict[str, np.ndarray]) -> bytes:
    specs = [weights.spec_of(name, array) for name, array in tensors.items()]
    return b"".join(weights.chunks(specs, tensors.__getitem__))


tensor_sets = st.dictionaries(
    st.text(max_size=20).filter(lambda name: name != "__metadata__" and _encodes(name)),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6,
)


def _encodes(name: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in name)


@given(tensor_sets)
def test_the_file_is_the_one_the_safetensors_library_writes(kinds):
    tensors = {name: sample(dtype, shape) for name, (dtype, shape) in kinds.items()}
    assert file_of(tensors) == safetensors.numpy.save(tensors)


@given(tensor_sets)
def test_names_shapes_dtypes_and_values_survive(tmp_path_factory, kinds):
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    tensors = {name: sample(dtype, shape) for name, (dtype, shape) in kinds.items()}
    back = Weights(store, weights.put(store, tensors)).tensors()
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
        assert back[name].flags.writeable


def test_a_torch_state_dict_loads_in_the_library(store, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    cid = weights.put(store, state)
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"".join(dag.cat(store, cid)))
    loaded = safetensors.torch.load_file(path)
    assert loaded["1.num_batches_tracked"].dtype == torch.int64
    model.load_state_dict(loaded)


def test_order_layout_and_byte_order_do_not_change_the_cid(store):
    a, b = sample(np.dtype("f4"), (64, 64)), sample(np.dtype("f4"), (5,), 1)
    cid = weights.put(store, {"a": a, "b": b})
    assert weights.put(store, {"b": b, "a": a}) == cid
    assert weights.put(store, {"a": np.asfortranarray(a), "b": b.astype(">f4")}) == cid
    assert weights.put(store, {"a": a + 1, "b": b}) != cid


def test_a_changed_layer_adds_only_its_own_blocks(store):
    rng = np.random.default_rng(0)
    layers = {f"layer{i}": rng.random(600_000).astype("f4") for i in range(6)}  # 3 leaves each
    first = set(dag.walk(store, weights.put(store, layers)))
    changed = {**layers, "layer3": layers["layer3"] + 1}
    second = set(dag.walk(store, weights.put(store, changed)))
    header_and_root = 2
    assert len(second - first) <= 3 + header_and_root


def test_a_changed_element_adds_one_leaf_and_a_root(store):
    array = np.random.default_rng(0).random(2_000_000).astype("f4")
    first = set(dag.walk(store, weights.put(store, {"w": array})))
    array[1_000_000] += 1
    assert len(set(dag.walk(store, weights.put(store, {"w": array}))) - first) == 2


def test_pieces_are_read_only_views_that_make_up_the_tensor(store):
    array = np.random.default_rng(0).random(700_000)
    reader = Weights(store, weights.put(store, {"w": array, "s": np.float32(2.5).reshape(())}))
    pieces = list(reader.pieces("w"))
    assert len(pieces) == 6
    assert not pieces[0].flags.writeable
    np.testing.assert_array_equal(np.concatenate(pieces), array)
    assert [piece.tolist() for piece in reader.pieces("s")] == [[2.5]]


def test_a_file_added_with_fixed_chunks_reads_the_same(store):
    tensors = {"w": np.random.default_rng(0).random((700, 999)), "b": sample(np.dtype("f4"), (7,))}
    data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    plain = Weights(store, dag.add(store, unixfs.chunk(data)))
    for name, array in tensors.items():
        np.testing.assert_array_equal(plain.tensor(name), array)
        np.testing.assert_array_equal(np.concatenate([*plain.pieces(name)]), array.ravel())


def test_no_tensors_and_empty_tensors(store):
    assert Weights(store, weights.put(store, {})).tensors() == {}
    empty = Weights(store, weights.put(store, {"e": np.zeros((0, 3), np.float16)})).tensors()
    assert empty["e"].shape == (0, 3)


@pytest.mark.parametrize("dtype", ["complex64", "U3", "M8[s]", "O"])
def test_a_dtype_without_a_code_is_refused(store, dtype):
    with pytest.raises(WeightsError, match="'w' has dtype"):
        weights.put(store, {"w": np.zeros(2, dtype)})


def _with_header(header: object, body: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (1 << 60).to_bytes(8, "little"),
        _with_header(b"not json"),
        _with_header(b"\xff\xfe"),
        _with_header(b"[" * 5000),
        _with_header([1]),
        _with_header({"w": ENTRY}, b"\0" * 7),
        _with_header({"w": ENTRY}, b"\0" * 9),
        _with_header({"w": {**ENTRY, "shape": [3]}}),
        _with_header({"w": {**ENTRY, "shape": [-2]}}),
        _with_header({"w": {**ENTRY, "shape": [True, 2]}}),
        _with_header({"w": {**ENTRY, "shape": [1 << 61, 1 << 61]}}),
        _with_header({"w": {**ENTRY, "dtype": "F31"}}),
        _with_header({"w": {**ENTRY, "data_offsets": [1, 9]}}),
        _with_header({"w": ENTRY, "v": ENTRY}),
        _with_header({"w": ENTRY, "__metadata__": [1]}),
        _with_header({"w": ENTRY, "__metadata__": "text"}),
        _with_header({"w": ENTRY, "__metadata__": {"a": 1}}),
        _with_header({"w": ENTRY, "__metadata__": {"a": {}}}),
        _with_header({"w": ENTRY, "__metadata__": None}),
        _with_header({"w": ENTRY, "x": [[]] * 200}),
        _with_header(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":1}'),
    ],
)
def test_a_malformed_file_is_a_named_error(store, data):
    cid = dag.add(store, unixfs.chunk(data))
    with pytest.raises(WeightsError):
        Weights(store, cid).tensors()


def test_metadata_and_names_full_of_brackets_are_read(store):
    tensors = {'[{"[' * 50 + f"{i}\\": np.zeros((), "i1") for i in range(50)}
    data = safetensors.numpy.save(tensors, metadata={'{["': "[{" * 5000, "\\": '\\"['})
    assert set(Weights(store, dag.add(store, unixfs.chunk(data))).names) == set(tensors)
    tiny = {"": ENTRY | {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}
    dense = _with_header(json.dumps(tiny, separators=(",", ":")).encode(), b"\0")
    assert Weights(store, dag.add(store, unixfs.chunk(dense))).names == [""]


def test_the_densest_header_of_many_tensors_is_read():
    specs = [weights.TensorSpec(f"{i:x}", "U8", (0,)) for i in range(30_000)]
    header = weights.encode_header(specs)
    assert len(layout.decode_header(header, len(header))) == 30_000


def _hostile(kind: str, size: int) -> bytes:
    keys = b",".join(b'"%05x":""' % i for i in range(size // 11))
    return {
        "lists": b'{"w":[' + b"[]," * (size // 3) + b"0]}",
        "metadata list": b'{"__metadata__":[' + b"{}," * (size // 3) + b"0]}",
        "deep": b'{"w":[' + (b"[" * 800 + b"]" * 800 + b",") * (size // 1601) + b"0]}",
        "deep objects": b'{"w":[' + (b'{"":' * 800 + b"0" + b"}" * 800 + b",") * (size // 4802),
        "quoted": b'{"w":"' + b'\\\\\\"' * (size // 4) + b'",' + b'"":[],' * (size // 6),
        "numbers": b'{"w":[' + b"999," * (size // 4) + b"0]}",
        "strings": b'{"w":[' + b'"ab",' * (size // 5) + b"0]}",
        "keys": b'{"w":{' + keys + b"}}",
        "metadata": b'{"__metadata__":{' + keys + b"}}",
        "wide text": b'{"__metadata__":{"a":"' + "\U0001f600".encode() + b"a" * size + b'"}}',
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "lists",
        "metadata list",
        "deep",
        "deep objects",
        "quoted",
        "numbers",
        "strings",
        "keys",
        "metadata",
        "wide text",
    ],
)
def test_the_memory_of_reading_a_header_is_bounded(kind):
    header = _with_header(_hostile(kind, 1 << 20), b"")
    tracemalloc.start()
    with contextlib.suppress(WeightsError):
        layout.decode_header(header, len(header))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25 * len(header)
    assert held < len(header) // 2  # large headers are not remembered


def test_a_header_over_the_limit_is_neither_read_nor_written(store):
    data = _with_header(b"{}" + b" " * layout.MAX_HEADER, b"")
    with pytest.raises(WeightsError, match="at most"):
        Weights(store, dag.add(store, unixfs.chunk(data)))
    specs = [weights.TensorSpec(f"{i}{'n' * 60_000}", "U8", (0,)) for i in range(70)]
    with pytest.raises(WeightsError, match="70 tensors need"):
        weights.encode_header(specs)


def test_a_file_larger_than_expected_is_refused_from_its_root(store):
    cid = weights.put(store, {"w": np.zeros(700_000), "b": np.zeros(3)})
    size = Weights(store, cid).nbytes
    assert Weights(store, cid, max_bytes=size).names == ["b", "w"]
    before = store.counters.copy()
    with pytest.raises(WeightsError, match=f"declares {size} bytes; at most {size - 1}"):
        Weights(store, cid, max_bytes=size - 1)
    assert store.counters.get_blocks == before.get_blocks + 1
    small = store.put(b"x" * 100)
    with pytest.raises(WeightsError, match="at most 99"):
        Weights(store, small, max_bytes=99)


def test_a_file_that_exists_is_cut_as_put_cuts_it(store, tmp_path):
    tensors = {"w": np.random.default_rng(0).random(400_000), "b": sample(np.dtype("f4"), (7,))}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    with open(path, "rb") as file:
        assert dag.add(store, weights.file_chunks(file)) == weights.put(store, tensors)
    path.write_bytes(path.read_bytes() + b"x")
    with open(path, "rb") as file, pytest.raises(WeightsError):
        dag.add(store, weights.file_chunks(file))


@given(st.data())
def test_mutated_files_give_a_value_or_a_named_error(tmp_path_factory, data):
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    good = bytearray(file_of({"w": sample(np.dtype("f4")), "b": sample(np.dtype("i8"), (2,))}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    cid = dag.add(store, unixfs.chunk(bytes(good[:cut])))
    try:
        read = Weights(store, cid).tensors()
    except FormatError:
        return
    assert sum(array.nbytes for array in read.values()) <= cut


def test_bfloat16_keeps_its_bits(store):
    array = np.arange(5, dtype=np.float32).astype(ml_dtypes.bfloat16)
    back = Weights(store, weights.put(store, {"w": array})).tensor("w")
    assert back.dtype == ml_dtypes.bfloat16
    assert back.tolist() == [0, 1, 2, 3, 4]


def test_the_cid_of_a_known_file_does_not_change(store):
    tensors = {"w": np.arange(4, dtype=np.float32)}
    cid = weights.put(store, tensors)
    assert isinstance(cid, CID)
    assert str(cid) == "bafybeihwcetr2vk66k75s6rdfdtqudtm5r5x3zzbhmo2m4yy42icr3mzyi"


def test_a_leaf_of_another_size_than_its_parent_says_is_a_named_error(store):
    """A hostile writer can link any block; its bytes are verified, its size must be, too."""
    from fedipfs.ipld import DAG_PB, dagpb

    data = safetensors.numpy.save({"w": np.zeros(300_000, "f8")})
    root = dag.add(store, unixfs.chunk(data))
    node = dagpb.decode(store.get(root))
    other = store.put(b"short")
    links = [node.links[0], dataclasses.replace(node.links[1], cid=other), *node.links[2:]]
    forged = store.put(dagpb.encode(dagpb.Node(links, node.data)), DAG_PB)
    with pytest.raises(FormatError):
        Weights(store, forged).tensors()
