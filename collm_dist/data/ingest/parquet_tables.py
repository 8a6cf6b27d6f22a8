"""Parquet files as streams of tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.data.ingest.file_format import LINE_COLUMN
from collm_dist.errors import DataError
from collm_dist.storage import explain_store_errors, open_filesystem

_BATCH_ROWS = 1 << 17


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


def read_parquet(
    filesystem: Any, path: str, row_groups: tuple[int, int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[Any]:
    """Stream a file's rows with their numbers, from 1, as ``LINE_COLUMN``.

    Args:
        filesystem, path: the file.
        row_groups: first and one past the last to read; None = all.
        columns: names of the columns to read, if the file has them; None = all.
    """
    with pq.ParquetFile(path, filesystem=filesystem, page_checksum_verification=True) as file:
        first, last = row_groups or (0, file.num_row_groups)
        row = 1 + sum(file.metadata.row_group(group).num_rows for group in range(first))
        wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(range(first, last)), columns=wanted):
            table = pa.Table.from_batches([batch])
            yield table.append_column(LINE_COLUMN, pa.array(np.arange(row, row + table.num_rows)))
            row += table.num_rows
