"""Updates in few bytes: what comes back, how much it costs, and what hostile bytes achieve."""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedipfs import weights
from fedipfs.errors import (
    BadPayload,
    CompressionError,
    ConfigError,
    FormatError,
    WeightsError,
    WrongBase,
)
from fedipfs.ipld import CID, unixfs
from fedipfs.store import FolderStore, dag
from fedipfs.weights import Weights
from fedipfs.weights.compression import (
    CODECS,
    DENSE,
    SPARSE,
    Decoded,
    Encoded,
    Spec,
    decode,
    encode,
    is_payload,
    lossless,
    most_bytes,
)
from fedipfs.weights.compression.sparse import Sent, drawn, strata, top

FLOATS = (np.dtype("f8"), np.dtype("f4"), np.dtype("f2"), np.dtype(ml_dtypes.bfloat16))
SPECS = [
    Spec(codec, 0.2 if codec in SPARSE else None, zstd, feedback)
    for codec in CODECS
    for zstd in (False, True)
    for feedback in (False, True)
]
RELATIVE = {"fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 1 / 254, "int4": 1 / 14}
MNIST = {  # shapes of the model of 77,938 parameters
    "0.weight": (8, 1, 5, 5),
    "0.bias": (8,),
    "2.weight": (24, 8, 3, 3),
    "2.bias": (24,),
    "5.weight": (64, 1176),
    "5.bias": (64,),
    "7.weight": (10, 64),
    "7.bias": (10,),
}


@pytest.fixture(scope="module")
def shared() -> FolderStore:
    with tempfile.TemporaryDirectory(prefix="fedipfs-test-") as folder:
        yield FolderStore(folder, durable=False)


def stored(store: FolderStore, tensors: dict[str, np.ndarray]) -> Weights:
    return Weights(store, weights.put(store, tensors))


def sent(store, spec: Spec, base: Weights | None, new: dict[str, np.ndarray], owed=None):
    """What is stored of an update, and its decoded form."""
    specs = {name: weights.spec_of(name, array) for name, array in new.items()}
    cid = None if base is None else base.cid
    encoded = encode(spec, specs, new.__getitem__, base, cid, owed)
    file = Weights(store, unixfs.build(iter(encoded.file), store.put))
    return encoded, decode(file, base, cid, asked=spec)


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype("f8").ravel()


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return float(np.linalg.norm(np.concatenate([wide(a[n]) - wide(b[n]) for n in a] or [[]])))


def mnist(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_t(4, size=s)).astype("f4") for n, s in MNIST.items()}


def pair() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    base, change = mnist(0, 0.05), mnist(1, 1e-3)
    return base, {n: base[n] + change[n] for n in base}


# ---- round trips


@st.composite
def models(draw):
    """A base and what became of it: several dtypes, empty tensors, scalars, unchanged ones."""
    base, new = {}, {}
    for name in draw(st.sets(st.text("ab/:é", max_size=6), max_size=5)):
        dtype = draw(st.sampled_from((*FLOATS, np.dtype("i8"), np.dtype("?"))))
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=9))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        base[name] = (rng.normal(size=shape) * 3).astype(dtype)
        change = np.zeros(shape) if draw(st.booleans()) else rng.normal(size=shape)
        if dtype.kind == "b":
            new[name] = np.asarray(base[name] ^ (change > 0))
        else:
            new[name] = np.asarray(wide(base[name]).reshape(shape) + change).astype(dtype)
    return base, new


@given(models(), st.sampled_from(SPECS))
def test_what_comes_back_is_what_went_in_less_what_is_owed(shared, model, spec):
    before, new = model
    base = stored(shared, before)
    encoded, decoded = sent(shared, spec, base, new)
    back = decoded.tensors()
    assert back.keys() == new.keys()
    for name, array in new.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        if array.dtype.kind in "ib":
            np.testing.assert_array_equal(back[name], array)
        elif spec.feedback:
            owed = encoded.residual[name]
            np.testing.assert_allclose(
                wide(back[name]) + wide(owed), wide(array), rtol=1e-5, atol=1e-5
            )
    floats = [n for n in new if new[n].dtype.kind not in "ib"]
    size = distance({n: new[n] for n in floats}, before)
    lost = distance({n: new[n] for n in floats}, back)
    assert decoded.payload.error == pytest.approx(lost / size if size else 0, rel=1e-3, abs=1e-5)
    assert set(encoded.residual) == (set(floats) if spec.feedback else set())
    assert decoded.payload.file.nbytes <= most_bytes(spec, base.specs)


