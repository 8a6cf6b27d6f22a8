"""Text tables (CSV, TSV and the like) as Arrow tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from collm_dist.data.ingest.file_format import LINE_COLUMN, MAX_COLUMNS, NULLS, BadRows, FileFormat, TextLayout
from collm_dist.data.ingest.text_blocks import Block
from collm_dist.data.ingest.text_rows import RowSplitter
from collm_dist.errors import DataError
from collm_dist.storage import split_query

_DELIMITERS = ",\t;|"
_MAX_SHOWN = 80


def find_delimiter(uri: str, file_format: FileFormat, header: str) -> str:
    """Return the delimiter of a text table: as set, else by the suffix, else the most frequent in the first line.

    Raises:
        DataError: the settings name a delimiter, and the header lacks it.
    """
    wanted = file_format.delimiter
    if wanted is not None and (wanted in header or file_format.names):
        return wanted
    if wanted is not None and file_format.delimiter_key is not None:
        seen = {delimiter: header.count(delimiter) for delimiter in _DELIMITERS if delimiter in header}
        found = ", ".join(f"{count} x {delimiter!r}" for delimiter, count in seen.items())
        shown = ascii(header if len(header) <= _MAX_SHOWN else f"{header[:_MAX_SHOWN]}...")
        raise DataError(
            f"{uri}: {file_format.delimiter_key} is {wanted!r}, and the first line lacks it: {shown} has "
            f"{found or 'none of the usual delimiters'}. Set {file_format.delimiter_key}, or leave it out: then the "
            "delimiter is found"
        )
    usual = "\t" if re.search(r"\.(tsv|inter|item)(\.|$)", split_query(uri)[0].lower()) else ","
    if usual in header:
        return usual
    return max(_DELIMITERS, key=lambda delimiter: (header.count(delimiter), delimiter == usual))


def find_layout(uri: str, block: bytes, file_format: FileFormat) -> tuple[TextLayout, int] | None:
    """Return the layout that a file's first block shows, and the bytes up to the first row; None for blank lines.

    Raises:
        DataError: the file has too many columns, or lacks the delimiter that the settings name.
    """
    num_blank = len(block) - len(block.lstrip(b"\n"))
    first = block[num_blank : block.find(b"\n", num_blank)]
    if not first.strip():
        return None
    header = first.decode("utf-8", "replace")
    delimiter = find_delimiter(uri, file_format, header)
    is_quoted = _has_quotes(file_format, delimiter, header)
    if file_format.names:
        return TextLayout(file_format.names, delimiter, is_quoted), 0
    names = _parse_header(uri, header, delimiter, is_quoted, file_format)
    return TextLayout(tuple(names), delimiter, is_quoted), num_blank + len(first) + 1


def read_text_tables(
    uri: str,
    blocks: Iterable[Block],
    file_format: FileFormat,
    bad_rows: BadRows,
    layout: TextLayout | None = None,
) -> Iterator[Any]:
    """Stream a text table with every column as bytes, so that a value that does not parse costs only its row.

    Args:
        uri: name for messages.
        blocks: its lines.
        file_format: its format.
        bad_rows: counts rows that cannot be used.
        layout: of a part behind the header; None = the first block shows it.

    Raises:
        DataError: the file is empty, has too many columns, or lacks the delimiter that the settings name.
    """
    splitter = None
    for first_line, block, _ in blocks:
        if layout is None:
            if (found := find_layout(uri, block, file_format)) is None:
                continue
            layout, skipped = found
            first_line, block = first_line + block.count(b"\n", 0, skipped), block[skipped:]
        if splitter is None:
            splitter = RowSplitter(uri, layout, bad_rows)
        if len(layout.delimiter) == 2:
            block = block.replace(b"\t", b" ").replace(layout.delimiter.encode(), b"\t")
        rows, lines = splitter.split(first_line, block)
        if len(lines):
            table = _parse(rows, layout, splitter.has_line_ends)
            if table.num_rows != len(lines):
                raise DataError(f"{uri}:{lines[0]}: cannot be read as text: rows and lines do not match from here on; "
                                "check quotes and delimiters")  # fmt: skip
            metadata = {"delimiter": layout.delimiter}
            yield table.append_column(LINE_COLUMN, pa.array(lines)).replace_schema_metadata(metadata)
    if layout is None:
        raise DataError(f"{uri}: cannot be read as text: Empty file; remove it, or write the header")
    if splitter is not None:
        splitter.finish()


def _has_quotes(file_format: FileFormat, delimiter: str, header: str) -> bool:
    """Return whether cells may be quoted: never between tabs, unless all of the header's cells are."""
    if delimiter == "\t" and not file_format.typed_header:
        return all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in header.split("\t"))
    return not (file_format.typed_header or len(delimiter) == 2)


def _parse_header(uri: str, header: str, delimiter: str, is_quoted: bool, file_format: FileFormat) -> list[str]:
    if header.count(delimiter) > MAX_COLUMNS:  # the parser needs minutes and gigabytes for a million columns
        raise DataError(f"{uri}: the file has more than {MAX_COLUMNS:,} columns; check the delimiter")
    if is_quoted:
        csv.field_size_limit(1 << 30)
        names = next(csv.reader([header], delimiter=delimiter))
    else:
        names = header.split(delimiter)
    return [name.partition(":")[0] for name in names] if file_format.typed_header else names


def _parse(rows: bytes, layout: TextLayout, has_line_ends: bool) -> Any:
    """Parse rows that all have the right number of cells.

    The parser gets the bytes at once. If it read a Python stream, its threads could still read from it while the
    interpreter exits, and the process would abort.
    """
    return pa_csv.read_csv(
        pa.BufferReader(rows),
        pa_csv.ReadOptions(use_threads=False, block_size=len(rows) + 1, column_names=layout.names),
        pa_csv.ParseOptions(
            delimiter=layout.inner_delimiter,
            quote_char='"' if layout.is_quoted else False,
            newlines_in_values=has_line_ends,
        ),
        pa_csv.ConvertOptions(default_column_type=pa.binary(), null_values=NULLS, strings_can_be_null=True,
                              check_utf8=False),
    )  # fmt: skip
