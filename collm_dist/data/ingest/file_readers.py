"""Readers of input files as streams of tables: text, Parquet, JSON lines, hive partitions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.data.ingest.file_format import (
    BLOCK_BYTES,
    LINE_COLUMN,
    NULLS,
    WHOLE_FILE,
    BadRows,
    FileFormat,
    FilePart,
)
from collm_dist.data.ingest.json_tables import read_json_tables
from collm_dist.data.ingest.text_blocks import read_blocks
from collm_dist.data.ingest.text_tables import read_text_tables
from collm_dist.errors import DataError
from collm_dist.storage import explain_store_errors, open_filesystem, split_query

__all__ = ["BLOCK_BYTES", "NULLS", "BadRows", "FileFormat", "count_row_groups", "find_kind", "read_tables"]


def find_kind(uri: str, file_format: FileFormat) -> str:
    """Return the file type: text, parquet or json."""
    if file_format.kind != "auto":
        return file_format.kind
    name = split_query(uri)[0].lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2")
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    return "json" if name.endswith((".json", ".jsonl", ".ndjson")) else "text"


def count_row_groups(uri: str) -> int:
    """Return the number of row groups of a Parquet file.

    Raises:
        DataError: it is not a Parquet file, or a damaged one.
    """
    filesystem, path = open_filesystem(uri)
    try:
        with explain_store_errors(filesystem, f"{uri}: cannot be read"):
            return int(pq.read_metadata(path, filesystem=filesystem).num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: not a Parquet file, or a damaged one ({error})") from error


def read_tables(
    uri: str,
    file_format: FileFormat,
    bad_rows: BadRows,
    row_groups: tuple[int, int] | None = None,
    part: FilePart = WHOLE_FILE,
) -> Iterator[Any]:
    """Stream a file as tables, in order, with the values of hive partitions (``key=value`` folders) as columns.

    The column ``LINE_COLUMN`` has the line of each row in its file (Parquet: its number), from 1.

    Args:
        uri: one file.
        file_format: its format.
        bad_rows: counts lines that do not parse.
        row_groups: of a Parquet file, the first and one past the last to read.
        part: of a text file, the rows to read.

    Raises:
        DataError: the file as a whole cannot be read.
        LaunchError: the object store is unreachable or denies access.
    """
    filesystem, path = open_filesystem(uri)
    partition = dict(part.split("=", 1) for part in PurePosixPath(path).parts[:-1] if part.count("=") == 1)
    try:
        with explain_store_errors(filesystem, f"{uri}: cannot be read"):
            for table in _stream(uri, filesystem, path, file_format, bad_rows, row_groups, part):
                for name, value in partition.items():
                    if name not in table.column_names:
                        table = table.append_column(name, pa.repeat(pa.scalar(value), table.num_rows))
                yield table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: cannot be read as {find_kind(uri, file_format)}: {error}") from error


def _stream(
    uri: str,
    filesystem: Any,
    path: str,
    file_format: FileFormat,
    bad_rows: BadRows,
    row_groups: tuple[int, int] | None,
    part: FilePart,
) -> Iterator[Any]:
    kind = find_kind(uri, file_format)
    if kind != "parquet":
        blocks = read_blocks(uri, filesystem, path, kind, file_format.encoding, part)
        if kind == "json":
            yield from read_json_tables(uri, blocks, file_format, bad_rows)
        else:
            yield from read_text_tables(uri, blocks, file_format, bad_rows, part.layout)
        return
    with pq.ParquetFile(path, filesystem=filesystem, page_checksum_verification=True) as file:
        first, last = row_groups or (0, file.num_row_groups)
        row = 1 + sum(file.metadata.row_group(group).num_rows for group in range(first))
        for batch in file.iter_batches(batch_size=1 << 17, row_groups=list(range(first, last))):
            table = pa.Table.from_batches([batch])
            yield table.append_column(LINE_COLUMN, pa.array(np.arange(row, row + table.num_rows)))
            row += table.num_rows
