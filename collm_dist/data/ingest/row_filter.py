"""Row filters: a small, safe subset of Python expressions, translated to Arrow expressions."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.errors import ConfigError

MAX_SHOWN = 200

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def parse_row_filter(text: str) -> tuple[Any, tuple[str, ...]]:
    """Parse a filter such as ``event_type == 'click' and price > 0``.

    Supported are column names, numbers, strings, comparisons, ``in [..]``, ``is None``, ``and``, ``or``, ``not`` and
    parentheses. Nothing is evaluated as Python.

    Returns:
        The Arrow expression and the names of the columns that it reads.

    Raises:
        ConfigError: the filter contains anything else; the message names the position.
    """
    names: list[str] = []

    def refuse(node: ast.AST | None, reason: str) -> ConfigError:
        column = getattr(node, "col_offset", 0) + 1
        return ConfigError(
            f"dataset.row_filter: {reason} at character {column} of {text!r}. Allowed: column names, numbers, strings, "
            "== != < <= > >=, in [...], is None, and, or, not, parentheses"
        )

    def literal(node: ast.expr) -> Any:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = literal(node.operand)
            if isinstance(value, str):
                raise refuse(node, "expected a number")
            return -value
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | bool):
            return node.value
        raise refuse(node, "expected a number or a string")

    def operand(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            names.append(node.id)
            return pc.field(node.id)
        return pc.scalar(literal(node))

    def compare(node: ast.Compare) -> Any:
        parts, left = [], node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.List | ast.Tuple):
                is_in = operand(left).isin([literal(element) for element in right.elts])
                parts.append(~is_in if isinstance(op, ast.NotIn) else is_in)
            elif isinstance(op, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
                is_null = operand(left).is_null()
                parts.append(~is_null if isinstance(op, ast.IsNot) else is_null)
            elif type(op) in _COMPARE:
                parts.append(_COMPARE[type(op)](operand(left), operand(right)))
            else:
                raise refuse(right, "unsupported comparison")
            left = right
        return reduce(operator.and_, parts)

    def condition(node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return reduce(join, [condition(value) for value in node.values])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~condition(node.operand)
        if isinstance(node, ast.Compare):
            return compare(node)
        raise refuse(node, "expected a condition")

    try:
        expression = condition(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError, pa.ArrowException) as error:
        shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
        raise ConfigError(f"dataset.row_filter: {shown!r} does not parse: {error}") from None
    return expression, tuple(dict.fromkeys(names))


def infer_types(table: Any, columns: Sequence[str]) -> Any:
    """Convert the string columns that a filter reads to numbers if every value is a number."""
    for name in columns:
        index = table.column_names.index(name)
        try:
            table = table.set_column(index, name, table.column(name).cast("string").cast("float64"))
        except Exception:  # noqa: S112 - Arrow raises various errors; a column with other values stays as it is
            continue
    return table
