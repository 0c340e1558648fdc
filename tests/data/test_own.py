"""A partner's own data: each format, what may be wrong with files, and what is said of it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedipfs import data
from fedipfs.data.own import Source
from fedipfs.errors import ConfigError, DataError

TABLES = ("csv", "parquet", "json", "arrow")
FORMATS = (*TABLES, "numpy", "hdf5")


def write(form: str, path: Path, columns: dict[str, list]) -> Path:
    """A file of the format with these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.array(each) for name, each in columns.items()}
    match form:
        case "csv":
            pd.DataFrame(columns).to_csv(path := path.with_suffix(".csv"), index=False)
        case "parquet":
            pq.write_table(pa.table(columns), path := path.with_suffix(".parquet"))
        case "json":
            rows = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
            (path := path.with_suffix(".jsonl")).write_text("\n".join(map(json.dumps, rows)))
        case "arrow":
            pyarrow.feather.write_feather(pa.table(columns), path := path.with_suffix(".arrow"))
        case "numpy":
            np.savez(path := path.with_suffix(".npz"), **arrays)
        case "hdf5":
            with h5py.File(path := path.with_suffix(".h5"), "w") as file:
                for name, each in columns.items():
                    file[name] = arrays[name] if arrays[name].dtype.kind != "U" else each
    return path


def load(base: Path, **section):
    return Source.of(section, base).load()


def refused(kind, base: Path, **section) -> str:
    with pytest.raises(kind) as caught:
        load(base, **section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PLAIN = {"inputs": ["a", "b"], "target": "y"}


def csv(tmp_path: Path, text: str | bytes, name: str = "x.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- the section


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fromat": "csv"}, "data.fromat is not known; did you mean data.format?"),
        ({"zzz": 1}, "data.zzz is not known; use format, path,"),
        ({"format": None}, "data.format=None is unknown; choose csv, parquet, json"),
        ({"format": "parket"}, "data.format='parket' is unknown; did you mean parquet?"),
        ({"format": ["csv"]}, "data.format=['csv'] is unknown"),
        ({"path": None}, "data.path is missing"),
        ({"path": []}, "data.path is an empty list"),
        ({"path": 3}, "data.path=3 should be a path"),
        ({"path": ["a.csv", None]}, "data.path=None should be a path"),
        ({"path": "https://example.org/a.csv"}, "only files of this machine are read"),
        ({"path": "hf://datasets/a/b.csv"}, "only files of this machine are read"),
        ({"path": "zip://a.csv::b.zip"}, "only files of this machine are read"),
        ({"path": "~nobody-here/a.csv"}, "data.path='~nobody-here/a.csv'"),
        ({"inputs": None}, "data.inputs is missing"),
        ({"inputs": []}, "data.inputs is an empty list"),
        ({"inputs": ["a", "a"]}, "data.inputs names 'a' twice"),
        ({"inputs": ["a", True]}, "data.inputs=True should be the name of a column; write it in q"),
        ({"inputs": ["a", "y"]}, "data.target=y: the label is among data.inputs"),
        ({"target": None}, "data.target is missing"),
        ({"target": "a", "inputs": "a"}, "the label is among data.inputs"),
        ({"classes": "no"}, "data.classes='no' should be a list"),
        ({"classes": []}, "data.classes is an empty list"),
        ({"classes": [1.5]}, "data.classes: 1.5 should be a name or a whole number"),
        ({"classes": ["a", "a"]}, "data.classes names 'a' twice"),
        ({"filter": True}, "data.filter=True should be text"),
        ({"filter": "a.b > 3"}, "data.filter: `a.b` is not allowed"),
        ({"split": 0.2}, "data.split=0.2 should be a section"),
        ({"split": {"train": "a.csv"}}, "data.path and the paths in data.split exclude each other"),
        ({"split": {"column": "f"}}, "data.split.train is missing"),
        ({"split": {"column": "f", "train": [1], "test": [1]}}, "'1' is both in train and in test"),
        ({"split": {"column": "f", "train": [1], "tst": [2]}}, "did you mean data.split.test?"),
        ({"split": {"column": None, "train": [1]}}, "data.split.column=None should be the name"),
        ({"path": None, "split": {"test": "b.csv"}}, "data.split.train is missing"),
        ({"path": None, "split": {"train": "a.csv", "tset": "b"}}, "did you mean data.split.test?"),
        ({"size": [28, 28]}, "data.size is for images, not for csv"),
        ({"mode": "L"}, "data.mode is for images, not for csv"),
    ],
)
def test_a_section_that_is_not_right_is_a_config_error_before_anything_is_read(change, says):
    section = {"format": "csv", "path": "nowhere.csv", **PLAIN, **change}
    with pytest.raises(ConfigError) as caught:
        Source.of(section, Path("/nowhere"))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": "image"}, "data.inputs should be null for images"),
        ({"target": "label"}, "data.target should be null for images"),
        ({"size": 28}, "data.size=28 should be [height, width]"),
        ({"size": [28, 0]}, "data.size: 0 should be from 1 to"),
        ({"size": [28.0, 28]}, "data.size: 28.0 should be"),
        ({"mode": "CMYK"}, "data.mode='CMYK' should be L (grey) or RGB"),
        ({"split": {"column": "f", "train": [1]}}, "images have no columns; use {train: PATH"),
        ({"filter": "size > 3"}, "images have no 'size', only 'label'"),
    ],
)
def test_what_does_not_go_with_images(change, says):
    with pytest.raises(ConfigError) as caught:
        Source.of({"format": "images", "path": "photos", **change}, Path("/nowhere"))
    assert says in str(caught.value)


