"""Which rows to use, as a condition on columns: "age >= 18 and ward != 'icu'".

The words are Python's, but nothing is evaluated as Python: the text is parsed, all but comparisons
of columns with numbers and texts is refused, and what is left is computed by Arrow.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedipfs.errors import ConfigError, DataError, one_line

MAX_LENGTH = 2000  # characters
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`([^`]+)`""")
_COMPARED = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_HINT = (
    "use columns, numbers and 'texts' with == != < <= > >=, in [...], is None, and, or, not; "
    "a column whose name has spaces or signs goes between backticks"
)


@dataclass(frozen=True)
class Filter:
    """A condition. `columns` are those it names, `as_text` those that it compares with texts, and
    `only_missing` those of which it asks nothing but `is None`.

    A comparison with a value that is missing is neither true nor false, as in SQL; only rows for
    which the whole is true are used.
    """

    text: str
    columns: frozenset[str] = field(compare=False)
    as_text: frozenset[str] = field(compare=False)
    only_missing: frozenset[str] = field(compare=False)
    _tree: ast.expr = field(repr=False, compare=False)
    _names: dict[str, str] = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Raises ConfigError, naming the part that is not allowed."""
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"data.filter is longer than {MAX_LENGTH} characters")
        names: dict[str, str] = {}

        def rename(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0]
            word = f"column_{len(names)}_"
            names[word] = match[1]
            return word

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what Python may make of a text one day
                tree = ast.parse(_QUOTED.sub(rename, text).strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or error
            raise ConfigError(
                f"data.filter={text!r:.200} cannot be read ({one_line(reason, 120)}); {_HINT}"
            ) from None
        found = cls(text, frozenset(), frozenset(), frozenset(), tree, names)
        try:
            found._check(tree)
        except RecursionError:
            raise ConfigError(f"data.filter={text!r:.200} is nested too deeply") from None
        columns = {found._name(node) for node in ast.walk(tree) if isinstance(node, ast.Name)}
        texts: set[str] = set()
        others: set[str] = set()
        for name, values in found._comparisons():
            for each in values:
                (texts if isinstance(each, str) else others).add(name)
        if both := sorted(texts & others):
            raise ConfigError(
                f"data.filter compares {both[0]} with numbers and with texts; use one of them"
            )
        only_missing = columns - {found._name(node) for node in _used(tree)}
        return cls(text, frozenset(columns), frozenset(texts), frozenset(only_missing), tree, names)

    def keep(self, column: Callable[[str], Any]) -> NDArray[np.bool_]:
        """(N,): which rows to use; `column` gives an Arrow array, a value a row, by its name.

        Raises DataError where a column's values cannot be compared as asked.
        """
        found = self._condition(self._tree, column).fill_null(False)
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.bool_)

    # ---- what may be written

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.BoolOp(values=values):
                for each in values:
                    self._check(each)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._check(operand)
            case ast.Name():
                pass
            case ast.Compare():
                for a, op, b in _pairs(node):
                    self._check_pair(node, a, op, b)
            case _:
                self._refuse(node)

    def _check_pair(self, node: ast.expr, left: ast.expr, op: ast.cmpop, right: ast.expr) -> None:
        match op:
            case ast.In() | ast.NotIn():
                self._check_operand(left)
                if not isinstance(left, ast.Name):
                    self._refuse(node)
                if not isinstance(right, ast.List | ast.Tuple) or not right.elts:
                    self._refuse(right)
                for each in right.elts:
                    if isinstance(each, ast.Name):
                        self._refuse(each)
                    self._check_operand(each)
            case ast.Is() | ast.IsNot():
                is_none = isinstance(right, ast.Constant) and right.value is None
                if not isinstance(left, ast.Name) or not is_none:
                    self._refuse(node)
            case _:
                self._check_operand(left)
                self._check_operand(right)
                if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
                    self._refuse(node)

    def _check_operand(self, node: ast.expr) -> None:
        if isinstance(node, ast.Name):
            return
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError, RecursionError, MemoryError):
            self._refuse(node)
        if not isinstance(value, bool | int | float | str):
            self._refuse(node)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            self._refuse(node)

    def _refuse(self, node: ast.AST) -> NoReturn:
        raise ConfigError(f"data.filter: `{self._source(node)}` is not allowed; {_HINT}")

    def _source(self, node: ast.AST) -> str:
        text = one_line(ast.unparse(node), 120)
        for word, name in self._names.items():
            text = text.replace(word, name)
        return text

    def _name(self, node: ast.Name) -> str:
        return self._names.get(node.id, node.id)

    def _comparisons(self) -> Iterator[tuple[str, list[Any]]]:
        """Every column that is compared with constants, and these."""
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.Compare):
                continue
            for a, op, b in _pairs(node):
                if isinstance(op, ast.Is | ast.IsNot):
                    continue
                for one, other in ((a, b), (b, a)):
                    if isinstance(one, ast.Name) and not isinstance(other, ast.Name):
                        value = ast.literal_eval(other)
                        yield self._name(one), list(value) if _is_several(other) else [value]

    # ---- what it says of some rows

    def _condition(self, node: ast.expr, column: Callable[[str], Any]) -> Any:
        """A Boolean Arrow array, null where it is not known."""
        import pyarrow as pa
        import pyarrow.compute as pc

        match node:
            case ast.BoolOp(op=op, values=values):
                join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                result = self._condition(values[0], column)
                for each in values[1:]:
                    result = join(result, self._condition(each, column))
                return result
            case ast.UnaryOp(operand=operand):
                return pc.invert(self._condition(operand, column))
            case ast.Name():
                array = self._column(node, column)
                if pa.types.is_null(array.type):
                    return array.cast(pa.bool_())
                if not pa.types.is_boolean(array.type):
                    raise DataError(
                        f"data.filter: {self._name(node)} holds {array.type}, neither true nor "
                        "false; compare it with something"
                    )
                return array
            case ast.Compare():
                result = None
                for a, how, b in _pairs(node):
                    one = self._pair(a, how, b, column)
                    result = one if result is None else pc.and_kleene(result, one)
                return result
        raise AssertionError(node)

    def _pair(
        self, left: ast.expr, op: ast.cmpop, right: ast.expr, column: Callable[[str], Any]
    ) -> Any:
        import pyarrow.compute as pc

        if isinstance(op, ast.Is | ast.IsNot):
            assert isinstance(left, ast.Name)
            array = self._column(left, column)
            return pc.is_null(array) if isinstance(op, ast.Is) else pc.is_valid(array)
        if isinstance(op, ast.In | ast.NotIn):
            assert isinstance(right, ast.List | ast.Tuple)
            result = None
            for each in right.elts:
                one = self._compare(left, "equal", each, column)
                result = one if result is None else pc.or_kleene(result, one)
            return result if isinstance(op, ast.In) else pc.invert(result)
        return self._compare(left, _COMPARED[type(op)], right, column)

    def _compare(
        self, left: ast.expr, how: str, right: ast.expr, column: Callable[[str], Any]
    ) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        a, b = (
            self._column(each, column)
            if isinstance(each, ast.Name)
            else pa.scalar(ast.literal_eval(each))
            for each in (left, right)
        )
        for one in (a, b):
            if pa.types.is_null(one.type):
                return pa.nulls(len(one), pa.bool_())
        kinds = _kind(a.type), _kind(b.type)
        try:
            if kinds == ("time", "text") and isinstance(b, pa.Scalar):
                b = b.cast(a.type)
            elif kinds == ("text", "time") and isinstance(a, pa.Scalar):
                a = a.cast(b.type)
            elif set(kinds) == {"truth", "number"}:
                a, b = (
                    one.cast(pa.int8()) if _kind(one.type) == "truth" else one for one in (a, b)
                )
            elif kinds[0] != kinds[1] or kinds[0] == "other":
                raise pa.ArrowInvalid(f"{a.type} is compared with {b.type}")
            return getattr(pc, how)(a, b)
        except pa.ArrowException as error:
            raise DataError(
                f"data.filter: {self._source(left)} and {self._source(right)} cannot be compared "
                f"({one_line(error, 120)}); numbers go without quotation marks, texts within"
            ) from None

    def _column(self, node: ast.Name, column: Callable[[str], Any]) -> Any:
        """Its values as an Arrow array of a plain type, NaN as null."""
        import pyarrow as pa
        import pyarrow.compute as pc

        array = column(self._name(node))
        if not isinstance(array, pa.Array):
            raise DataError(f"data.filter: {self._name(node)} holds more than a value a row")
        if pa.types.is_decimal(array.type):
            array = array.cast(pa.float64())
        if pa.types.is_float16(array.type):
            array = array.cast(pa.float32())
        if pa.types.is_floating(array.type):
            array = pc.if_else(pc.is_nan(array), None, array)
        return array


def _pairs(node: ast.Compare) -> Iterator[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """What a chain of comparisons compares: 1 < a <= 3 is 1 < a, and a <= 3."""
    return zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True)


def _used(node: ast.AST) -> Iterator[ast.Name]:
    """The columns whose values count, and not only whether they are there."""
    if isinstance(node, ast.Name):
        yield node
    elif isinstance(node, ast.Compare):
        for a, how, b in _pairs(node):
            if not isinstance(how, ast.Is | ast.IsNot):
                yield from (each for each in (a, b) if isinstance(each, ast.Name))
    else:
        for each in ast.iter_child_nodes(node):
            yield from _used(each)


def _is_several(node: ast.expr) -> bool:
    return isinstance(node, ast.List | ast.Tuple)


def _kind(kind: Any) -> str:
    import pyarrow as pa

    types = pa.types
    if types.is_boolean(kind):
        return "truth"
    if types.is_integer(kind) or types.is_floating(kind):
        return "number"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    return "time" if types.is_temporal(kind) else "other"
