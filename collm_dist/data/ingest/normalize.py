"""Normalization of raw rows: string ids, times in seconds, 0/1 labels, split names; bad rows are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.config import ColumnsConfig
from collm_dist.data.ingest.file_format import LINE_COLUMN, NULLS, BadRows
from collm_dist.data.ingest.time_texts import are_digit_dates, parse_digits, parse_times

DATE_DIGITS = "YYYYMMDD"
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Magnitudes from which a present-day timestamp is in the next finer unit; in seconds it has ten digits.
UNIT_LIMITS = (1e11, 1e14, 1e17)
# The years 1 to 9999, in seconds since 1970.
FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799
SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}

ROW_COLUMN = "__row"
# As table programs write long numbers; 1e5 may be an id.
_SCIENTIFIC = r"^-?[0-9]+(\.[0-9]+[eE]\+?|[eE]\+)[0-9]+$"
MAX_SHOWN = 60
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("label", pa.int8()),
        ("split", pa.string()),
    ]
)


def to_text(column: Any) -> Any:
    """Return a column as strings: bytes decoded (invalid ones become U+FFFD), whole numbers without a fraction."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_fixed_size_binary(kind):
        column, kind = column.cast(pa.large_binary()), pa.large_binary()  # Parquet does not validate UTF-8
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        try:
            return column.cast(pa.string())
        except pa.ArrowInvalid:
            values = [None if value is None else value.decode("utf-8", "replace") for value in column.to_pylist()]
            return pa.array(values, pa.string())
    if pa.types.is_floating(kind):
        column = column.cast(pa.float64())
        values = column.fill_null(np.nan).to_numpy(zero_copy_only=False)
        with np.errstate(invalid="ignore"):
            whole = np.isfinite(values) & (np.floor(values) == values) & (np.abs(values) < 2.0**53)
        texts = pa.array(np.where(whole, values, 0).astype(np.int64)).cast(pa.string())
        # Infinite values and NaN are missing, as in text.
        others = pc.if_else(pa.array(np.isfinite(values)), column.cast(pa.string()), None)
        return pc.if_else(pa.array(whole), texts, others)
    return column.cast(pa.string())


def to_ids(column: Any) -> Any:
    """Return a column of ids as strings without spaces around them.

    Numbers have no fraction of zero, whatever their type; texts such as 17.0 are kept: ``id_forms`` decides on them.
    """
    ids = pc.utf8_trim_whitespace(to_text(column))
    return pc.replace_substring_regex(ids, r"\.0+$", "") if pa.types.is_decimal(column.type) else ids


def to_numbers(column: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a column as float64, NaN for values that are not numbers."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        # Unsafe cast: nanoseconds since 1970 have more digits than a float64, and the last ones do not matter.
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)
    values: np.ndarray[Any, np.dtype[np.float64]] = pd.to_numeric(
        to_text(column).to_pandas(), errors="coerce"
    ).to_numpy(dtype=np.float64)
    return values