@given(models(), st.sampled_from([spec for spec in SPECS if spec.codec in DENSE]))
def test_a_payload_without_a_base_is_a_model(shared, model, spec):
    _, new = model
    _, decoded = sent(shared, spec, None, new)
    back = decoded.tensors()
    for name, array in new.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        if array.dtype.kind in "ib":
            np.testing.assert_array_equal(back[name], array)
        else:
            largest = np.abs(wide(array)).max(initial=0)
            most = largest * (RELATIVE[spec.codec] * 1.01 + 2.0**-8) + 1e-6  # bfloat16 rounds, too
            assert np.abs(wide(back[name]) - wide(array)).max(initial=0) <= most


@given(
    hnp.arrays(np.float32, st.integers(0, 700), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from(DENSE),
)
def test_dense_codecs_keep_within_half_a_step(shared, change, codec):
    base = stored(shared, {"w": np.zeros_like(change)})
    _, decoded = sent(shared, Spec(codec), base, {"w": change})
    back = decoded.tensor("w")
    block = {"int8": 256, "int4": 64}.get(codec, 1)
    for start in range(0, change.size, block):
        part = slice(start, start + block)
        most = np.abs(change[part]).max() * RELATIVE[codec] * 1.001 + 2.0**-24
        assert np.abs(back[part] - change[part]).max() <= most


@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=st.integers(-5, 5)),
    st.integers(1, 300),
)
def test_top_is_the_largest_the_first_of_equals_and_never_zero(values, count):
    order = sorted(range(values.size), key=lambda i: (-abs(values[i]), i))
    expected = sorted(i for i in order[:count] if values[i])
    assert top(values, min(count, values.size)).tolist() == expected


@given(st.integers(1, 5000), st.data(), st.integers(0, 2**64 - 1))
def test_drawn_coordinates_are_one_of_each_stratum(elements, data, seed):
    count = data.draw(st.integers(1, elements))
    starts, lengths = strata(elements, count)
    assert starts[0] == 0
    assert lengths.sum() == elements
    assert lengths.max() - lengths.min() <= 1
    indices = drawn(elements, count, seed)
    assert ((starts <= indices) & (indices < starts + lengths)).all()


@settings(deadline=None)
@given(st.data(), st.integers(1, 6000), st.sampled_from(["topk", "randk"]))
def test_coordinates_are_found_by_range(data, elements, codec):
    count = data.draw(st.integers(0 if codec == "topk" else 1, elements))
    seed = data.draw(st.integers(0, 2**64 - 1))
    if codec == "topk":
        rng = np.random.default_rng(seed)
        every = np.sort(rng.choice(elements, count, replace=False)).astype(np.int64)
        gaps = (np.diff(every, prepend=-1) - 1).astype("u2")
    else:
        every, gaps = drawn(elements, count, seed), np.zeros(0, "u1")
    values = np.arange(count, dtype="f2")
    sent = Sent(Spec(codec, 1.0), elements, seed, gaps, values)
    start = data.draw(st.integers(0, elements))
    stop = data.draw(st.integers(start, elements))
    inside = (every >= start) & (every < stop)
    indices, found = sent.between(start, stop)
    np.testing.assert_array_equal(indices, every[inside])
    np.testing.assert_array_equal(found, values[inside])


def test_coordinates_beyond_the_model_are_refused():
    gaps = np.full(3000, 2, "u1")
    values = np.zeros(3000, "f2")
    Sent(Spec("topk", 1.0), 9000, 0, gaps, values)
    with pytest.raises(BadPayload, match="coordinate 8999 of a model that has 8999"):
        Sent(Spec("topk", 1.0), 8999, 0, gaps, values)