def test_null_is_as_good_as_nothing(tmp_path):
    csv(tmp_path, "a,b,y\n1,2,0\n")
    nothing = dict.fromkeys(("classes", "filter", "split", "size", "mode"))
    got = load(tmp_path, format="csv", path="x.csv", **PLAIN, **nothing)
    assert (got.name, got.note) == ("own", None)
    assert (got.train.inputs.tolist(), got.test.inputs.shape) == ([[1, 2]], (0, 2))
    assert got.test.inputs.dtype == np.float32 and got.test.targets.dtype == np.int64


# ---- one table in every format

WIDE = st.floats(-(2.0**99), 2.0**99, width=32)
NAMES = st.text(st.characters(codec="utf-8", categories=("L", "Nd")), min_size=1, max_size=8)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(WIDE, st.integers(-(2**40), 2**40), st.booleans(), st.integers(0, 2)),
        min_size=1,
        max_size=8,
    ),
    classes=st.lists(NAMES.filter(lambda name: not name.isdigit()), min_size=3, max_size=3),
    bound=st.integers(-5, 5),
)
def test_one_table_gives_the_same_examples_in_every_format(tmp_path_factory, rows, classes, bound):
    classes = [f"{name}{i}" for i, name in enumerate(classes)]
    tmp_path = tmp_path_factory.mktemp("table")
    columns = {
        "real": [row[0] for row in rows],
        "whole": [row[1] for row in rows],
        "truth": [row[2] for row in rows],
        "label": [classes[row[3]] for row in rows],
        "fold": [row[3] for row in rows],
    }
    section = {
        "inputs": ["whole", "real", "truth"],
        "target": "label",
        "classes": classes,
        "filter": f"whole > {bound} or truth",
        "split": {"column": "fold", "train": [0, 1], "test": [2]},
    }
    kept = [row for row in rows if row[1] > bound or row[2]]
    for form in FORMATS:
        write(form, tmp_path / "table", columns)
        source = Source.of({"format": form, "path": ".", **section}, tmp_path)
        train = [row for row in kept if row[3] < 2]
        if not train:
            with pytest.raises(DataError, match="no examples to train on"):
                source.load()
            continue
        got = source.load()
        for examples, part in ((got.train, train), (got.test, [r for r in kept if r[3] == 2])):
            wanted = np.array([[r[1], r[0], r[2]] for r in part], np.float32).reshape(-1, 3)
            assert examples.inputs.dtype == np.float32
            np.testing.assert_array_equal(examples.inputs, wanted, err_msg=form)
            assert examples.targets.tolist() == [row[3] for row in part]


@pytest.mark.parametrize("form", FORMATS)
def test_breast_cancer_from_two_files_is_what_scikit_learn_has(tmp_path, form):
    real = data.load("breast_cancer")
    for name, part in (("train", real.train), ("test", real.test)):
        columns = {f"m{i}": part.inputs[:, i].tolist() for i in range(30)}
        columns["kind"] = [("malignant", "benign")[label] for label in part.targets]
        write(form, tmp_path / name, columns)
    (suffix,) = {path.suffix for path in tmp_path.glob("*.*")}
    got = load(
        tmp_path,
        format=form,
        split={"train": f"train{suffix}", "test": [f"test{suffix}"]},
        inputs=[f"m{i}" for i in range(30)],
        target="kind",
        classes=["malignant", "benign"],
    )
    for mine, theirs in ((got.train, real.train), (got.test, real.test)):
        np.testing.assert_array_equal(mine.inputs, theirs.inputs)
        np.testing.assert_array_equal(mine.targets, theirs.targets)
        assert mine.inputs.flags.c_contiguous and mine.inputs.flags.writeable


