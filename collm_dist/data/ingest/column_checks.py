"""Checks that input files have the columns that the settings name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from collm_dist.config import ColumnsConfig, DatasetConfig
from collm_dist.data.ingest.file_format import LINE_COLUMN, find_named_kind
from collm_dist.data.ingest.item_texts import list_template_columns
from collm_dist.data.ingest.row_filter import parse_row_filter
from collm_dist.errors import DataError

_MAX_SHOWN = 50


def check_columns(
    table: Any,
    uri: str,
    columns: ColumnsConfig,
    filtered: Sequence[str] = (),
    found_by: tuple[str, str | None] = ("dataset.path", None),
) -> None:
    """Check that a table of interactions has the columns that are read, with one value per row.

    Args:
        table: rows of a file.
        uri: the file, for messages.
        columns: names of the columns.
        filtered: columns of the row filter.
        found_by: name and value of the setting by which the file was found; value None = it is the only file.

    Raises:
        DataError: the message names the file, the column and the setting.
    """
    setting, value = found_by
    or_other = "" if value in (None, uri) else f", or leave this file out ({setting} may be a glob)"
    for key, name in columns.model_dump().items():
        if name is not None:
            require_column(name, table, uri, f"dataset.columns.{key}{or_other}")
    for name in filtered:
        require_column(name, table, uri, "dataset.row_filter")


def check_item_columns(table: Any, uri: str, item_id: str, title: str, dataset: DatasetConfig) -> None:
    """Check a table of items in the same way.

    Raises:
        DataError: the message names the file, the column and the settings.
    """
    for name in list_item_columns(item_id, title, dataset):
        require_column(name, table, uri, "dataset.item_columns or dataset.item_text")


def list_columns(columns: ColumnsConfig, dataset: DatasetConfig) -> tuple[str, ...]:
    """Return the columns of interactions that are read."""
    names = [name for name in columns.model_dump().values() if name is not None]
    return (*names, *(parse_row_filter(dataset.row_filter).names if dataset.row_filter else ()))


def list_item_columns(item_id: str, title: str, dataset: DatasetConfig) -> tuple[str, ...]:
    """Return the columns of items that are read."""
    in_text = (name for name in list_template_columns(dataset.item_text) if name != "title")
    return (item_id, title, *in_text, *dataset.item_columns.list_windows().values())


def require_column(name: str, table: Any, uri: str, key: str) -> None:
    """Check that a table has a column with one value per row.

    Args:
        name: the column.
        table: rows of a file.
        uri: the file, for messages.
        key: the setting that names the column, for messages.

    Raises:
        DataError: the column is missing or ambiguous.
    """
    available = [column for column in table.column_names if column != LINE_COLUMN]
    if available.count(name) > 1:
        raise DataError(f"{uri}: several columns are named '{name}'; rename all but one")
    if name not in available:
        raise explain_missing_column(uri, name, available, key)
    kind = table.schema.field(name).type
    if pa.types.is_nested(kind):
        raise DataError(f"{uri}: column '{name}' holds {kind}, expected one value per row; flatten it, or set {key}")


def explain_missing_column(uri: str, name: str, available: Sequence[str], key: str) -> DataError:
    """Return the error for a column that a file lacks, with the columns that it has and the nearest name.

    Args:
        uri: the file.
        name: the missing column.
        available: names of its columns.
        key: the setting that names the column.
    """
    # In a file that is not a table, names may consist of any bytes.
    cut = [column[:_MAX_SHOWN] for column in available[:_MAX_SHOWN]]
    shown = [column if column.isprintable() else ascii(column) for column in cut]
    lower = {column.lower(): column for column in available}
    if matches := difflib.get_close_matches(name.lower(), lower, n=1):
        nearest = lower[matches[0]]
        match = f"'{nearest}'" if nearest.isprintable() else ascii(nearest)
        hint = f"; did you mean {match}?"
    elif len(available) == 1 and find_named_kind(uri) == "text":
        hint = "; if its cells are separated otherwise, set the delimiter (dataset.delimiter)."
    else:
        hint = "."
    return DataError(f"{uri}: there is no column '{name}' (has {', '.join(shown)}){hint} Set {key}.")
