"""Readers of input files as streams of tables: text, Parquet, JSON lines, hive partitions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from collm_dist.data.ingest.file_format import (
    BLOCK_BYTES,
    NULLS,
    WHOLE_FILE,
    BadRows,
    FileFormat,
    FilePart,
    find_named_kind,
)
from collm_dist.data.ingest.json_tables import read_json_tables
from collm_dist.data.ingest.lake_tables import LakeFile
from collm_dist.data.ingest.parquet_tables import read_parquet
from collm_dist.data.ingest.text_blocks import read_blocks
from collm_dist.data.ingest.text_tables import read_text_tables
from collm_dist.errors import DataError
from collm_dist.storage import explain_store_errors, open_filesystem, split_query

__all__ = ["BLOCK_BYTES", "NULLS", "BadRows", "FileFormat", "find_kind", "read_tables"]


def find_kind(uri: str, file_format: FileFormat) -> str:
    """Return the file type: text, parquet or json, or the kind of lakehouse table that the file belongs to."""
    if file_format.table is not None:
        return file_format.table.kind
    if file_format.kind != "auto":
        return file_format.kind
    return find_named_kind(split_query(uri)[0])


def read_tables(
    uri: str,
    file_format: FileFormat,
    bad_rows: BadRows,
    row_groups: tuple[int, int] | None = None,
    part: FilePart = WHOLE_FILE,
    lake_file: LakeFile | None = None,
) -> Iterator[Any]:
    """Stream a file as tables, in order, with the values of hive partitions (``key=value`` folders) as columns.

    The column ``LINE_COLUMN`` has the line of each row in its file (Parquet: its number), from 1.

    Args:
        uri: one file.
        file_format: its format.
        bad_rows: counts lines that do not parse.
        row_groups: of a Parquet file, the first and one past the last to read.
        part: of a text file, the rows to read.
        lake_file: of a lakehouse table, the file, if the format does not list it.

    Raises:
        DataError: the file as a whole cannot be read.
        LaunchError: the object store is unreachable or denies access.
    """
    if (lake := file_format.table) is not None:
        yield from lake.read(lake_file or lake.files[uri], row_groups, file_format.expected)
        return
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
    yield from read_parquet(filesystem, path, row_groups)