def _to_labels(column: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a column as numbers; the texts true and false are 1 and 0."""
    values = to_numbers(column)
    if np.isnan(values).any() and not pa.types.is_floating(column.type):
        words = to_text(column).to_pandas().str.strip().str.lower().map({"true": 1.0, "false": 0.0})
        values = np.where(np.isnan(values), words.to_numpy(dtype=np.float64), values)
    return values


def guess_unit(values: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    """Guess the unit of numeric timestamps by magnitude, or find that they are dates in digits."""
    if are_digit_dates(values):
        return DATE_DIGITS
    finite = np.abs(values[np.isfinite(values)])
    typical = float(np.median(finite)) if len(finite) else 0.0
    return list(UNITS)[np.searchsorted(UNIT_LIMITS, typical, side="right")]


def find_other_units(values: np.ndarray[Any, np.dtype[np.float64]], unit: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return a (N,) mask of finite timestamps that have the magnitude of another unit."""
    magnitudes = np.searchsorted(UNIT_LIMITS, np.abs(values), side="right")
    other: np.ndarray[Any, np.dtype[np.bool_]] = np.isfinite(values) & (magnitudes != list(UNITS).index(unit))
    return other


def find_control_characters(strings: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return a mask of the strings in an Arrow array that contain control characters, such as line breaks."""
    data = strings.buffers()[2]
    if data is None or not (np.frombuffer(data, np.uint8) < ord(" ")).any():  # nearly always
        return np.zeros(len(strings), dtype=bool)
    matches = pc.match_substring_regex(strings, r"[\x00-\x1f]").fill_null(False)
    return np.asarray(matches.to_numpy(zero_copy_only=False), dtype=bool)


def has_dates(column: Any) -> bool:
    """Return whether a column has a date or timestamp type, so that no unit has to be guessed."""
    return bool(pa.types.is_timestamp(column.type) or pa.types.is_date(column.type))


def to_seconds(
    column: Any, unit: str, time_format: str | None = None
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Return seconds since 1970 and a mask of valid values. Numbers are in ``unit``; other values are read as dates.

    Args:
        column: of any type.
        unit: a key of ``UNITS``, or ``DATE_DIGITS`` for numbers such as 20240131 that are dates.
        time_format: of strptime, for dates in another form.
    """
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if has_dates(column):
        dates = column.cast(pa.timestamp("s", tz=getattr(column.type, "tz", None)), safe=False)
        valid = np.asarray(dates.is_valid().to_numpy(zero_copy_only=False))
        return np.asarray(dates.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)), valid
    if time_format is not None:
        return parse_times(to_text(column).to_pandas(), time_format)
    if unit == DATE_DIGITS:
        return parse_digits(to_text(column).to_pandas())
    numbers = to_numbers(column)
    valid = np.isfinite(numbers) & (np.abs(numbers) < 2.0**62)
    seconds = np.floor_divide(np.where(valid, numbers, 0), UNITS[unit]).astype(np.int64)
    if not valid.all() and not pa.types.is_floating(column.type) and not pa.types.is_integer(column.type):
        open_rows = np.flatnonzero(~valid)
        found, parsed = parse_times(to_text(column).filter(pa.array(~valid)).to_pandas())
        seconds[open_rows[parsed]] = found[parsed]
        valid[open_rows[parsed]] = True
    return seconds, valid


def format_time(seconds: int) -> str:
    """Return a time in seconds since 1970 as it is shown to people."""
    return str(np.datetime64(int(seconds), "s")).replace("T", " ")


def show_value(value: Any) -> str | None:
    """Return the only value of a column as it is shown in messages; None if it has no text."""
    try:
        text = to_text(value)[0].as_py()
    except pa.ArrowException:  # for example a date in the year 300,000
        return None
    return ascii(text[:MAX_SHOWN]) if text else "empty"


def normalize_batch(
    table: Any,
    columns: ColumnsConfig,
    *,
    like_threshold: float,
    unit: str,
    unit_is_guessed: bool,
    time_format: str | None = None,
    place: str,
    first_row: int,
    bad_rows: BadRows,
) -> tuple[Any, tuple[float, float] | None]:
    """Return the usable rows of a raw table in ``SCHEMA`` and the range of their ratings, and count the other rows.

    Args:
        table: raw rows with all mapped columns and ``LINE_COLUMN``.
        columns: names of the columns.
        like_threshold: a rating of at least this is a like.
        unit: of numeric timestamps.
        unit_is_guessed: whether numbers of another magnitude are bad rows, not times in the far past or future.
        time_format: of strptime, for dates in another form.
        place: file name for examples.
        first_row: position of the table's first row in the file.
        bad_rows: counts bad rows.
    """
    rows, file_lines = np.arange(first_row, first_row + table.num_rows), table.column(LINE_COLUMN).to_numpy()
    if ROW_COLUMN in table.column_names:  # rows carry their positions because a filter has run
        rows = table.column(ROW_COLUMN).to_numpy()
    usable = np.ones(table.num_rows, dtype=bool)

    def drop(bad: np.ndarray[Any, Any], cause: str, column: str) -> None:
        dropped = bad & usable
        if dropped.any():
            first = int(dropped.argmax())
            value = show_value(table.column(column).slice(first, 1))
            bad_rows.add(cause, int(dropped.sum()), f"{place}:{file_lines[first]}", value)
            usable[dropped] = False

    ids = {}
    for name in ("user_id", "item_id"):
        ids[name] = to_ids(table.column(getattr(columns, name)))
        missing = pc.or_kleene(pc.is_null(ids[name]), pc.is_in(ids[name], pa.array(NULLS))).fill_null(True)
        column = getattr(columns, name)
        drop(missing.to_numpy(zero_copy_only=False), f"missing {column}", column)
        broken = find_control_characters(ids[name])
        drop(broken, f"line breaks or control characters in {column}", column)
        scientific = pc.match_substring_regex(ids[name], _SCIENTIFIC).fill_null(False)
        drop(scientific.to_numpy(zero_copy_only=False), f"{column} is in scientific notation", column)
    seconds = np.zeros(table.num_rows, np.int64)  # without timestamps, row numbers take their place later
    if columns.timestamp is not None:
        times, name = table.column(columns.timestamp), columns.timestamp
        seconds, valid = to_seconds(times, unit, time_format)
        drop(~valid, f"{name} is not a time", name)
        if unit_is_guessed and unit in UNITS and time_format is None and not has_dates(times):
            other = find_other_units(to_numbers(times), unit)
            drop(other, f"{name} is not in {unit} as in the first rows (dataset.timestamp_unit)", name)
        outside = (seconds < FIRST_SECOND) | (seconds > LAST_SECOND)
        drop(outside, f"{name} in {unit} is outside the years 1 to 9999 (dataset.timestamp_unit)", name)
    labels, ratings = np.ones(table.num_rows, dtype=np.int8), np.empty(0)
    if columns.rating is not None:
        ratings = to_numbers(table.column(columns.rating))
        drop(~np.isfinite(ratings), f"{columns.rating} is not a number", columns.rating)
        labels = (ratings >= like_threshold).astype(np.int8)
    elif columns.label is not None:
        values = _to_labels(table.column(columns.label))
        drop((values != 0) & (values != 1), f"{columns.label} is neither 0 nor 1", columns.label)
        labels = np.where(values == 1, 1, 0).astype(np.int8)
    split = pa.nulls(table.num_rows, pa.string())
    if columns.split is not None:
        names = to_text(table.column(columns.split)).to_pandas().str.strip().str.lower().map(SPLIT_NAMES)
        drop(names.isna().to_numpy(), f"{columns.split} is none of train, valid, test", columns.split)
        split = pa.Array.from_pandas(names, type=pa.string())
    arrays = [pa.array(rows), ids["user_id"], ids["item_id"], pa.array(seconds), pa.array(labels), split]
    used = ratings[usable] if len(ratings) else ratings
    limits = (float(used.min()), float(used.max())) if len(used) else None
    return pa.Table.from_arrays(arrays, schema=SCHEMA).filter(pa.array(usable)), limits
