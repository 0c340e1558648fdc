"""Conditions on rows: what they keep, and what may not be written."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedipfs.data.filters import Filter
from fedipfs.errors import ConfigError, DataError

ROWS = {
    "age": pa.array([17, 18, None, 40, 70]),
    "ward": pa.array(["icu", "er", "er", None, "icu"]),
    "smoker": pa.array([True, False, None, True, False]),
    "bmi": pa.array([20.0, float("nan"), 25.5, 30.0, 18.0]),
    "height (cm)": pa.array([150, 160, 170, 180, 190], pa.uint8()),
    "seen": pa.array([datetime.date(2020, 1, day) for day in (1, 2, 3, 4, 5)]),
    "left": pa.array([1, 2, 3, 4, 5], pa.int8()),
    "nothing": pa.nulls(5),
    "price": pa.array([1, 2, 3, 4, 5]).cast(pa.decimal128(21, 2)),
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("age >= 18", [1, 3, 4]),
        ("18 <= age", [1, 3, 4]),
        ("18 <= age < 70", [1, 3]),
        ("age >= 18 and ward != 'icu'", [1]),
        ("age < 18 or ward == 'er'", [0, 1, 2]),
        ("not age >= 18", [0]),  # where it is missing, neither is so
        ("ward in ['icu', 'er']", [0, 1, 2, 4]),
        ("ward not in ('icu',)", [1, 2]),
        ("ward is None", [3]),
        ("age is not None and bmi is not None", [0, 3, 4]),
        ("bmi > 0", [0, 2, 3, 4]),  # NaN is missing
        ("bmi == bmi", [0, 2, 3, 4]),
        ("smoker", [0, 3]),
        ("not smoker", [1, 4]),
        ("smoker == 1", [0, 3]),
        ("smoker == True", [0, 3]),
        ("`height (cm)` > 165.5 and left > -1", [2, 3, 4]),
        ("left == 3 or left == +4", [2, 3]),
        ("age > left", [0, 1, 3, 4]),
        ("seen >= '2020-01-04'", [3, 4]),
        ("'2020-01-02' > seen", [0]),
        ("nothing == 'x'", []),
        ("nothing", []),
        ("not nothing > 3", []),
        ("price >= 4.5", [4]),
        ("ward == '`age`'", []),
        ("(age > 0)", [0, 1, 3, 4]),
    ],
)
def test_the_rows_that_are_kept(text, kept):
    assert np.flatnonzero(Filter.parse(text).keep(ROWS.__getitem__)).tolist() == kept


def test_the_columns_that_it_names_and_those_that_are_text():
    found = Filter.parse("a > 1 and `b c` in ['x'] or 'y' != d and e is None and f")
    assert found.columns == {"a", "b c", "d", "e", "f"}
    assert found.as_text == {"b c", "d"}
    assert found.only_missing == {"e"}
    assert Filter.parse("a is None or not (b is not None and a < c)").only_missing == {"b"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("age.max() > 3", "`age.max()`"),
        ("__import__('os').system('id')", "`__import__('os').system('id')`"),
        ("age > __import__('os')", "`__import__('os')`"),
        ("@age > 3", "cannot be read"),
        ("age + 1 > 3", "`age + 1`"),
        ("age[0] > 3", "`age[0]`"),
        ("ward.str.contains('x')", "`ward.str.contains('x')`"),
        ("(lambda: age)() > 3", "`(lambda: age)()`"),
        ("[age for age in x]", "`[age for age in x]`"),
        ("age if smoker else 1", "`age if smoker else 1`"),
        ("(age := 3) > 2", "`(age := 3)`"),
        ("f'{age}' == 'x'", "{age}"),
        ("age > 1j", "`1j`"),
        ("ward == b'icu'", "`b'icu'`"),
        ("ward == None", "`None`"),
        ("age is 3", "`age is 3`"),
        ("3 is None", "`3 is None`"),
        ("1 < 2", "`1 < 2`"),
        ("True", "`True`"),
        ("ward in 'icu'", "`'icu'`"),
        ("ward in []", "`[]`"),
        ("ward in [age]", "`age`"),
        ("3 in [3]", "`3 in [3]`"),
        ("age > 99999999999999999999", "`99999999999999999999`"),
        ("`a b`.x > 3", "`a b.x`"),
        ("age & 3", "`age & 3`"),
        ("age = 3", "cannot be read"),
        ("age >", "cannot be read"),
        ("", "cannot be read"),
        ("age > 3; import os", "cannot be read"),
        ("age > 3\nage > 4", "cannot be read"),
        ("age > \0", "cannot be read"),
        ("(" * 500 + "age" + ")" * 500, "cannot be read"),
        ("not " * 495 + "age.x", "data.filter"),
        ("age > 3 or " * 300 + "age > 3", "longer than"),
        ("age > 3 and age == 'x'", "with numbers and with texts"),
        ("age in [1, 'x']", "with numbers and with texts"),
    ],
)
def test_what_may_not_be_written_is_named_in_one_line(text, part):
    with pytest.raises(ConfigError) as caught:
        Filter.parse(text)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert "data.filter" in str(caught.value)


@given(st.text(max_size=60) | st.text("agewrd<>=!'\"`()[], notikn10.", max_size=60))
def test_any_text_is_a_condition_or_a_config_error(text):
    try:
        Filter.parse(text)
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("age == '18'", "age and '18' cannot be compared"),
        ("ward > 3", "ward and 3 cannot be compared"),
        ("ward == age", "ward and age cannot be compared"),
        ("age", "age holds int64, neither true nor false"),
        ("seen > 3", "seen and 3 cannot be compared"),
        ("seen > 'yesterday'", "seen and 'yesterday' cannot be compared"),
        ("lists > 3", "lists and 3 cannot be compared"),
        ("images > 3", "images holds more than a value a row"),
    ],
)
def test_columns_that_cannot_be_compared_so(text, says):
    more = {"lists": pa.array([[1], [2]]), "images": np.zeros((2, 3))}
    with pytest.raises(DataError) as caught:
        Filter.parse(text).keep({**ROWS, **more}.__getitem__)
    assert says in str(caught.value) and "\n" not in str(caught.value)
