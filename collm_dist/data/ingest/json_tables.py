"""JSON lines as Arrow tables; a line that is not an object costs only its row.

Some published files, for example of Amazon 2014 and Steam, have Python dictionaries in their lines. They are read too.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from collm_dist.data.ingest.file_format import LINE_COLUMN, BadRows, FileFormat
from collm_dist.data.ingest.text_blocks import Block

NOT_AN_OBJECT = "line is not a JSON object"
MAX_SHOWN = 60
_PYTHON = re.compile(rb"\s*\{u?'")
# Arrow's parser crashes (segmentation fault) on a block that starts with null.
_NO_OBJECT = re.compile(rb"^[ \t]*[^{ \t\n]", re.MULTILINE)


def read_json_tables(uri: str, blocks: Iterable[Block], file_format: FileFormat, bad_rows: BadRows) -> Iterator[Any]:
    """Stream a file of JSON lines; lines that do not parse are counted.

    Columns of ``file_format.schema`` and ``expected`` are always there. Types are those of the block.
    """
    for first_line, block, _ in blocks:
        table, lines = _parse_fast(first_line, block, file_format)
        if table is None:
            table, lines = _parse_lines(uri, first_line, block, bad_rows, file_format.expected)
        for name in (*dict(file_format.schema), *file_format.expected):
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows))
        if len(lines):
            yield table.append_column(LINE_COLUMN, pa.array(lines))


def _parse_fast(first_line: int, block: bytes, file_format: FileFormat) -> tuple[Any, Any]:
    """Parse a block with Arrow. Returns None if a line is not an object, or if a column has values of several types."""
    if _NO_OBJECT.search(block):
        return None, None
    lines = [number for number, line in enumerate(block.split(b"\n")[:-1], first_line) if line.strip()]
    schema = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in file_format.schema]) or None
    for explicit in (schema, None) if schema is not None else (None,):
        behaviour = "ignore" if explicit is not None and not file_format.has_more_columns else "infer"
        parse = pa_json.ParseOptions(explicit_schema=explicit, unexpected_field_behavior=behaviour)
        options = pa_json.ReadOptions(use_threads=False, block_size=len(block) + 1)
        try:
            table = pa_json.read_json(pa.BufferReader(block), options, parse)
        except pa.ArrowException:
            continue
        if table.num_rows == len(lines):
            return table, np.array(lines, np.int64)
    return None, None


def _parse_lines(
    uri: str, first_line: int, block: bytes, bad_rows: BadRows, expected: tuple[str, ...]
) -> tuple[Any, Any]:
    """Parse a block line by line. A column with values of several types becomes text."""
    rows, lines = [], []
    for number, line in enumerate(block.split(b"\n")[:-1], first_line):
        if not line.strip():
            continue
        row = _parse_line(line)
        if isinstance(row, dict):
            rows.append(row)
            lines.append(number)
        else:
            shown = ascii(line[:MAX_SHOWN].decode("utf-8", "replace"))
            bad_rows.add(NOT_AN_OBJECT, 1, f"{uri}:{number}", f"expected {{...}}, found {shown}")
    names = dict.fromkeys(name for row in rows for name in row if not expected or name in expected)
    columns = {name: _build_column([row.get(name) for row in rows]) for name in names}
    return (pa.table(columns) if columns else pa.table({"": pa.nulls(len(rows))})), np.array(lines, np.int64)


def _parse_line(line: bytes) -> Any:
    """Return the value of a line, or None if it does not parse."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        if not _PYTHON.match(line):
            return None
    try:
        return json.loads(json.dumps(ast.literal_eval(line.decode("utf-8", "replace").strip())))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _build_column(values: list[Any]) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        texts = [value if isinstance(value, str) or value is None else _to_text(value) for value in values]
        return pa.array([None if text is None else text.encode("utf-8", "replace") for text in texts], pa.binary())


def _to_text(value: Any) -> str:
    """Return a value that is not a string as text: a number without a fraction of zero, as in a column of numbers."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2.0**53
    return json.dumps(int(value) if is_whole else value)
