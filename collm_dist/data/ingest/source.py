"""A raw log in any supported format: its chunks in file order, and its items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.config import ColumnsConfig, DatasetConfig
from collm_dist.data.ingest.column_checks import (
    check_columns,
    check_item_columns,
    list_columns,
    list_item_columns,
)
from collm_dist.data.ingest.dataset_formats import (
    TABLE_FORMATS,
    find_dataset_layout,
    find_table_layout,
)
from collm_dist.data.ingest.file_chunks import FileChunk, list_chunks
from collm_dist.data.ingest.file_format import LINE_COLUMN
from collm_dist.data.ingest.file_parts import split_file
from collm_dist.data.ingest.file_readers import (
    BadRows,
    FileFormat,
    read_tables,
)
from collm_dist.data.ingest.input_checks import refuse_copies
from collm_dist.data.ingest.item_texts import WITHOUT_ID, ItemCatalogue, build_item_table
from collm_dist.data.ingest.item_windows import ItemWindows, find_windows
from collm_dist.data.ingest.lake_tables import LakeTable
from collm_dist.data.ingest.new_events import check_parts, find_missing, list_new_events
from collm_dist.data.ingest.normalize import (
    DATE_DIGITS,
    FIRST_SECOND,
    LAST_SECOND,
    ROW_COLUMN,
    SCHEMA,
    format_time,
    guess_unit,
    has_dates,
    normalize_batch,
    to_ids,
    to_numbers,
    to_seconds,
    to_text,
)
from collm_dist.data.ingest.row_filter import RowFilter, convert, drop_misfits, parse_row_filter
from collm_dist.data.ingest.text_rows import WRONG_WIDTH
from collm_dist.errors import ConfigError, DataError
from collm_dist.storage import describe_files

MAX_SHOWN = 50


@dataclass(frozen=True)
class ReadBatch:
    """A batch of a chunk's rows.

    Attributes:
        table: usable rows in ``normalize.SCHEMA``; ``row`` is the position among all raw rows of the chunk.
        bad: counts of unusable rows by cause.
        bad_examples: ``file:line: cause`` of the first unusable rows.
        rows_read: number of raw rows of the batch, before the row filter.
        notes: counts of other facts by cause, which are reported and not limited.
        first_bad: ``file:line (value)`` of the first unusable row of each cause.
        ratings: range of the usable rows' ratings; None without ratings.
    """

    table: Any
    bad: Counter[str]
    bad_examples: list[str]
    rows_read: int
    notes: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)
    ratings: tuple[float, float] | None = None


@dataclass(frozen=True)
class Source:
    """A raw log, opened and checked. It is small, to be sent to workers.

    Attributes:
        chunks: in file order; a text file is one chunk.
        columns: names of the columns of interactions.
        file_format, items_format: formats of the files.
        items_uris: item files, if any.
        item_id_column, title_column: names of the columns of items.
        timestamp_unit: unit of numeric timestamps, the same for all files.
        dataset: the settings.
        column_types: Arrow types of the first file, for the preview.
        first_rows: delimiter and times of the first rows, for the preview.
        numeric_columns: columns of numbers, if the row filter compares columns with each other.
        part_uris: the chunks' files of ``dataset.new_events``.
        unfiltered: columns of the row filter that the parts lack.
        windows: columns of the times at which items are available; None = none.
    """

    chunks: tuple[FileChunk, ...]
    columns: ColumnsConfig
    file_format: FileFormat
    items_format: FileFormat
    items_uris: tuple[str, ...]
    item_id_column: str
    title_column: str
    timestamp_unit: str
    dataset: DatasetConfig
    column_types: dict[str, str] = field(default_factory=dict)
    first_rows: dict[str, str] = field(default_factory=dict)
    numeric_columns: frozenset[str] = frozenset()
    part_uris: frozenset[str] = frozenset()
    unfiltered: tuple[str, ...] = ()
    windows: ItemWindows | None = None

    def split_chunks(self, inputs: Mapping[str, Any]) -> Iterator[FileChunk]:
        """Yield the chunks, large text files in parts. The parts depend on the files alone, not on the workers.

        Args:
            inputs: as returned by ``inputs``.
        """
        num_chunks = Counter(chunk.uri for chunk in self.chunks)
        for chunk in self.chunks:
            size = inputs[chunk.uri]["size"]
            if chunk.row_groups is not None or chunk.lake_file is not None:
                yield replace(chunk, num_bytes=(size or 0) // num_chunks[chunk.uri])
                continue
            for part in split_file(chunk.uri, self.file_format, size):
                end = (size or 0) if part.end is None else part.end
                yield replace(chunk, part=part, num_bytes=end - part.start)

    def read_chunk(self, chunk: FileChunk) -> Iterator[ReadBatch]:
        """Stream a chunk's rows in file order.

        Raises:
            DataError: the file cannot be read, or lacks a column.
        """
        configured = _parse_filter(self.dataset, self.numeric_columns)
        first_row, bad_rows = 0, BadRows()
        for raw in read_tables(chunk.uri, self.file_format, bad_rows, chunk.row_groups, chunk.part, chunk.lake_file):
            table, rows = raw, raw.num_rows
            is_part = chunk.uri in self.part_uris
            row_filter = None if is_part and find_missing(table, configured) else configured
            filtered = row_filter.names if row_filter else ()
            check_columns(table, chunk.uri, self.columns, filtered, _find_setting(self.dataset, is_part))
            try:
                notes = Counter[str]()
                if row_filter is not None:
                    table = table.append_column(ROW_COLUMN, pa.array(range(first_row, first_row + rows), pa.int64()))
                    table = row_filter.apply(drop_misfits(table, row_filter, chunk.uri, notes, bad_rows))
                uniform, ratings = normalize_batch(
                    table,
                    self.columns,
                    like_threshold=self.dataset.like_threshold,
                    unit=self.timestamp_unit,
                    time_format=self.dataset.time_format,
                    unit_is_guessed=self.dataset.timestamp_unit == "auto",
                    place=chunk.uri,
                    first_row=first_row,
                    bad_rows=bad_rows,
                )
            except pa.ArrowException as error:
                raise DataError(
                    f"{chunk.uri}:{raw.column(LINE_COLUMN)[0]}: from here on, a value or a column type does not fit "
                    f"dataset.columns or dataset.row_filter: {error}"
                ) from error
            yield ReadBatch(uniform, bad_rows.counts, bad_rows.examples, rows, notes, bad_rows.first, ratings)
            first_row += rows
            bad_rows.clear()
        if bad_rows.counts:  # behind the last row that can be read
            yield ReadBatch(SCHEMA.empty_table(), bad_rows.counts, bad_rows.examples, 0, first_bad=bad_rows.first)

    def read_items(self) -> ItemCatalogue:
        """Return the items of all item files.

        Raises:
            DataError: a file cannot be read, or lacks a column.
        """
        bad_rows, sizes = BadRows(), list[int]()
        tables = (table for uri in self.items_uris for table in self._read_item_file(uri, bad_rows, sizes))
        items, repairs = build_item_table(tables, self.item_id_column, self.title_column, self.dataset.item_text)
        rows_read = sum(sizes) + bad_rows.counts.total() - bad_rows.counts[WITHOUT_ID]
        lines = {f"item rows: {cause}": count for cause, count in bad_rows.counts.items() if cause != WITHOUT_ID}
        return ItemCatalogue(items, repairs + Counter(lines), rows_read, bad_rows)

    def _read_item_file(self, uri: str, bad_rows: BadRows, sizes: list[int]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for table in read_tables(uri, self.items_format, bad_rows):
            check_item_columns(table, uri, self.item_id_column, self.title_column, self.dataset)
            missing = pc.equal(pc.fill_null(to_ids(table.column(self.item_id_column)), ""), "")
            if count := pc.sum(missing).as_py():
                line = table.column(LINE_COLUMN)[pc.index(missing, True).as_py()]
                bad_rows.add(WITHOUT_ID, count, f"{uri}:{line}")
            table, windows = (table, {}) if self.windows is None else self.windows.read(table, uri, bad_rows, missing)
            sizes.append(table.num_rows)
            yield table, windows

    def inputs(self) -> dict[str, Any]:
        """Return size and modification time of every input file; of files of lakehouse tables the size."""
        files = [chunk.lake_file for chunk in self.chunks if chunk.lake_file is not None]
        if self.items_format.table is not None:
            files += [self.items_format.table.files[uri] for uri in self.items_uris]
        return describe_files(self._list_plain_files()) | {file.uri: {"size": file.num_bytes} for file in files}

    def describe_inputs(self) -> dict[str, Any]:
        """Return the entries of the inputs for fingerprints: of plain files, and of lakehouse tables as a whole."""
        return describe_files(self._list_plain_files()) | {key: table.describe() for key, table in self.tables.items()}

    @property
    def tables(self) -> dict[str, LakeTable]:
        """Lakehouse tables by setting."""
        found = {"dataset.path": self.file_format.table, "dataset.items_path": self.items_format.table}
        return {key: table for key, table in found.items() if table is not None}

    def for_workers(self) -> Source:
        """Return the source without its list of chunks, which workers are given one by one."""
        return replace(self, chunks=())

    def _list_plain_files(self) -> list[str]:
        items = () if self.items_format.table is not None else self.items_uris
        return sorted({chunk.uri for chunk in self.chunks if chunk.lake_file is None} | set(items))

    def list_guesses(self) -> list[str]:
        """Return unusual properties found in the first rows, with the settings that decide them."""
        guesses = [
            f"{table.show()}{', the newest' if table.version == table.newest else f'; the newest is {table.newest}'}"
            for table in self.tables.values()
        ]
        if "delimiter" in self.first_rows and self.dataset.delimiter is None:
            delimiter = self.first_rows["delimiter"]
            if delimiter not in ("','", r"'\t'"):
                guesses.append(f"cells are separated by {delimiter} (dataset.delimiter)")
        if self.timestamp_unit == DATE_DIGITS:
            guesses.append(f"{self.columns.timestamp} holds dates in digits, YYYYMMDD (dataset.timestamp_unit)")
        if self.windows is not None and self.windows.unit == DATE_DIGITS:
            names = " and ".join(self.windows.columns.values())
            guesses.append(f"item file: {names} hold dates in digits, YYYYMMDD (dataset.timestamp_unit)")
        if self.unfiltered:
            columns = ", ".join(self.unfiltered)
            guesses.append(f"parts of dataset.new_events have no {columns}, so dataset.row_filter keeps all their rows")
        return guesses

    def describe(self) -> dict[str, Any]:
        """Return files, columns, types and timestamp unit, for the preview."""
        return {
            "files": sorted({chunk.uri for chunk in self.chunks}),
            **{key: table.show() for key, table in self.tables.items()},
            "columns": {key: value for key, value in self.columns.model_dump().items() if value is not None},
            # Text files are read as bytes, so that invalid UTF-8 can be counted.
            "types": {name: "text" if kind == "binary" else kind for name, kind in self.column_types.items()},
            "timestamp_unit": self.timestamp_unit,
            **({} if self.windows is None else {"item_times_unit": self.windows.unit}),
            **self.first_rows,
            "items": list(self.items_uris) or "none: item ids are used as item texts",
        }


def open_source(dataset: DatasetConfig) -> Source:
    """Find the files, check their columns, and determine the timestamp unit.

    Raises:
        DataError: a file is missing or lacks a column; the message names the file, the column and the setting.
        ConfigError: the row filter or the item text does not parse.
    """
    path, format_name, parts = dataset.path or "", dataset.format, list[str]()
    if dataset.asset is not None:
        from collm_dist.assets import resolve_dataset

        folder, asset_format = resolve_dataset(dataset.asset)
        path, format_name = str(folder), asset_format  # type: ignore[assignment]
    if format_name in TABLE_FORMATS:
        parts = list_new_events(dataset)
        layout = find_table_layout(dataset, path, parts)
    else:
        layout = find_dataset_layout(format_name, path, dataset)
    if dataset.encoding is not None:
        layout = replace(
            layout,
            file_format=replace(layout.file_format, encoding=dataset.encoding),
            items_format=replace(layout.items_format, encoding=dataset.encoding),
        )
    refuse_copies(layout.interactions, "dataset.path")
    refuse_copies(layout.items, "dataset.items_path")
    uri, first = read_first(layout.interactions, layout.file_format)
    row_filter = _parse_filter(dataset, frozenset())
    filtered = row_filter.names if row_filter else ()
    check_columns(first, uri, layout.columns, filtered, _find_setting(dataset, uri in parts))
    unfiltered = check_parts(parts, layout.file_format, layout.columns, row_filter)
    numeric_columns = _check_filter(dataset, uri, first)
    unit, windows = _find_unit(dataset, layout.columns, uri, first), None
    if layout.items:
        uri, items = read_first(layout.items, layout.items_format)
        check_item_columns(items, uri, layout.item_id, layout.title, dataset)
        windows = find_windows(dataset, items)
    elif given := dataset.item_columns.list_windows():
        raise ConfigError(
            f"dataset.item_columns.{next(iter(given))}: the setting names a column of the item file, but no item "
            "file is set; set dataset.items_path"
        )
    return Source(
        chunks=tuple(list_chunks(layout.interactions, layout.file_format)),
        columns=layout.columns,
        file_format=replace(
            layout.file_format,
            expected=list_columns(layout.columns, dataset),
            table=layout.file_format.table and layout.file_format.table.without_files(),
        ),
        items_format=replace(layout.items_format, expected=list_item_columns(layout.item_id, layout.title, dataset)),
        items_uris=layout.items,
        item_id_column=layout.item_id,
        title_column=layout.title,
        timestamp_unit=unit,
        dataset=dataset,
        column_types={column.name: str(column.type) for column in first.schema if column.name != LINE_COLUMN},
        first_rows=_describe_first_rows(first, layout.columns, unit, dataset.time_format),
        numeric_columns=numeric_columns,
        part_uris=frozenset(parts),
        unfiltered=unfiltered,
        windows=windows,
    )


def _find_setting(dataset: DatasetConfig, is_part: bool) -> tuple[str, str | None]:
    """Return name and value of the setting by which a file of interactions was found."""
    return ("dataset.new_events", dataset.new_events) if is_part else ("dataset.path", dataset.path)


def _find_unit(dataset: DatasetConfig, columns: ColumnsConfig, uri: str, first: Any) -> str:
    """Return the unit of numeric timestamps, decided by the first rows for all files."""
    if columns.timestamp is None or dataset.timestamp_unit != "auto":
        return dataset.timestamp_unit
    times = first.column(columns.timestamp)
    try:
        return "s" if has_dates(times) else guess_unit(to_numbers(times))
    except pa.ArrowException as error:
        raise DataError(f"{uri}: column '{columns.timestamp}' holds no timestamps: {error}") from None


def _describe_first_rows(first: Any, columns: ColumnsConfig, unit: str, time_format: str | None) -> dict[str, str]:
    """Return the delimiter and the earliest and latest time of the first rows, for the preview."""
    facts = {}
    if first.schema.metadata and b"delimiter" in first.schema.metadata:
        facts["delimiter"] = repr(first.schema.metadata[b"delimiter"].decode())
    if columns.timestamp is not None:
        seconds, valid = to_seconds(first.column(columns.timestamp), unit, time_format)
        times = seconds[valid & (seconds >= FIRST_SECOND) & (seconds <= LAST_SECOND)]
        if len(times):
            facts["times in the first rows"] = f"{format_time(times.min())} to {format_time(times.max())} (UTC)"
    return facts


def _parse_filter(dataset: DatasetConfig, numeric_columns: frozenset[str]) -> RowFilter | None:
    return parse_row_filter(dataset.row_filter, numeric_columns) if dataset.row_filter else None


def _check_filter(dataset: DatasetConfig, uri: str, first: Any) -> frozenset[str]:
    """Return which of the filter's columns hold numbers.

    Raises:
        DataError: a column is compared with numbers, and none of its first values is a number.
    """
    row_filter = _parse_filter(dataset, frozenset())
    if row_filter is None:
        return frozenset()
    for name, misfits in row_filter.find_misfits(first).items():
        column = first.column(name)
        if name not in row_filter.asked and 0 < column.length() - column.null_count == pc.sum(misfits).as_py():
            value = to_text(column.filter(misfits).slice(0, 1))[0].as_py()
            raise DataError(
                f"{uri}: from row 1: dataset.row_filter compares column '{name}' with a number, and it holds text "
                f"({value[:MAX_SHOWN]!a}); compare it with a string in quotes, or write number({name}) if later "
                "values are numbers"
            )
    probe = {name: convert(first.column(name), "number").null_count for name in row_filter.names}
    return frozenset(name for name, nulls in probe.items() if nulls == first.column(name).null_count)


def read_first(uris: tuple[str, ...], file_format: FileFormat) -> tuple[str, Any]:
    """Return the first file that has rows, and its first rows; Spark for example also writes empty files.

    Raises:
        DataError: no file has a row that can be read.
    """
    bad_rows = BadRows()
    for uri in uris:
        for table in read_tables(uri, file_format, bad_rows):
            return uri, table
    where = f"{uris[0]}: " if len(uris) == 1 else f"{uris[0]} and {len(uris) - 1} more: "
    if bad_rows.counts:
        causes = ", ".join(f"{count} x {cause}" for cause, count in bad_rows.counts.most_common())
        hint = ""
        if WRONG_WIDTH in bad_rows.counts:
            hint = "; check that the first line names the columns, and dataset.delimiter"
        raise DataError(f"{where}cannot be read, no row can be used: {causes}{hint}. The first ones:\n  "
                        + "\n  ".join(bad_rows.examples))  # fmt: skip
    raise DataError(f"{where}the file has no rows (it is empty or has only a header); give a file with data")