def test_drawn_coordinates_are_those_of_the_published_generator():
    """SplitMix64 with seed 1234567: the sequence in its reference implementation."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    starts, lengths = strata(1000, 3)
    expected = [s + o % n for s, o, n in zip(starts, outputs, lengths.tolist(), strict=True)]
    assert drawn(1000, 3, 1234567).tolist() == expected


def test_random_coordinates_are_right_on_average_without_feedback(shared):
    """Also that another change draws other coordinates."""
    base = stored(shared, {"w": np.zeros(40, "f4")})
    total, runs = np.zeros(40), 1000
    for number in range(runs):
        change = np.full(40, 1 + number / runs, "f4")
        _, decoded = sent(shared, Spec("randk", 0.25), base, {"w": change})
        total += decoded.tensor("w") / change[0]
    assert np.abs(total / runs - 1).max() < 0.25  # deviation of a mean: sqrt(3 / 1000) = 0.05


def test_hand_worked_int8_and_int4(shared):
    base = stored(shared, {"w": np.zeros(3, "f4")})
    change = {"w": np.array([1.27, -0.5, 0.004], "f4")}
    encoded, decoded = sent(shared, Spec("int8", zstd=False), base, change)
    raw = safetensors.numpy.load(b"".join(map(bytes, encoded.file)))
    assert raw["values/w"].tolist() == [127, -50, 0]
    assert raw["scales/w"] == pytest.approx([0.01])
    assert decoded.tensor("w") == pytest.approx([1.27, -0.5, 0.0])
    change = {"w": np.array([0.7, -0.2, 0.1], "f4")}
    encoded, decoded = sent(shared, Spec("int4", zstd=False), base, change)
    raw = safetensors.numpy.load(b"".join(map(bytes, encoded.file)))
    assert raw["values/w"].tolist() == [0xE7, 0x01]  # 7 and -2, then 1 and nothing
    assert decoded.tensor("w") == pytest.approx([0.7, -0.2, 0.1])


def test_hand_worked_topk(shared):
    base = stored(shared, {"a": np.zeros(4, "f4"), "b": np.zeros((2, 2), "f4")})
    new = {"a": np.array([0, 5, 0, 1], "f4"), "b": np.array([[-7, 2], [0, 0]], "f4")}
    encoded, decoded = sent(shared, Spec("topk", 0.3, zstd=False), base, new)
    raw = safetensors.numpy.load(b"".join(map(bytes, encoded.file)))
    assert raw["gaps"].tolist() == [1, 2, 0]  # coordinates 1, 4 and 5 of eight
    assert raw["values"].tolist() == [5, -7, 2]
    assert decoded.tensor("a").tolist() == [0, 5, 0, 0]
    assert decoded.tensor("b").tolist() == [[-7, 2], [0, 0]]
    assert decoded.payload.error == pytest.approx((1 / 79) ** 0.5, rel=1e-5)


def test_equal_updates_are_equal_bytes(shared):
    before, new = pair()
    base = stored(shared, before)
    for spec in SPECS:
        np.random.seed(len(spec.codec))  # nothing may depend on it
        assert sent(shared, spec, base, new)[1].payload.file.cid == (
            sent(shared, spec, base, new)[1].payload.file.cid
        )


def test_what_did_not_change_is_left_out(shared):
    before, new = pair()
    base = stored(shared, {**before, "count": np.arange(9)})
    new = {**before, "5.bias": new["5.bias"], "count": np.arange(9)}
    for spec in SPECS:
        _, decoded = sent(shared, spec, base, new)
        names = " ".join(decoded.payload.file.specs)
        assert "5.weight" not in names
        assert "count" not in names
    _, decoded = sent(shared, Spec("topk", 0.5), base, base.tensors())
    assert not decoded.payload.file.specs
    assert decoded.payload.error == 0


# ---- bytes


def test_bytes_and_errors_on_the_model_of_78_thousand_parameters(shared):
    before, new = pair()
    base = stored(shared, before)
    share, error = {}, {}
    for text in (
        "int8",
        "int8 zstd",
        "int4 zstd",
        "fp16 zstd",
        "bf16 zstd",
        "topk fraction=0.01 zstd",
    ):
        _, decoded = sent(shared, Spec.parse(text), base, new)
        share[text] = decoded.payload.file.nbytes / base.nbytes
        error[text] = decoded.payload.error
    assert share["int8"] <= 0.26
    assert share["int8 zstd"] < 0.22
    assert share["int4 zstd"] < 0.13
    assert share["fp16 zstd"] < 0.5
    assert share["bf16 zstd"] < 0.42
    assert share["topk fraction=0.01 zstd"] <= 0.03
    assert error["fp16 zstd"] < error["bf16 zstd"] < error["int8"] == error["int8 zstd"] < 0.02


def test_any_safetensors_reader_loads_a_payload(shared, tmp_path):
    before, new = pair()
    base = stored(shared, before)
    encoded, decoded = sent(shared, Spec("int8"), base, new)
    path = tmp_path / "update.safetensors"
    path.write_bytes(b"".join(map(bytes, encoded.file)))
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        assert metadata["format"] == "fedipfs/update/v1"
        assert metadata["compression"] == "int8 zstd"
        assert metadata["base"] == str(base.cid)
        assert float(metadata["error"]) == pytest.approx(encoded.error, rel=1e-4)
        block = int(metadata["block"])
        data = {part: file.get_tensor(f"zstd:{part}/5.weight") for part in ("values", "scales")}
        values, scales = (zstandard.decompress(part.tobytes()) for part in data.values())
        whole = np.frombuffer(values, np.int8)
        scales = np.repeat(np.frombuffer(scales, "<f4"), block)[: whole.size]
    change = (whole * scales).reshape(64, 1176)
    np.testing.assert_allclose(before["5.weight"] + change, decoded.tensor("5.weight"), rtol=1e-6)


def test_zstd_stays_away_where_it_does_not_help(shared):
    rng = np.random.default_rng(0)
    base = stored(shared, {"w": np.zeros(5000, "f4"), "n": np.zeros(3, "i8")})
    new = {"w": rng.random(5000).astype("f4"), "n": np.arange(3)}
    _, decoded = sent(shared, Spec("fp16"), base, new)
    names = decoded.payload.file.specs
    assert "zstd:values/w" in names  # exponents compress
    assert "raw/n" in names


# ---- pieces


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.feedback], ids=str)
@pytest.mark.parametrize("dtype", ["f8", "f4", "bfloat16"])
def test_pieces_of_large_tensors_in_any_order_by_several_threads(shared, spec, dtype):
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    elements = 3 * unixfs.CHUNK // dtype.itemsize + 77  # four pieces
    before = {"w": np.zeros(elements, dtype), "steps": np.zeros(300_000, "i8")}
    new = {
        "w": (rng.integers(-3, 4, elements) * 0.125).astype(dtype),
        "steps": rng.integers(0, 9, 300_000),
    }
    base = stored(shared, before)
    _, decoded = sent(shared, spec, base, new)
    whole = decoded.tensors()
    jobs = [(n, s) for n in decoded.names for s in decoded.piece_starts(decoded.specs[n])][::-1]
    _, again = sent(shared, spec, base, new)
    with ThreadPoolExecutor(4) as pool:
        for (name, start), piece in zip(
            jobs, pool.map(lambda j: again.piece(*j), jobs), strict=True
        ):
            assert not piece.flags.writeable
            assert piece.nbytes <= unixfs.CHUNK
            np.testing.assert_array_equal(piece, whole[name][start : start + piece.size])
    np.testing.assert_array_equal(whole["steps"], new["steps"])
    if spec.codec in ("fp16", "bf16"):
        np.testing.assert_array_equal(whole["w"], new["w"])


def test_reading_a_piece_takes_a_piece_of_memory(shared):
    import tracemalloc

    elements = 40 * unixfs.CHUNK // 4
    rng = np.random.default_rng(0)
    base = stored(shared, {"w": np.zeros(elements, "f4")})
    new = {"w": rng.normal(size=elements).astype("f4")}
    for text in ("int8 zstd", "fp16 zstd", "topk fraction=0.001 zstd"):
        _, decoded = sent(shared, Spec.parse(text), base, new)
        tracemalloc.start()
        for piece in decoded.pieces("w"):
            assert np.isfinite(piece).all()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10 * unixfs.CHUNK  # the tensor has 40


@pytest.mark.parametrize("codec", ["topk", "randk"])
def test_many_sparse_updates_stay_narrow_while_they_are_averaged(shared, codec):
    import tracemalloc

    from fedipfs.strategies.mean import Mean

    elements, count, clients = 400_000, 40_000, 50
    rng = np.random.default_rng(0)
    base = stored(shared, {"w": np.zeros(elements, "f4")})
    new = {"w": rng.normal(size=elements).astype("f4")}
    spec = Spec(codec, count / elements)
    encoded, _ = sent(shared, spec, base, new)
    cid = unixfs.build(iter(encoded.file), shared.put)
    updates = [decode(Weights(shared, cid), base, base.cid) for _ in range(clients)]
    mean = Mean(base.specs.values())
    tracemalloc.start()
    for update in updates:
        mean.add(update, 1.0)
    got = mean.pop("w")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(got, updates[0].tensor("w"), atol=1e-6)
    assert kept < clients * count * 4 + 12 * elements  # float16 values and gaps of a byte
    assert peak < clients * count * 4 + 40 * elements


def test_each_thread_has_a_compressor_of_its_own(monkeypatch):
    makers, real = [], zstandard.ZstdCompressor

    def make(**options):
        makers.append(threading.get_ident())
        return real(**options)

    monkeypatch.setattr(zstandard, "ZstdCompressor", make)
    gate = threading.Barrier(4)

    def work(number: int) -> bytes:
        gate.wait()
        data = bytes([number]) * 5000
        for _ in range(20):
            (frame,) = lossless.compress(data, 5000)
        return lossless.decompress(frame, 5000)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(work, range(4)))
    assert found == [bytes([number]) * 5000 for number in range(4)]
    assert len(makers) == len(set(makers)) == 4


# ---- error feedback


@pytest.mark.parametrize("text", ["int4", "topk fraction=0.02", "randk fraction=0.1"])
def test_what_is_owed_is_paid(shared, text):
    rng = np.random.default_rng(0)
    base = stored(shared, {"w": rng.normal(size=2000).astype("f4")})
    spec, owed = Spec.parse(f"{text} feedback"), {}
    wanted, arrived = np.zeros(2000), np.zeros(2000)
    for _ in range(120):
        change = (rng.normal(size=2000) + 0.5).astype("f4")
        new = {"w": base.tensor("w") + change}
        encoded, decoded = sent(shared, spec, base, new, owed)
        owed = encoded.residual
        wanted += change
        arrived += wide(decoded.tensor("w")) - wide(base.tensor("w"))
    np.testing.assert_allclose(arrived + wide(owed["w"]), wanted, atol=1e-2)
    assert np.linalg.norm(owed["w"]) < 0.6 * np.linalg.norm(wanted)


def test_steps_that_bfloat16_cannot_hold_add_up_with_feedback(shared):
    base = stored(shared, {"w": np.full(8, 256, ml_dtypes.bfloat16)})  # its next is 258
    spec, owed, arrived = Spec("int8", feedback=True), {}, 0.0
    for _ in range(20):
        owed["w"] = owed.get("w", np.zeros(8, "f4")) + np.float32(0.3)  # as if it were a step
        encoded, decoded = sent(shared, spec, base, base.tensors(), owed)
        owed = dict(encoded.residual)
        arrived += float(decoded.tensor("w")[0]) - 256
    assert arrived + float(owed["w"][0]) == pytest.approx(6.0, abs=0.01)
    assert arrived >= 4


# ---- what cannot be compressed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", SPECS[::2], ids=str)
def test_values_that_are_not_finite_are_refused_by_name(shared, spec, bad):
    base = stored(shared, {"w": np.zeros(1000, "f4")})
    new = {"w": np.zeros(1000, "f4")}
    new["w"][500] = bad
    with pytest.raises(CompressionError, match="'w' has changed to NaN or infinite"):
        sent(shared, spec, base, new)


@pytest.mark.parametrize(
    ("codec", "dtype", "value"),
    [("fp16", "f4", 7e4), ("fp16", "f8", 1e300), ("bf16", "f8", 1e300), ("int8", "f8", 1e300),
     ("int4", "f8", 1e300), ("topk", "f8", 1e300)],
)  # fmt: skip
def test_values_beyond_the_codecs_range_are_refused(shared, codec, dtype, value):
    base = stored(shared, {"w": np.zeros(10, dtype)})
    spec = Spec(codec, 0.5 if codec in SPARSE else None)
    with pytest.raises(CompressionError, match="beyond"):
        sent(shared, spec, base, {"w": np.full(10, value, dtype)})


@pytest.mark.parametrize("value", [1e-44, 1e-40, 1e-30])
@pytest.mark.parametrize("spec", SPECS[::4], ids=str)
def test_tiny_changes_are_no_trouble(shared, spec, value):
    base = stored(shared, {"w": np.zeros(100, "f4")})
    _, decoded = sent(shared, spec, base, {"w": np.full(100, value, "f4")})
    assert np.abs(decoded.tensor("w")).max() <= 8 * value


def test_a_change_that_overflows_the_models_dtype_is_refused(shared):
    base = stored(shared, {"w": np.full(256, 60000, "f2")})
    owed = {"w": np.full(256, 6e4, "f4")}
    with pytest.raises(CompressionError, match="beyond the range of F16"):
        sent(shared, Spec("int8"), base, base.tensors(), owed)


# ---- the choice, as text and configuration


@given(st.sampled_from(CODECS), st.floats(0, 1, exclude_min=True), st.booleans(), st.booleans())
def test_a_choice_survives_as_text(codec, fraction, zstd, feedback):
    spec = Spec(codec, fraction if codec in SPARSE else None, zstd, feedback)
    assert Spec.parse(str(spec)) == spec


@given(st.text(max_size=60) | st.text("topk fracin=0.1e zsdbe8", max_size=40))
def test_any_text_is_a_choice_or_a_named_error(text):
    try:
        spec = Spec.parse(text)
    except CompressionError:
        return
    assert str(spec) == text


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"name": "gzip"}, "'gzip' is not one of fp16, bf16"),
        ({"name": 7}, "7 is not one of"),
        ({"name": "topk", "fraction": 0}, "fraction=0, which is not above 0"),
        ({"name": "topk", "fraction": 1.01}, "fraction=1.01"),
        ({"name": "topk", "fraction": float("nan")}, "fraction=nan"),
        ({"name": "randk", "fraction": True}, "fraction=True"),
        ({"name": "randk", "fraction": "0.1"}, "fraction='0.1'"),
        ({"name": "int8", "fraction": 0.1}, "compression=int8 has no such option"),
        ({"name": "int8", "zstd": 1}, "zstd=1 is neither true nor false"),
        ({"name": "int8", "bits": 3}, "compression.bits"),
        ({"name": "none", "zstd": True}, "compression=none has no such option"),
        ({"name": "topk", "down": True}, "topk cannot carry a whole model"),
        ({"name": "none", "down": True}, "compression.down needs a compression"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused_with_its_reason(section, reason):
    with pytest.raises(ConfigError, match=reason):
        Spec.of(section)


def test_configurations_and_their_defaults():
    assert Spec.of({"name": "none"}) is None
    assert str(Spec.of({"name": "int8", "down": True})) == "int8 zstd"
    assert str(Spec.of({"name": "int4"})) == "int4 zstd feedback"
    assert str(Spec.of({"name": "topk"})) == "topk fraction=0.01 zstd feedback"
    assert (
        str(Spec.of({"name": "topk", "fraction": 1, "zstd": False})) == "topk fraction=1 feedback"
    )


# ---- hostile payloads


def rewritten(store, good: Encoded, change) -> Weights:
    """The file with its tensors and metadata as `change(tensors, metadata)` leaves them."""
    file = Weights(store, unixfs.build(iter(good.file), store.put))
    tensors, metadata = file.tensors(), dict(file.metadata)
    change(tensors, metadata)
    specs = [weights.spec_of(name, array) for name, array in tensors.items()]
    chunks = weights.chunks(specs, tensors.__getitem__, metadata)
    return Weights(store, unixfs.build(chunks, store.put))


def small(store, spec: Spec) -> tuple[Weights, Encoded]:
    rng = np.random.default_rng(0)
    before = {"w": rng.normal(size=(40, 20)).astype("f4"), "n": np.arange(400)}
    base = stored(store, before)
    new = {"w": before["w"] + rng.normal(size=(40, 20)).astype("f4"), "n": np.arange(400) * 2}
    return base, sent(store, spec, base, new)[0]


def opened(store, base: Weights, file: Weights) -> dict[str, np.ndarray]:
    return decode(file, base, base.cid).tensors()


INT8, INT4 = Spec("int8", zstd=False), Spec("int4", zstd=False)
TOPK, RANDK = Spec("topk", 0.1, zstd=False), Spec("randk", 0.1, zstd=False)


def put(**changes):
    """A change of metadata (texts) and tensors (arrays); None removes, "__" stands for "/"."""

    def change(tensors, metadata):
        for key, value in changes.items():
            name = key.replace("__", "/").replace("zstd_", "zstd:").replace("frames_", "frames:")
            said = isinstance(value, str) or (value is None and name in metadata)
            place = metadata if said else tensors
            if value is None:
                place.pop(name)
            else:
                place[name] = value

    return change


def frame(data: bytes, size: int | None = None) -> np.ndarray:
    """A zstd frame; with `size` one that claims to hold so many bytes."""
    made = bytearray(zstandard.ZstdCompressor().compress(data))
    if size is not None:
        made[4:9] = bytes([0xA0]) + size.to_bytes(4, "little")  # a header of four size bytes
    return np.frombuffer(bytes(made), np.uint8)


BAD = {
    "no format": (INT8, put(format=None)),
    "another version": (INT8, put(format="fedipfs/update/v2")),
    "unknown codec": (INT8, put(compression="zip")),
    "another codec": (INT8, put(compression="int4")),
    "no error": (INT8, put(error=None)),
    "error nan": (INT8, put(error="nan")),
    "error negative": (INT8, put(error="-1")),
    "more metadata": (INT8, put(more="x")),
    "another block": (INT8, put(block="1")),
    "no scales": (INT8, put(scales__w=None)),
    "no values": (INT8, put(values__w=None)),
    "fewer scales": (INT8, put(scales__w=np.ones(3, "f4"))),
    "scale nan": (INT8, put(scales__w=np.array([1, 1, np.nan, 1], "f4"))),
    "scale inf": (INT8, put(scales__w=np.array([1, 1, np.inf, 1], "f4"))),
    "scale negative": (INT8, put(scales__w=np.array([1, 1, -1, 1], "f4"))),
    "scales of another dtype": (INT8, put(scales__w=np.ones(4, "f2"))),
    "values of another shape": (INT8, put(values__w=np.ones((20, 40), "i1"))),
    "unknown tensor": (INT8, put(values__x=np.ones((40, 20), "i1"))),
    "unknown part": (INT8, put(other=np.ones(3, "i1"))),
    "raw of floats": (INT8, put(raw__w=np.ones((40, 20), "f4"))),
    "raw of another dtype": (INT8, put(raw__n=np.ones(400, "f8"))),
    "values of integers": (INT8, put(values__n=np.ones(400, "i1"))),
    "twice": (INT8, put(zstd_values__w=frame(bytes(800)))),
    "frames of nothing": (INT8, put(frames_values__w=np.ones(1, "u4"))),
    "frames of no part": (INT8, put(frames_other=np.ones(2, "u4"))),
    "zstd of nothing": (INT8, put(values__w=None, zstd_values__w=np.zeros(0, "u1"))),
    "zstd of another dtype": (INT8, put(values__w=None, zstd_values__w=np.zeros(9, "i1"))),
    "zstd that is none": (INT8, put(values__w=None, zstd_values__w=np.ones(90, "u1"))),
    "zstd of too little": (INT8, put(values__w=None, zstd_values__w=frame(bytes(799)))),
    "zstd bomb": (INT8, put(values__w=None, zstd_values__w=frame(bytes(100 << 20)))),
    "zstd that lies": (INT8, put(values__w=None, zstd_values__w=frame(bytes(90), 800))),
    "zstd and more": (
        INT8,
        put(values__w=None, zstd_values__w=np.concatenate([frame(bytes(800)), frame(b"more")])),
    ),
    "half a byte more": (INT4, put(values__w=np.ones(401, "u1"))),
    "gaps beyond the end": (TOPK, put(gaps=np.full(80, 200, "u1"))),
    "gaps of another length": (TOPK, put(gaps=np.zeros(79, "u1"))),
    "gaps of another dtype": (TOPK, put(gaps=np.zeros(80, "i1"))),
    "gaps said to be signed": (TOPK, put(gaps="I8")),
    "no gaps": (TOPK, put(gaps=None)),
    "values nan": (TOPK, put(values=np.full(80, np.nan, "f2"))),
    "values inf": (TOPK, put(values=np.full(80, np.inf, "f2"))),
    "values of another dtype": (TOPK, put(values="F64")),
    "more than asked": (TOPK, put(count="81")),
    "count is no number": (TOPK, put(count="-1")),
    "count is huge": (TOPK, put(count="9" * 20)),
    "count has other digits": (TOPK, put(count="٣")),
    "fewer of random ones": (RANDK, put(count="79")),
    "seed is no number": (RANDK, put(seed="0x1")),
    "seed is huge": (RANDK, put(seed=str(2**64))),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_payload_is_a_named_error(shared, name):
    spec, change = BAD[name]
    base, good = small(shared, spec)
    with pytest.raises(BadPayload):
        opened(shared, base, rewritten(shared, good, change))


def test_what_was_not_malformed_still_opens(shared):
    for spec in (INT8, INT4, TOPK, RANDK):
        base, good = small(shared, spec)
        same = opened(shared, base, rewritten(shared, good, lambda tensors, metadata: None))
        assert np.abs(same["w"] - base.tensor("w")).max() > 0.1


def test_a_payload_to_another_base_is_a_named_error(shared):
    base, good = small(shared, INT8)
    other = stored(shared, {**base.tensors(), "n": np.zeros(400, "i8")})
    file = rewritten(shared, good, lambda tensors, metadata: None)
    with pytest.raises(WrongBase, match=f"relative to '{base.cid}', not to {other.cid}"):
        decode(file, other, other.cid)
    with pytest.raises(WrongBase):
        decode(file)
    with pytest.raises(WrongBase, match="relative to None"):
        decode(rewritten(shared, good, put(base=None)), base, base.cid)
    _, alone = sent(shared, INT8, None, base.tensors())
    with pytest.raises(WrongBase):
        decode(alone.payload.file, base, base.cid)


def test_a_compression_that_was_not_asked_for_is_refused(shared):
    base, good = small(shared, INT8)
    file = rewritten(shared, good, lambda tensors, metadata: None)
    with pytest.raises(BadPayload, match="compressed as int8, asked for was int8 zstd"):
        decode(file, base, base.cid, asked=Spec("int8"))


def alone(**changes):
    return {"tensor/w": "F32 2 3", **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor/w": "F32 3 2"},
        {"tensor/w": "F32 2 03 "},
        {"tensor/w": "F9 2 3"},
        {"tensor/w": "F32 -2 -3"},
        {"tensor/w": "F32 " + "9" * 30},
        {"tensor/w": "F32" + " 1" * 65},
        {"tensor/w": "F32 99999999999 99999999999"},
        {"tensor/v": "F32 2 3"},
        {"tensor/v": "F32"},
        {"compression": "topk fraction=0.1", "count": "0", "values": "F16", "gaps": "U8"},
    ],
)
def test_a_malformed_model_is_a_named_error(shared, changes):
    good, decoded = sent(shared, Spec("fp16", zstd=False), None, {"w": np.ones((2, 3), "f4")})
    assert decoded.tensor("w").tolist() == [[1] * 3] * 2
    with pytest.raises(BadPayload):
        decode(rewritten(shared, good, lambda tensors, metadata: metadata.update(changes)))


def test_a_model_is_not_vastly_larger_than_its_file(shared):
    zeros = {"w": np.zeros(3_000_000, "f4")}
    good, decoded = sent(shared, Spec("int8"), None, zeros)  # without zstd, then
    np.testing.assert_array_equal(decoded.tensor("w"), zeros["w"])

    def inflate(tensors, metadata):
        parts = {"values": frame(bytes(262144)).tobytes(), "last": frame(bytes(116352)).tobytes()}
        data = parts["values"] * 11 + parts["last"]
        del tensors["values/w"]
        tensors["zstd:values/w"] = np.frombuffer(data, np.uint8)
        lengths = [len(parts["values"])] * 11 + [len(parts["last"])]
        tensors["frames:values/w"] = np.array(lengths, "u4")
        tensors["zstd:scales/w"] = frame(tensors.pop("scales/w").tobytes())

    with pytest.raises(BadPayload, match="over 64 times"):
        decode(rewritten(shared, good, inflate))


def test_a_bomb_takes_no_memory(shared):
    import tracemalloc

    base, good = small(shared, INT8)
    bomb = rewritten(shared, good, put(values__w=None, zstd_values__w=frame(bytes(700 << 10))))
    tracemalloc.start()
    with pytest.raises(BadPayload):
        opened(shared, base, bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300 << 10


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_bytes_give_a_value_or_a_named_error(shared, data):
    spec = data.draw(st.sampled_from(SPECS))
    base, good = small(shared, spec)
    raw = bytearray(b"".join(map(bytes, good.file)))
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([header, len(raw)])) - 1  # the header matters most
        raw[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(raw), data.draw(st.integers(0, len(raw)))]))
    cid = dag.add(shared, unixfs.chunk(bytes(raw[:cut])))
    try:
        back = opened(shared, base, Weights(shared, cid))
    except FormatError:
        return
    assert {name: array.shape for name, array in back.items()} == {"w": (40, 20), "n": (400,)}


@given(st.data())
def test_damaged_metadata_give_a_value_or_a_named_error(shared, data):
    spec = data.draw(st.sampled_from(SPECS))
    base, good = small(shared, spec)

    def change(tensors, metadata):
        key = data.draw(st.sampled_from(sorted(metadata)))
        metadata[key] = data.draw(
            st.text(max_size=30)
            | st.integers(-(2**70), 2**70).map(str)
            | st.sampled_from([*map(str, SPECS), "F16", "F32", "U8", "U16", "U32", "U64"])
        )

    try:
        back = opened(shared, base, rewritten(shared, good, change))
    except FormatError:
        return
    assert back["w"].shape == (40, 20)


# ---- metadata in safetensors files


def test_metadata_stands_in_the_file_and_changes_nothing_else(shared):
    tensors = {"w": np.arange(6, dtype="f4")}
    specs = [weights.spec_of("w", tensors["w"])]
    said = {"b": "é\n", "a": '"{['}
    data = b"".join(weights.chunks(specs, tensors.__getitem__, said))
    assert data == b"".join(
        weights.chunks(specs, tensors.__getitem__, dict(reversed(said.items())))
    )
    file = Weights(shared, dag.add(shared, unixfs.chunk(data)))
    assert file.metadata == said
    assert safetensors.numpy.load(data)["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert b"".join(weights.chunks(specs, tensors.__getitem__, {})) == safetensors.numpy.save(
        tensors
    )
    assert not is_payload(file)
    with pytest.raises(TypeError):
        file.metadata["c"] = "changed for all that read it next"  # type: ignore[index]


def test_metadata_that_are_no_strings_are_refused(shared):
    text = b'{"__metadata__":{"format":7}}   '
    data = len(text).to_bytes(8, "little") + text
    with pytest.raises(WeightsError, match="strings to strings"):
        Weights(shared, dag.add(shared, unixfs.chunk(data)))


def test_a_decoded_update_is_tensors_like_any_other(shared):
    before, new = pair()
    base = stored(shared, before)
    _, decoded = sent(shared, Spec("int8"), base, new)
    assert isinstance(decoded, Decoded)
    cid = unixfs.build(decoded.file(), shared.put)
    assert isinstance(cid, CID)
    plain = Weights(shared, cid)
    assert plain.nbytes == decoded.nbytes == base.nbytes
    for name in plain.names:
        np.testing.assert_array_equal(plain.tensor(name), decoded.tensor(name))