@pytest.mark.parametrize("form", ["parquet", "json", "arrow", "numpy", "hdf5"])
def test_digits_as_arrays_are_what_scikit_learn_has(tmp_path, form):
    real = data.load("digits").train
    columns = {"image": real.inputs.tolist(), "digit": real.targets.tolist()}
    if form in ("numpy", "hdf5"):
        path = tmp_path / ("digits.npz" if form == "numpy" else "digits.h5")
        if form == "numpy":
            np.savez(path, image=real.inputs, digit=real.targets)
        else:
            with h5py.File(path, "w") as file:
                file["set/image"], file["digit"] = real.inputs, real.targets[:, None]
    else:
        path = write(form, tmp_path / "digits", columns)
        if form != "json":
            table = pa.table(columns).set_column(
                0, "image", pa.array(columns["image"], pa.list_(pa.list_(pa.uint8())))
            )
            if form == "parquet":
                pq.write_table(table, path, row_group_size=500)
            else:
                pyarrow.feather.write_feather(table, path, chunksize=500)
    inputs = "set/image" if form == "hdf5" else "image"
    got = load(tmp_path, format=form, path=path.name, inputs=inputs, target="digit").train
    assert got.inputs.dtype == (np.int64 if form == "json" else np.uint8)  # JSON has no uint8
    np.testing.assert_array_equal(got.inputs, real.inputs)
    np.testing.assert_array_equal(got.targets, real.targets)
    if form != "hdf5":  # whose labels are (N, 1) here
        section = {"format": form, "path": path.name, "inputs": inputs, "target": "digit"}
        some = load(tmp_path, filter="digit in [3, 8]", **section).train
        kept = np.isin(real.targets, [3, 8])
        np.testing.assert_array_equal(some.inputs, real.inputs[kept])


def test_what_the_datasets_library_saved_is_read(tmp_path):
    from datasets import Array2D, ClassLabel, Dataset, Features

    real = data.load("digits").train
    features = Features({"x": Array2D((8, 8), "uint8"), "y": ClassLabel(names=list("abcdefghij"))})
    rows = {"x": real.inputs.tolist(), "y": real.targets.tolist()}
    saved = Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "x.parquet"))
    for form, path in (("arrow", "saved"), ("parquet", "x.parquet")):
        got = load(tmp_path, format=form, path=path, inputs="x", target="y").train
        np.testing.assert_array_equal(got.inputs, real.inputs)
        assert got.inputs.dtype == np.uint8
        np.testing.assert_array_equal(got.targets, real.targets)


# ---- which files, and in which order


def test_rows_come_in_the_order_of_the_paths_whatever_is_said_first(tmp_path):
    for i, name in enumerate(["b", "a", "c/d", ".hidden", "c/._d"]):
        write("csv", tmp_path / name, {"a": [i], "y": [0]})
    (tmp_path / "notes.txt").write_text("no data")
    section = {"format": "csv", "inputs": "a", "target": "y"}
    for path, rows in {
        ".": [1, 0, 2],
        "*.csv": [1, 0],
        "**/*.csv": [1, 0, 2],
        "b.csv": [0],
        "?.csv": [1, 0],
    }.items():
        assert load(tmp_path, path=path, **section).train.inputs.tolist() == rows
    several = ["c", "b.csv", "a.csv", "*.csv", str(tmp_path / "a.csv")]
    assert load(tmp_path, path=several, **section).train.inputs.tolist() == [1, 0, 2]


def test_a_name_with_the_signs_of_a_pattern_is_a_name(tmp_path):
    write("csv", tmp_path / "a [1]*", {"a": [7], "y": [0]})
    got = load(tmp_path, format="csv", path="a [1]*.csv", inputs="a", target="y")
    assert got.train.inputs.tolist() == [7]


def test_files_that_are_not_there_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a::b.csv").write_text("a,b,y\n1,2,0\n")
    for path, says in {
        "no.csv": "no.csv: there is no such file",
        "no*.csv": "no*.csv: there is no such file",
        "empty": "empty: it holds no file of the format csv (.csv, ",
        "*.csv": "'::' in the path",
    }.items():
        assert says in refused(DataError, tmp_path, format="csv", path=path, **PLAIN)


def test_no_file_is_both_to_train_and_to_test_on(tmp_path):
    csv(tmp_path, "a,b,y\n1,2,0\n")
    split = {"train": "x.csv", "test": "*.csv"}
    message = refused(DataError, tmp_path, format="csv", split=split, **PLAIN)
    assert "x.csv is both in data.split.train and in data.split.test" in message


