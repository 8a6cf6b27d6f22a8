"""A source: the chunks of a raw log, in file order, and its items, whatever the layout."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from collm_dist.config import ColumnsConfig, DatasetConfig
from collm_dist.data.ingest.dataset_formats import DatasetLayout, find_dataset_layout
from collm_dist.data.ingest.file_readers import (
    BadRows,
    FileFormat,
    count_row_groups,
    find_kind,
    read_tables,
)
from collm_dist.data.ingest.item_texts import build_item_table, list_template_columns
from collm_dist.data.ingest.normalize import ROW_COLUMN, guess_unit, has_dates, normalize_batch, to_numbers
from collm_dist.data.ingest.row_filter import infer_types, parse_row_filter
from collm_dist.errors import DataError
from collm_dist.storage import describe_files, list_files

ROW_GROUPS_PER_CHUNK = 16
MAX_SHOWN = 50


@dataclass(frozen=True)
class FileChunk:
    """A piece of the log that one task reads: a file, or a range of a Parquet file's row groups."""

    uri: str
    row_groups: tuple[int, int] | None = None


@dataclass(frozen=True)
class ReadBatch:
    """Some rows of a chunk.

    Attributes:
        table: usable rows in ``normalize.SCHEMA``; ``row`` counts all raw rows of the chunk.
        bad: rows that cannot be used, by cause.
        bad_examples: ``file:line: cause`` of the first ones.
        rows_read: raw rows that this batch came from, before the row filter.
    """

    table: Any
    bad: Counter[str]
    bad_examples: list[str]
    rows_read: int


@dataclass(frozen=True)
class Source:
    """A raw log, opened and checked. It is small and can be sent to workers.

    Attributes:
        chunks: in file order.
        columns: which column is what.
        layout, items_layout: how the files are read.
        items_uris: item files, if any.
        timestamp_unit: decided once for the whole source.
        dataset: the settings.
        column_types: of the first file, for the preview.
    """

    chunks: tuple[FileChunk, ...]
    columns: ColumnsConfig
    layout: FileFormat
    items_layout: FileFormat
    items_uris: tuple[str, ...]
    item_id_column: str
    title_column: str
    timestamp_unit: str
    dataset: DatasetConfig
    column_types: dict[str, str] = field(default_factory=dict)

    def read_chunk(self, chunk: FileChunk) -> Iterator[ReadBatch]:
        """Stream a chunk's rows in file order.

        Raises:
            DataError: the file cannot be read, or lacks a column.
        """
        condition, names = parse_row_filter(self.dataset.row_filter) if self.dataset.row_filter else (None, ())
        first_row, losses = 0, BadRows()
        for table in read_tables(chunk.uri, self.layout, losses, chunk.row_groups):
            rows = table.num_rows
            _check_columns(table, chunk.uri, self.columns, self.dataset)
            try:
                if condition is not None:
                    table = table.append_column(ROW_COLUMN, pa.array(range(first_row, first_row + rows), pa.int64()))
                    table = infer_types(table, names).filter(condition)
                uniform = normalize_batch(
                    table,
                    self.columns,
                    like_threshold=self.dataset.like_threshold,
                    unit=self.timestamp_unit,
                    unit_is_guessed=self.dataset.timestamp_unit == "auto",
                    place=chunk.uri,
                    first_row=first_row,
                    losses=losses,
                )
            except pa.ArrowException as error:
                raise DataError(
                    f"{chunk.uri}: rows from {first_row + 1} on: a value or a column's type does not fit what "
                    f"dataset.columns or dataset.row_filter make of it: {error}"
                ) from error
            yield ReadBatch(uniform, losses.counts, losses.examples, rows)
            first_row, losses = first_row + rows, BadRows()

    def read_items(self) -> tuple[Any, Counter[str]]:
        """Return ``item_id, title, text`` of every item in the item files, and what was mended, by cause.

        Raises:
            DataError: a file cannot be read, or lacks a column.
        """
        losses = BadRows()
        tables = (table for uri in self.items_uris for table in self._read_item_file(uri, losses))
        items, mended = build_item_table(tables, self.item_id_column, self.title_column, self.dataset.item_text)
        return items, mended + Counter({f"item rows: {cause}": count for cause, count in losses.counts.items()})

    def _read_item_file(self, uri: str, losses: BadRows) -> Iterator[Any]:
        for table in read_tables(uri, self.items_layout, losses):
            _check_item_columns(table, uri, self.item_id_column, self.title_column, self.dataset)
            yield table

    def inputs(self) -> dict[str, Any]:
        """Return size and modification time of every input file."""
        return describe_files(sorted({chunk.uri for chunk in self.chunks} | set(self.items_uris)))

    def describe(self) -> dict[str, Any]:
        """Return what was found and how it is understood, for the preview."""
        return {
            "files": sorted({chunk.uri for chunk in self.chunks}),
            "columns": {key: value for key, value in self.columns.model_dump().items() if value is not None},
            # CSV is read as bytes, so that text that is no UTF-8 can be counted.
            "types": {name: "text" if kind == "binary" else kind for name, kind in self.column_types.items()},
            "timestamp_unit": self.timestamp_unit,
            "items": list(self.items_uris) or "none: the item id stands for its text",
        }


