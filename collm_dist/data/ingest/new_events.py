"""Parts of new events beside the log (``dataset.new_events``), of which there are more every hour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collm_dist.config import ColumnsConfig, DatasetConfig
from collm_dist.data.ingest.file_format import BadRows
from collm_dist.data.ingest.file_readers import FileFormat, read_tables
from collm_dist.data.ingest.row_filter import RowFilter
from collm_dist.errors import DataError
from collm_dist.storage import list_files


def list_new_events(dataset: DatasetConfig) -> list[str]:
    """Return the parts in sorted order, none without the setting.

    Raises:
        DataError: the folder does not exist.
    """
    uri = dataset.new_events
    return [] if uri is None else list_files(uri, "dataset.new_events", may_be_empty=True)


def check_parts(
    parts: Sequence[str], file_format: FileFormat, columns: ColumnsConfig, row_filter: RowFilter | None
) -> tuple[str, ...]:
    """Return the columns of the row filter that the first part with rows lacks.

    Of such parts the filter keeps all rows: the ranking service writes the columns that an event has, and no others.

    Raises:
        DataError: the part has no split, although the log's splits are in a column.
    """
    first = next(((uri, table) for uri in parts for table in read_tables(uri, file_format, BadRows())), None)
    if first is None:
        return ()
    uri, table = first
    if columns.split is not None and columns.split not in table.column_names:
        raise DataError(
            f"{uri}: events have no column '{columns.split}' that says whether they are for training or for the test "
            "(dataset.split.method: column). Set dataset.split.method to ratio or calendar, or unset "
            "dataset.new_events and append the parts to the log, with splits of your own"
        )
    return find_missing(table, row_filter)


def find_missing(table: Any, row_filter: RowFilter | None) -> tuple[str, ...]:
    """Return the columns of a filter that a table lacks."""
    return tuple(name for name in row_filter.names if name not in table.column_names) if row_filter else ()


def leave_out_later_parts(
    dataset: DatasetConfig, inputs: Mapping[str, Any], recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the inputs of a data step without the parts that arrived after it was done; all of them before that.

    Args:
        dataset: the settings.
        inputs: entry of each input file by URI.
        recorded: fingerprint of the finished step, empty before that, in which names begin with ``input.``.
    """
    if not recorded:
        return dict(inputs)
    later = {uri for uri in list_new_events(dataset) if f"input.{uri}" not in recorded}
    return {uri: entry for uri, entry in inputs.items() if uri not in later}