@pytest.mark.parametrize("form", FORMATS)
def test_every_file_by_itself_has_the_columns(tmp_path, form):
    """A second file with another order of columns, and other types, is as good."""
    write(form, tmp_path / "1", {"a": [1, 2], "b": [3, 4], "y": [0, 1], "z": [1, 1]})
    second = write(form, tmp_path / "2", {"y": [1.0], "b": [0.5], "a": [True]})
    got = load(tmp_path, format=form, path=".", **PLAIN).train
    assert (got.inputs.tolist(), got.targets.tolist()) == ([[1, 3], [2, 4], [1, 0.5]], [0, 1, 1])
    one = load(tmp_path, format=form, path=".", inputs="b", target="y").train
    assert (one.inputs.tolist(), one.inputs.dtype) == ([3, 4, 0.5], np.float32)
    message = refused(DataError, tmp_path, format=form, path=".", inputs=["a", "z"], target="y")
    assert f"{second} has no column 'z'" in message
    message = refused(DataError, tmp_path, format=form, path=".", inputs=["a", "bb"], target="y")
    assert "has no column 'bb'; did you mean 'b'?" in message


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_none_is_named(tmp_path, form):
    path = write(form, tmp_path / "good", {"a": [1], "b": [2], "y": [0]})
    whole = path.read_bytes()
    for content in (b"", b"\0\1\2\3 nonsense" * 9, whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert str(path) in refused(DataError, tmp_path, format=form, path=path.name, **PLAIN)


# ---- CSV as it is found


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa,b,y\r\n1,2.5,0\r\n3,4,1\r\n",  # as Excel saves it
        "y;b;a\n0;2.5;1\n1;4;3\n",
        "a\tb\ty\n1\t2.5\t0\n3\t4\t1\n",
        "a|b|y\n1|2.5|0\n3|4|1",
        '"a","b","y"\n"1","2.5","0"\n\n"3","4","1"\n\n',
        'note,a,b,y\n"x, y\n;",1,2.5,0\n,3,4,1\n',
        "a,b,y,x,x\n1,2.5,0,,\n3,4,1,,\n",  # columns that nobody asks for may be doubled
    ],
    ids=["BOM, CRLF", "semicolons", "tabs", "bars", "quotes", "text", "doubled"],
)
def test_csv_in_many_dresses(tmp_path, text):
    csv(tmp_path, text)
    got = load(tmp_path, format="csv", path="x.csv", **PLAIN).train
    assert (got.inputs.tolist(), got.targets.tolist()) == ([[1, 2.5], [3, 4]], [0, 1])


def test_csv_and_json_that_are_packed(tmp_path):
    text = b"a,b,y\n1,2,0\n"
    csv(tmp_path, gzip.compress(text), "1.csv.gz")
    csv(tmp_path, bz2.compress(text), "2.csv.bz2")
    csv(tmp_path, lzma.compress(text), "3.csv.xz")
    with zipfile.ZipFile(tmp_path / "4.csv.zip", "w") as archive:
        archive.writestr("x.csv", text)
    got = load(tmp_path, format="csv", path=".", **PLAIN).train
    assert got.inputs.tolist() == [[1, 2]] * 4
    rows = [{"a": 1, "b": 2, "y": 0}]
    csv(tmp_path, gzip.compress(json.dumps(rows).encode()), "1.json.gz")
    csv(tmp_path, gzip.compress(json.dumps(rows[0]).encode()), "2.jsonl.gz")
    got = load(tmp_path, format="json", path=".", **PLAIN).train
    assert got.inputs.tolist() == [[1, 2]] * 2


def test_csv_that_is_packed_and_cut_short(tmp_path):
    text = b"a,b,y\n1,2,0\n"
    csv(tmp_path, gzip.compress(text * 1000)[:-9], "x.csv.gz")
    assert "x.csv.gz cannot be read" in refused(
        DataError, tmp_path, format="csv", path=".", **PLAIN
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b,y\n", "data.path: there is no row in "),
        ("a,b,y\n1,,0\n", "x.csv, row 1, b: is missing"),
        ("a,b,y\n1,2,0\n1,NA,0\n", "x.csv, row 2, b: is missing"),
        ("a,b,y\n1,2,0\n1,inf,0\n", "x.csv, row 2, b: is infinite"),
        ("a,b,y\n1,2,0\n1e300,3,0\n", "x.csv, row 2, a: is 1e+300, too large for float32"),
        ("a,b,y\n1,2,0\n1,many,0\n", "x.csv, row 2, b: 'many' is text, not a number"),
        ('a,b,y\n1,2,0\n1,"2,5",0\n', "row 2, b: '2,5' is text, not a number (a decimal comma?"),
        ("a,b,y\n1,2,0\n1,2\n", "x.csv, row 2, y: has no label"),
        ("a,b,y\n1,2,-1\n", "x.csv, row 1, y: -1 is less than 0"),
        ("a,b,y\n1,2,0\n1,2,0.5\n", "x.csv, row 2, y: 0.5 is not a whole number"),
        ("a,b,y\n1,2,no\n", "x.csv, row 1, y: 'no' is no whole number; name the labels"),
        ("a,b,y\n1,2,0\n1,2,3,4\n", "x.csv cannot be read as csv"),
        ("a,b,y\n1,2,3,4\n1,2,3,4\n", "a row has more cells than there are columns"),
        ("a,b,y\n1,2,3,4\n1,2,3\n", "a row has more cells than there are columns"),
        ('a,b,y\n1,2,"0\n', "x.csv cannot be read as csv"),
        ("a,b,a,y\n1,2,3,0\n", "x.csv has 2 columns called 'a'"),
        ("a, b,y\n1,2,0\n", "has no column 'b'; did you mean ' b'?"),
        ("A,B,y\n1,2,0\n", "has no column 'a'"),
        ("\n", "x.csv cannot be read as csv"),
        ("a,b,y\n1,2,\xe9\n".encode("latin-1"), "it is not UTF-8 text; convert it"),
    ],
)
def test_csv_that_is_not_right(tmp_path, text, says):
    csv(tmp_path, text)
    assert says in refused(DataError, tmp_path, format="csv", path="x.csv", **PLAIN)


