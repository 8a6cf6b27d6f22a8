"""Row filters: a small, safe subset of Python expressions, translated to Arrow expressions.

How a column is compared depends on what it is compared with, never on the values of a block or file: with a string as
text, with a number as a number, with true or false as a boolean.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.data.ingest.file_format import LINE_COLUMN, BadRows
from collm_dist.data.ingest.normalize import to_numbers, to_text
from collm_dist.errors import ConfigError

MAX_SHOWN, MAX_SHOWN_VALUE = 200, 50
_PLACE = "__place"

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_BOOLEANS = {"true": True, "false": False}
_TRUE, _FALSE = pa.array(["true", "t", "yes", "1"]), pa.array(["false", "f", "no", "0"])
# Errors of spelling: what does not parse, and what is meant.
_HINTS = (
    (r"(?<![=!<>])=(?!=)", "write == for 'is equal to'"),
    (r"<>", "write != for 'is not equal to'"),
    (r"&", "write 'and' for &"),
    (r"\|", "write 'or' for |"),
    (r"!(?!=)", "write 'not' for !"),
    (r"\b(AND|OR|NOT|IN|IS)\b", "write and, or, not, in, is in lower case"),
    (r"(?i)\bnull\b", "write 'is None' for missing values"),
)


@dataclass(frozen=True)
class RowFilter:
    """A parsed filter.

    Attributes:
        expression: over virtual columns, see ``apply``.
        names: the columns that it reads.
        reads: virtual columns as (name, kind); kinds are raw, text, number, integer (numbers, exact in columns of
            integers) and bool.
        asked: columns whose kind the filter itself sets, by ``text(...)`` or ``number(...)``.
        strict: the expression with ``in`` null, not false, for missing values.
    """

    expression: Any
    names: tuple[str, ...]
    reads: tuple[tuple[str, str], ...]
    asked: frozenset[str] = frozenset()
    strict: Any = None

    def apply(self, table: Any) -> Any:
        """Return the rows for which the filter holds; values of another kind count as missing."""
        filtered = self._add_virtual(table).filter(self.expression)
        return filtered.drop_columns([_virtual(name, kind) for name, kind in self.reads])

    def _add_virtual(self, table: Any) -> Any:
        for name, kind in self.reads:
            table = table.append_column(_virtual(name, kind), convert(table.column(name), kind))
        return table

    def find_undecided(self, table: Any, misfits: Any) -> Any:
        """Return the (N,) mask of those misfits for whose rows the filter is neither true nor false.

        Args:
            table: raw rows.
            misfits: (N,) mask of rows with a misfit.
        """
        rows = np.flatnonzero(misfits.to_numpy(zero_copy_only=False))
        table = self._add_virtual(table.take(pa.array(rows))).append_column(_PLACE, pa.array(rows))
        undecided = np.zeros(len(misfits), bool)
        undecided[rows] = True
        for condition in (self.strict, ~self.strict):
            undecided[table.filter(condition).column(_PLACE).to_numpy()] = False
        return pa.array(undecided)

    def find_misfits(self, table: Any) -> dict[str, Any]:
        """Return (N,) masks of the values that a filter compares with numbers, and that are not numbers."""
        misfits = {}
        for name, kind in self.reads:
            column = table.column(name)
            if kind in ("number", "integer") and not _is_number(column.type):
                converted = convert(column, kind)
                misfits[name] = pc.and_(column.is_valid(), converted.is_null())
        return misfits


def _virtual(name: str, kind: str) -> str:
    return f"__{kind}:{name}"


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def convert(column: Any, kind: str) -> Any:
    """Return a column as text, numbers or booleans, with null for values that are none."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    own = column.type
    if kind == "raw" or (kind == "integer" and pa.types.is_integer(own)):
        return column
    if kind == "text":
        return column if pa.types.is_temporal(own) else to_text(column)
    if kind == "bool":
        if pa.types.is_boolean(own):
            return column
        texts = pc.utf8_lower(pc.utf8_trim_whitespace(to_text(column)))
        return pc.if_else(pc.is_in(texts, _TRUE), True, pc.if_else(pc.is_in(texts, _FALSE), False, None))
    numbers = to_numbers(column)
    return pa.array(numbers, pa.float64(), from_pandas=True)