def open_source(dataset: DatasetConfig) -> Source:
    """Find the files, check their columns and decide what the whole source shares.

    Raises:
        DataError: a file is missing or lacks a column; the message names the file, the column and the config key.
        ConfigError: the row filter or the item text does not parse.
    """
    path, format_name = dataset.path or "", dataset.format
    if dataset.asset is not None:
        from collm_dist.assets import resolve_dataset

        folder, found = resolve_dataset(dataset.asset)
        path, format_name = str(folder), found  # type: ignore[assignment]
    if format_name == "table":
        fixed = DatasetLayout(
            interactions=tuple(list_files(path, "dataset.path")),
            items=tuple(list_files(dataset.items_path, "dataset.items_path")) if dataset.items_path else (),
            columns=_columns_of_feedback(dataset),
            item_id=dataset.item_columns.item_id,
            title=dataset.item_columns.title,
        )
    else:
        fixed = find_dataset_layout(format_name, path, dataset)
    uri, first = _read_first(fixed.interactions, fixed.layout)
    _check_columns(first, uri, fixed.columns, dataset)
    unit: str = dataset.timestamp_unit
    times = first.column(fixed.columns.timestamp)
    if unit == "auto":
        try:
            unit = "s" if has_dates(times) else guess_unit(to_numbers(times))
        except pa.ArrowException as error:
            raise DataError(f"{uri}: column '{fixed.columns.timestamp}' holds no times: {error}") from None
    if fixed.items:
        uri, items = _read_first(fixed.items, fixed.items_layout)
        _check_item_columns(items, uri, fixed.item_id, fixed.title, dataset)
    return Source(
        chunks=tuple(_split_into_chunks(fixed)),
        columns=fixed.columns,
        layout=fixed.layout,
        items_layout=fixed.items_layout,
        items_uris=fixed.items,
        item_id_column=fixed.item_id,
        title_column=fixed.title,
        timestamp_unit=unit,
        dataset=dataset,
        column_types={one.name: str(one.type) for one in first.schema},
    )


def _columns_of_feedback(dataset: DatasetConfig) -> ColumnsConfig:
    """Clicks have no use for a rating, even where the file has one."""
    columns = dataset.columns
    if dataset.feedback == "implicit":
        columns = columns.model_copy(update={"rating": None, "label": None})
    if dataset.split.method != "column":
        columns = columns.model_copy(update={"split": None})
    return columns


def _split_into_chunks(fixed: DatasetLayout) -> Iterator[FileChunk]:
    for uri in fixed.interactions:
        if find_kind(uri, fixed.layout) != "parquet":
            yield FileChunk(uri)
            continue
        groups = count_row_groups(uri)
        for start in range(0, max(groups, 1), ROW_GROUPS_PER_CHUNK):
            yield FileChunk(uri, (start, min(start + ROW_GROUPS_PER_CHUNK, groups)))


def _read_first(uris: tuple[str, ...], layout: FileFormat) -> tuple[str, Any]:
    """Return the first file that has rows, and its first rows; Spark, for one, writes files without any."""
    for uri in uris:
        for table in read_tables(uri, layout, BadRows()):
            return uri, table
    raise DataError(f"{uris[0]}: " + ("the file has no rows" if len(uris) == 1 else "no file of these has rows"))


def _check_columns(first: Any, uri: str, columns: ColumnsConfig, dataset: DatasetConfig) -> None:
    for key, name in columns.model_dump().items():
        if name is not None:
            _require(name, first, uri, f"dataset.columns.{key}")
    if dataset.row_filter:
        for name in parse_row_filter(dataset.row_filter)[1]:
            _require(name, first, uri, "dataset.row_filter")


def _check_item_columns(table: Any, uri: str, item_id: str, title: str, dataset: DatasetConfig) -> None:
    others = [name for name in list_template_columns(dataset.item_text) if name != "title"]
    for name in (item_id, title, *others):
        _require(name, table, uri, "dataset.item_columns or dataset.item_text")


def _require(name: str, table: Any, uri: str, key: str) -> None:
    available = table.column_names
    if name not in available:
        near = difflib.get_close_matches(name, available, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        # What is no table at all may have any bytes for names.
        shown = [one if one.isprintable() else ascii(one) for one in (one[:MAX_SHOWN] for one in available[:MAX_SHOWN])]
        raise DataError(f"{uri}: there is no column '{name}' (has {', '.join(shown)}){hint} Set {key}.")
    kind = table.schema.field(name).type
    if pa.types.is_nested(kind):
        raise DataError(f"{uri}: column '{name}' holds {kind}, one value a row is needed: flatten it, or set {key}")