def test_a_text_far_down_in_a_wide_file_is_found_at_its_row(tmp_path):
    names = [f"c{i}" for i in range(600)]
    rows = [",".join(["1"] * 600) + ",0"] * 2500
    rows[2200] = ",".join(["1"] * 599 + ["oops"]) + ",0"
    csv(tmp_path, "\n".join([",".join([*names, "y"]), *rows]))
    message = refused(DataError, tmp_path, format="csv", path="x.csv", inputs=names, target="y")
    assert "x.csv, row 2201, c599: 'oops' is text" in message
    got = load(tmp_path, format="csv", path="x.csv", inputs=names[:599], target="y")
    assert got.train.inputs.shape == (2500, 599)


def test_the_rows_that_are_not_used_may_be_anything(tmp_path):
    csv(tmp_path, "a,b,y\n1,2,0\n,3,1\n1,x,1\n4,5,7\n")
    section = {"format": "csv", "path": "x.csv", "inputs": "a", "target": "y"}
    got = load(tmp_path, filter="a is not None and y < 2", **section)
    assert (got.train.inputs.tolist(), got.train.targets.tolist()) == ([1, 1], [0, 1])
    message = refused(DataError, tmp_path, filter="b == 2", **section)
    assert "x.csv: data.filter: b and 2 cannot be compared" in message
    assert "of 4 rows, data.filter leaves out 4" in refused(
        DataError, tmp_path, filter="a > 100", **section
    )


@pytest.mark.parametrize("more", ["", " and ward != 'x'"])
def test_only_an_empty_cell_is_missing_in_a_column_of_names(tmp_path, more):
    csv(tmp_path, "a,y,ward\n1,0,NA\n2,0,\n3,1,icu\n4,1,null\nNA,1,icu\n")
    condition = f"ward is not None and a is not None{more}"
    section = {"format": "csv", "path": "x.csv", "inputs": ["a"], "target": "y"}
    got = load(tmp_path, filter=condition, **section).train.inputs
    assert got[:, 0].tolist() == [1, 3, 4]


# ---- labels


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("labels", "classes", "targets"),
    [
        (["no", "yes", "no"], ["no", "yes"], [0, 1, 0]),
        (["None", "007", "NA"], ["NA", "None", "007"], [1, 2, 0]),  # no missing values, no numbers
        (["1", "x", "1"], [1, "x"], [0, 1, 0]),
        ([7, 3, 7], [3, 7], [1, 0, 1]),
        ([7, 3, 7], ["3", "7"], [1, 0, 1]),
        ([True, False, True], [False, True], [1, 0, 1]),
        ([True, False, True], None, [1, 0, 1]),
        ([2.0, 0.0, 1.0], None, [2, 0, 1]),
        ([2.0, 0.0, 1.0], [2, 1, 0], [0, 2, 1]),
        (["café", "naïve", "日本"], ["日本", "café", "naïve"], [1, 2, 0]),
    ],
)
def test_labels_by_name_and_by_number(tmp_path, form, labels, classes, targets):
    write(form, tmp_path / "x", {"a": [1, 2, 3], "y": labels})
    section = {"format": form, "path": ".", "inputs": "a", "target": "y"}
    got = load(tmp_path, classes=classes, **section).train.targets
    assert (got.tolist(), got.dtype) == (targets, np.int64)


def test_labels_that_are_not_known(tmp_path):
    csv(tmp_path, "a,y\n1,no\n2,\n3,maybe\n")
    section = {"format": "csv", "path": "x.csv", "inputs": "a", "target": "y"}
    message = refused(DataError, tmp_path, classes=["no", "yes"], **section)
    assert "x.csv, row 2, y: has no label" in message
    message = refused(DataError, tmp_path, classes=["no", "yes"], filter="a > 2", **section)
    assert "x.csv, row 3, y: 'maybe' is not in data.classes (no, yes)" in message
    # [no, yes] without quotation marks is this for YAML
    message = refused(DataError, tmp_path, classes=[False, True], **section)
    assert "write 'no' in quotes" in message


def test_labels_of_other_kinds(tmp_path):
    for column, says in {
        "lists": "row 1, lists: [0] is no whole number",
        "dates": "is no whole number; name the labels",
        "large": "is too large for a label",
        "missing": "row 2, missing: has no label",
    }.items():
        table = {
            "a": [1, 2],
            "lists": [[0], [1]],
            "dates": pa.array([0, 1], pa.date32()),
            "large": pa.array([1, 2**63], pa.uint64()),
            "missing": [1, None],
        }
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        section = {"format": "parquet", "path": "x.parquet", "inputs": "a", "target": column}
        assert says in refused(DataError, tmp_path, **section)