class _Parser:
    """Translates nodes of a parsed expression; collects the columns that it reads."""

    def __init__(
        self, text: str, numeric_columns: frozenset[str], quoted: dict[str, str], *, is_strict: bool = False
    ) -> None:
        self.text, self.numeric_columns, self.quoted, self.is_strict = text, numeric_columns, quoted, is_strict
        self.reads: dict[tuple[str, str], None] = {}
        self.asked: set[str] = set()

    def refuse(self, node: ast.AST | None, reason: str) -> ConfigError:
        column = getattr(node, "col_offset", 0) + 1
        return ConfigError(
            f"dataset.row_filter: {reason} at character {column} of {self.text!r}. Allowed: columns, numbers, strings, "
            "true, false, == != < <= > >=, in [...], is None, and, or, not, text(column), number(column), parentheses"
        )

    def literal(self, node: ast.expr) -> Any:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.literal(node.operand)
            if isinstance(value, str):
                raise self.refuse(node, "expected a number")
            return -value
        if isinstance(node, ast.Name) and node.id in _BOOLEANS:
            return _BOOLEANS[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | bool):
            return node.value
        raise self.refuse(node, "expected a number or a string")

    def column(self, node: ast.expr) -> tuple[str, str | None] | None:
        """Return the column's name and the kind that the filter asks for, or None if the node is not a column."""
        if isinstance(node, ast.Name) and node.id not in _BOOLEANS:
            return self.quoted.get(node.id, node.id), None
        match node:
            case ast.Call(func=ast.Name(id="text" | "number" as kind), args=[ast.Name(id=name)], keywords=[]):
                name = self.quoted.get(name, name)
                self.asked.add(name)
                return name, kind
        return None

    def operand(self, node: ast.expr, kind: str) -> Any:
        if (found := self.column(node)) is None:
            return pc.scalar(self.literal(node))
        key = found[0], found[1] or kind
        self.reads[key] = None
        return pc.field(_virtual(*key))

    def find_kind(self, *nodes: ast.expr) -> str:
        """Return how values are compared: as the literal among them says, or the column whose kind is asked for."""
        columns = [self.column(node) for node in nodes]
        literals = [self.literal(node) for node, found in zip(nodes, columns, strict=True) if found is None]
        if not literals:
            wanted = [found[1] for found in columns if found is not None and found[1] is not None]
            is_numeric = all(found[0] in self.numeric_columns for found in columns if found is not None)
            return wanted[0] if wanted else "number" if is_numeric else "raw"
        kinds = {_kind_of(value) for value in literals}
        if kinds == {"integer", "number"}:
            return "number"
        if len(kinds) > 1:
            raise self.refuse(nodes[-1], "a list with values of several types does not parse")
        return next(iter(kinds))

    def compare(self, node: ast.Compare) -> Any:
        parts, left = [], node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.List | ast.Tuple):
                kind = self.find_kind(left, *right.elts) if right.elts else "raw"
                value = self.operand(left, kind)
                is_in = value.isin([self.literal(element) for element in right.elts])
                is_in = ~is_in if isinstance(op, ast.NotIn) else is_in
                parts.append(pc.if_else(value.is_valid(), is_in, pa.scalar(None)) if self.is_strict else is_in)
            elif isinstance(op, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
                is_null = self.operand(left, "raw").is_null()
                parts.append(~is_null if isinstance(op, ast.IsNot) else is_null)
            elif type(op) in _COMPARE:
                kind = self.find_kind(left, right)
                parts.append(_COMPARE[type(op)](self.operand(left, kind), self.operand(right, kind)))
            else:
                raise self.refuse(right, "unsupported comparison")
            left = right
        return reduce(operator.and_, parts)

    def condition(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return reduce(join, [self.condition(value) for value in node.values])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            return self.compare(node)
        raise self.refuse(node, "expected a condition")


def parse_row_filter(text: str, numeric_columns: frozenset[str] = frozenset()) -> RowFilter:
    """Parse a filter such as ``event_type == 'click' and price > 0``.

    Supported are column names, numbers, strings, comparisons, ``in [..]``, ``is None``, ``and``, ``or``, ``not`` and
    parentheses, ``true`` and ``false``, and ``text(column)`` and ``number(column)`` to choose how a column is compared.
    The name of a column that is not a word stands in backquotes.
    Nothing is evaluated as Python.

    Args:
        text: the filter.
        numeric_columns: columns that are compared with each other as numbers.

    Raises:
        ConfigError: the filter contains anything else; the message names the position.
    """
    bare, quoted = _replace_quoted(text.strip())
    parser = _Parser(text, numeric_columns, quoted)
    strict = _Parser(text, numeric_columns, quoted, is_strict=True)
    try:
        body = ast.parse(bare, mode="eval").body
        expression, strict_expression = parser.condition(body), strict.condition(body)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError, pa.ArrowException) as error:
        shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
        raise ConfigError(f"dataset.row_filter: {shown!r} does not parse: {error}{_find_hint(text)}") from None
    names = tuple(dict.fromkeys(name for name, _ in parser.reads))
    return RowFilter(expression, names, tuple(parser.reads), frozenset(parser.asked), strict_expression)


def drop_misfits(table: Any, row_filter: RowFilter, place: str, notes: Counter[str], bad_rows: BadRows) -> Any:
    """Count values that the filter compares with numbers and that are not numbers; return the rows that it decides.

    A row is bad if the filter depends on such a value. With ``number(column)`` these values count as missing.
    """
    usable = np.ones(table.num_rows, bool)
    for name, misfits in row_filter.find_misfits(table).items():
        count, cause = pc.sum(misfits).as_py() or 0, f"{name} is not a number (dataset.row_filter)"
        if name in row_filter.asked:
            notes[cause] = count
        elif count:
            bad = row_filter.find_undecided(table, misfits).to_numpy(zero_copy_only=False) & usable
            if bad.any():
                first = int(bad.argmax())
                value = to_text(table.column(name).slice(first, 1))[0].as_py()
                line = table.column(LINE_COLUMN)[first]
                bad_rows.add(cause, int(bad.sum()), f"{place}:{line}", ascii(value[:MAX_SHOWN_VALUE]))
                usable &= ~bad
    return table if usable.all() else table.filter(pa.array(usable))


def _replace_quoted(text: str) -> tuple[str, dict[str, str]]:
    """Return the text with a word of the same length for each name in backquotes, and the names by these words."""
    names: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        if match["name"] is None:  # a string
            return match[0]
        word = f"_{len(names)}".ljust(len(match[0]), "_")
        names[word] = match["name"]
        return word

    return re.sub(r"'[^']*'|\"[^\"]*\"|`(?P<name>[^`]+)`", replace, text), names


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "text" if isinstance(value, str) else "integer" if isinstance(value, int) else "number"


def _find_hint(text: str) -> str:
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "''", text)
    return next((f"; {hint}" for pattern, hint in _HINTS if re.search(pattern, bare)), "")