def test_categories_of_pandas(tmp_path):
    frame = pd.DataFrame({"a": [1, 2, 3], "y": pd.Categorical(["u", "v", "u"])})
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_feather(tmp_path / "x.feather")
    for form in ("parquet", "arrow"):
        section = {"format": form, "path": ".", "inputs": "a", "target": "y"}
        got = load(tmp_path, classes=["v", "u"], filter="y != 'w'", **section)
        assert got.train.targets.tolist() == [1, 0, 1]


# ---- the split


def test_a_column_says_what_is_to_train_and_to_test_on(tmp_path):
    csv(tmp_path, "a,y,fold,day\n1,0,a,1\n2,1,c,2\n3,0,b,3\n4,1,,4\n5,1,d,5\n")
    section = {"format": "csv", "path": "x.csv", "inputs": "a", "target": "y"}
    source = Source.of(
        {**section, "split": {"column": "fold", "train": ["a", "b"], "test": "c"}}, tmp_path
    )
    found = source.read()
    assert found.dataset.train.inputs.tolist() == [1, 3]
    assert found.dataset.test.inputs.tolist() == [2]
    assert (found.files, found.rows, found.filtered, found.unassigned) == (1, 5, 0, 2)
    split = {"column": "day", "train": [5, 1], "test": [2]}
    got = load(tmp_path, split=split, **section)
    assert (got.train.inputs.tolist(), got.test.inputs.tolist()) == ([1, 5], [2])
    none = {"column": "fold", "train": ["z"], "test": ["a"]}
    message = refused(DataError, tmp_path, split=none, **section)
    assert "of 5 rows, data.filter leaves out 0, 1 are to test on, and 4 in no part" in message


# ---- arrays


def test_a_folder_of_npy_files_is_one_set_of_arrays(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4), dtype=np.uint8)
    for part, rows in (("1", slice(0, 4)), ("2", slice(4, 6))):
        (tmp_path / part).mkdir()
        np.save(tmp_path / part / "x.npy", images[rows])
        np.save(tmp_path / part / "y.npy", np.arange(6)[rows].astype(">i2"))  # big-endian
        np.save(tmp_path / part / "other.npy", np.arange(99))
    got = load(tmp_path, format="numpy", path=".", inputs="x", target="y", filter="y > 0").train
    np.testing.assert_array_equal(got.inputs, images[1:])
    assert (got.inputs.dtype, got.targets.tolist()) == (np.uint8, [1, 2, 3, 4, 5])
    both = ["1/x.npy", "1/y.npy"]
    assert len(load(tmp_path, format="numpy", path=both, inputs="x", target="y").train) == 4
    message = refused(DataError, tmp_path, format="numpy", path=["1/x.npy"], inputs="x", target="y")
    assert "has no column 'y'; it has x" in message


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.arange(3, dtype=np.float64), np.float32),
        (np.arange(3, dtype=np.longdouble), np.float32),
        (np.arange(3, dtype=np.float16), np.float16),
        (np.arange(3, dtype=np.int16), np.int16),
        (np.arange(6, dtype=">f8").reshape(3, 2), np.float32),
        (np.array([True, False, True]), np.bool_),
    ],
)
@pytest.mark.parametrize("form", ["numpy", "hdf5"])
def test_one_name_gives_the_array_as_it_is_but_for_doubles(tmp_path, form, array, kind):
    write(form, tmp_path / "x", {"y": [0, 1, 2]})
    if form == "numpy":
        np.savez(tmp_path / "x.npz", x=array, y=np.arange(3))
    else:
        with h5py.File(tmp_path / "x.h5", "a") as file:
            file["x"] = array
    got = load(tmp_path, format=form, path=".", inputs="x", target="y").train.inputs
    assert got.dtype == kind
    np.testing.assert_array_equal(got, array.astype(kind))


def test_arrays_that_are_not_right(tmp_path):
    arrays = {
        "y": np.arange(3),
        "short": np.zeros((2, 2)),
        "one": np.array(3.0),
        "complex": np.zeros(3, np.complex64),
        "text": np.array(["a", "b", "c"]),
        "nan": np.array([[0, 1], [2, np.nan], [3, 4]]),
        "image": np.zeros((3, 2, 2)),
    }
    np.savez(tmp_path / "x.npz", **arrays, objects=np.array([{}, 1, None], object))
    section = {"format": "numpy", "path": "x.npz", "target": "y"}
    for inputs, says in {
        "short": "y has 3 rows, and short has 2",
        "one": "one is a single value",
        "complex": "x.npz, row 1, complex: holds complex64, not numbers",
        "text": "x.npz, row 1, text: 'a' is text, not a number",
        "nan": "x.npz, row 2, nan: is missing",
        "objects": "Python objects, which are not loaded",
        "zzz": "x.npz has no column 'zzz'",
    }.items():
        assert says in refused(DataError, tmp_path, inputs=inputs, **section)
    message = refused(DataError, tmp_path, inputs=["y2", "image"], **{**section, "target": "y"})
    assert "no column 'y2'" in message
    message = refused(DataError, tmp_path, inputs=["image"], **section)
    assert "image: holds arrays of shape (2, 2); name it alone in data.inputs" in message


def test_nothing_pickled_is_run(tmp_path):
    class Mine:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    np.save(tmp_path / "x.npy", np.array([Mine(), Mine()], object))
    np.save(tmp_path / "y.npy", np.arange(2))
    message = refused(DataError, tmp_path, format="numpy", path=".", inputs="x", target="y")
    assert "Python objects" in message and not (tmp_path / "run").exists()


def test_files_of_two_shapes(tmp_path):
    for name, width in (("1", 2), ("2", 3)):
        np.savez(tmp_path / f"{name}.npz", x=np.zeros((4, width)), y=np.zeros(4, int))
    message = refused(DataError, tmp_path, format="numpy", path=".", inputs="x", target="y")
    assert "2.npz: x has the shape (3,) a row, and in" in message and "1.npz (2,)" in message


def test_hdf5_without_h5py_says_what_to_install(tmp_path, monkeypatch):
    write("hdf5", tmp_path / "x", {"a": [1], "y": [0]})
    monkeypatch.setitem(sys.modules, "h5py", None)
    message = refused(ConfigError, tmp_path, format="hdf5", path=".", inputs="a", target="y")
    assert "pip install 'fedipfs[hdf5]'" in message


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ([[1, 2], [3], [4, 5]], "row 2, x: has 1 values, and the row before it 2"),
        ([[1, 2], [3, None], [4, 5]], "row 2, x: is missing"),
        ([[1, 2], None, [4, 5]], "row 2, x: is missing"),
        ([[], [], []], "row 1, x: is an empty list"),
        ([[[1], [2]], [[1], [2]], [[1], [2, 3]]], "row 3, x: has 2 values"),
        ([["a"], ["b"], ["c"]], "row 1, x: 'a' is text"),
    ],
)
def test_lists_that_make_no_array(tmp_path, lists, says):
    pq.write_table(pa.table({"x": lists, "y": [0, 1, 2]}), tmp_path / "x.parquet")
    message = refused(DataError, tmp_path, format="parquet", path=".", inputs="x", target="y")
    assert says in message


# ---- JSON


def test_json_arrays_keep_all_digits(tmp_path):
    values = [1.23456789012345e-8, 3.4e-38, 123456789.0, 0.1]
    rows = [{"a": value, "y": 0} for value in values]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\ufeff \n" + json.dumps(rows)):
        (tmp_path / "x.json").write_text(text)
        got = load(tmp_path, format="json", path="x.json", inputs=["a"], target="y")
        assert got.train.inputs[:, 0].tolist() == np.float32(values).tolist()


def test_json_lines_whose_types_come_late(tmp_path):
    rows = [{"a": None, "y": 0}] + [{"a": 1, "y": 0}] * 5000 + [{"a": 2.5, "y": 1, "late": "x"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {"format": "json", "path": ".", "inputs": ["a"], "target": "y"}
    got = load(tmp_path, filter="a is not None", **section).train
    assert (len(got), float(got.inputs[-1, 0])) == (5001, 2.5)
    assert "x.jsonl, row 1, a: is missing" in refused(DataError, tmp_path, **section)
    got = load(tmp_path, filter="late == 'x'", **section).train
    assert got.inputs.tolist() == [[2.5]]


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "y": 0}\n{"a": "x", "y": 0}', '{"a": 1, "y": 0}\n{"a": ', "[1, 2]", "3", "[{]"],
)
def test_json_that_is_not_right(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    message = refused(DataError, tmp_path, format="json", path=".", inputs="a", target="y")
    assert "x.json" in message


# ---- images


@pytest.fixture
def photos(tmp_path):
    """Write images: a function of path and array."""
    from PIL import Image

    def save(name: str, array: np.ndarray, mode: str | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(array)
        (image.convert(mode) if mode else image).save(path)
        return path

    return save


def grey(value: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.full((height, width), value, np.uint8)


def test_digits_as_a_folder_of_images(tmp_path, photos):
    real = data.load("digits")
    for part, examples in (("train", real.train), ("test", real.test)):
        for i, (image, label) in enumerate(zip(examples.inputs, examples.targets, strict=True)):
            photos(f"{part}/{label}/{i:04}.png", image)
    got = load(tmp_path, format="images", split={"train": "train", "test": "test"})
    for mine, theirs in ((got.train, real.train), (got.test, real.test)):
        order = np.argsort(theirs.targets, kind="stable")  # class by class
        np.testing.assert_array_equal(mine.inputs, theirs.inputs[order])
        np.testing.assert_array_equal(mine.targets, theirs.targets[order])
        assert mine.inputs.dtype == np.uint8


def test_classes_are_the_folders_or_as_given(tmp_path, photos):
    for i, name in enumerate(
        ["cat/a.png", "cat/b.PNG", "dog/a.bmp", "unclear/a.png", "dog/deep.gif"]
    ):
        photos(name, grey(i))
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"what is no image is left alone")
    section = {"format": "images", "path": "."}
    source = Source.of({**section, "filter": "label != 'unclear'", "mode": "L"}, tmp_path)
    found = source.read()
    assert (found.classes, found.filtered) == (("cat", "dog"), 1)
    assert found.dataset.train.targets.tolist() == [0, 0, 1, 1]
    assert found.dataset.train.inputs.shape == (4, 4, 6)
    assert found.dataset.train.inputs[:, 0, 0].tolist() == [0, 1, 2, 4]
    classes = ["bird", "dog", "cat", "unclear"]
    got = load(tmp_path, classes=classes, mode="L", **section)
    assert got.train.targets.tolist() == [2, 2, 1, 1, 3]
    message = refused(DataError, tmp_path, classes=["cat", "dog"], mode="L", **section)
    assert "unclear/a.png: 'unclear' is not in data.classes (cat, dog)" in message


def test_colour_stays_and_size_and_mode_are_made(tmp_path, photos):
    colours = np.zeros((4, 6, 3), np.uint8)
    colours[..., 0] = 200
    photos("a/1.png", colours)
    got = load(tmp_path, format="images", path=".").train.inputs
    np.testing.assert_array_equal(got, colours[None])
    photos("a/2.jpg", grey(100, 8, 8))
    photos("a/3.png", grey(100), "P")
    got = load(tmp_path, format="images", path=".", size=[2, 3], mode="RGB").train.inputs
    assert got.shape == (3, 2, 3, 3)
    assert got[0, 0, 0].tolist() == [200, 0, 0] and abs(int(got[1, 1, 1, 1]) - 100) < 3
    assert load(tmp_path, format="images", path=".", size=[2, 3], mode="L").train.inputs.ndim == 3


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("b/2.png", lambda: grey(1, 5, 6), "2.png: is grey, 5 x 6, and"),
        ("b/2.png", lambda: np.zeros((4, 6, 3), np.uint8), "is colour, 4 x 6, and"),
        ("b/2.png", lambda: np.zeros((4, 6, 4), np.uint8), "2.png: has the mode RGBA; give data."),
        ("b/2.png", lambda: np.zeros((4, 6), np.uint16), "2.png: has more than 8 bits a pixel"),
        ("2.png", lambda: grey(1), "2.png lies in no folder of a class"),
    ],
)
def test_images_that_do_not_go_together(tmp_path, photos, name, make, says):
    first = photos("b/1.png", grey(0))
    photos(name, make())
    message = refused(DataError, tmp_path, format="images", path=".")
    assert says in message
    if "and" in says:
        assert f"{first} is grey, 4 x 6; give data." in message


def test_images_that_are_none(tmp_path, photos):
    good = photos("a/1.png", grey(0, 300, 300)).read_bytes()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    for content in (b"", b"GIF89a", good[: len(good) // 2], eps):
        (tmp_path / "a" / "2.png").write_bytes(content)
        message = refused(DataError, tmp_path, format="images", path=".")
        assert "2.png: cannot be read as an image" in message


def test_a_stack_of_images_is_not_taken_for_one(tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    frames = [Image.fromarray(grey(i)) for i in range(3)]
    frames[0].save(tmp_path / "a" / "1.tif", save_all=True, append_images=frames[1:])
    assert "1.tif: holds several images" in refused(DataError, tmp_path, format="images", path=".")


def test_photographs_are_turned_as_the_camera_says(tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(grey(9)).save(tmp_path / "a" / "1.jpg", exif=exif)
    assert load(tmp_path, format="images", path=".").train.inputs.shape == (1, 6, 4)


# ---- what reading leaves behind


def test_nothing_is_asked_of_the_network_and_nothing_is_left(tmp_path):
    for form in TABLES:
        write(form, tmp_path / "data" / "x", {"a": [1, 2], "b": [3, 4], "y": [0, 1]})
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    program = """
import socket, sys, pathlib
def refuse(*arguments): sys.exit("a socket was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
from fedipfs.data.own import Source
for form in ("csv", "parquet", "json", "arrow"):
    section = {"format": form, "path": "data", "inputs": ["a", "b"], "target": "y"}
    assert Source.of(section, pathlib.Path.cwd()).load().train.inputs.shape == (2, 2)
"""
    home = str(tmp_path / "home")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG"))}
    env |= {"HOME": home, "TMPDIR": str(tmp_path / "tmp"), "FLWR_HOME": str(tmp_path / "flwr")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [*(tmp_path / "home").rglob("*"), *(tmp_path / "tmp").rglob("*")] == []


def test_the_library_prints_nothing_of_its_own(tmp_path, capfd):
    csv(tmp_path, "a,b,y\n1,2,0\n1,2,3,4\n")
    refused(DataError, tmp_path, format="csv", path="x.csv", **PLAIN)
    assert capfd.readouterr() == ("", "")
