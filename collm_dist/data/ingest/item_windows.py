"""Times at which items are available: columns of the item files, read as seconds since 1970."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.file_format import LINE_COLUMN, NULLS, BadRows
from collm_dist.data.ingest.normalize import (
    DATE_DIGITS,
    FIRST_SECOND,
    LAST_SECOND,
    UNIT_LIMITS,
    UNITS,
    guess_unit,
    has_dates,
    show_value,
    to_numbers,
    to_seconds,
    to_text,
)
from collm_dist.data.shards.availability import WINDOW_COLUMNS, Availability

# The last day, which stands for never: it says nothing about the unit of the other numbers.
_LAST_DATES = (99991231, 999912312359, 99991231235959)
_LAST_SECONDS = (LAST_SECOND - 86_399, LAST_SECOND)


@dataclass(frozen=True)
class ItemWindows:
    """Columns of the item files with times.

    Attributes:
        columns: name in the files by the name of ``WINDOW_COLUMNS``.
        unit: of numbers, see ``normalize.to_seconds``.
        unit_is_guessed: whether smaller numbers, as of another unit, are bad rows.
        time_format: of strptime, for dates in another form.
    """

    columns: dict[str, str]
    unit: str
    unit_is_guessed: bool
    time_format: str | None

    def read(self, table: Any, place: str, bad_rows: BadRows, without_id: Any) -> tuple[Any, dict[str, Any]]:
        """Return the usable rows of a table, and their times by the name of ``WINDOW_COLUMNS``, None without a limit.

        Args:
            table: rows of an item file.
            place: the file, for examples.
            bad_rows: counts rows with a value that is not a time, and rows whose window is empty.
            without_id: (N,) rows that are in the counts already, and are kept.
        """
        usable, times = np.ones(table.num_rows, dtype=bool), dict[str, Any]()
        has_id = pc.invert(without_id).to_numpy(zero_copy_only=False)

        def drop(bad: Any, cause: str, column: str) -> None:
            if (dropped := bad & usable & has_id).any():
                first = int(dropped.argmax())
                value = show_value(table.column(column).slice(first, 1))
                bad_rows.add(cause, int(dropped.sum()), f"{place}:{table.column(LINE_COLUMN)[first]}", value)
                usable[dropped] = False

        for name, column in self.columns.items():
            values, key = table.column(column).combine_chunks(), f"dataset.item_columns.{name}"
            texts = None if has_dates(values) else pc.utf8_trim_whitespace(to_text(values))
            nulls = values.is_null() if texts is None else pc.is_in(texts, pa.array([*NULLS, None], pa.string()))
            missing = nulls.to_numpy(zero_copy_only=False)
            seconds, valid = to_seconds(values, self.unit, self.time_format)
            outside = (seconds < FIRST_SECOND) | (seconds > LAST_SECOND)
            drop(~missing & (~valid | outside), f"{column} is not a time ({key})", column)
            if self.unit_is_guessed and self.unit in UNITS and not has_dates(values) and self.time_format is None:
                numbers = np.abs(np.nan_to_num(to_numbers(values)))
                smallest = (0.0, *UNIT_LIMITS)[list(UNITS).index(self.unit)]
                cause = f"{column} is not in {self.unit} as in the first rows (dataset.timestamp_unit)"
                drop((numbers > 0) & (numbers < smallest), cause, column)
            times[name] = pa.array(seconds, pa.int64(), mask=missing)
        if len(times) == len(WINDOW_COLUMNS):
            start, end = (times[name] for name in WINDOW_COLUMNS)
            empty = pc.fill_null(pc.greater_equal(start, end), False).to_numpy(zero_copy_only=False)
            column, other = self.columns["available_until"], self.columns["available_from"]
            drop(empty, f"{column} is not after {other}, so the item is never available", column)
        kept = pa.array(usable)
        return table.filter(kept), {name: column.filter(kept) for name, column in times.items()}


def find_windows(dataset: DatasetConfig, first: Any) -> ItemWindows | None:
    """Return the columns that the settings name, or None.

    Args:
        dataset: the settings.
        first: first rows of the item file, which decide the unit of numbers for all rows and both columns.
    """
    columns = dataset.item_columns.list_windows()
    if not columns:
        return None
    unit, is_guessed = dataset.timestamp_unit.replace("auto", "s"), dataset.timestamp_unit == "auto"
    if is_guessed:
        numbers = [to_numbers(column) for column in map(first.column, columns.values()) if not has_dates(column)]
        unit = _guess_unit(np.concatenate([np.zeros(0), *numbers]))
    return ItemWindows(columns, unit, is_guessed, dataset.time_format)


def _guess_unit(values: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    never = {unit: np.isin(values, [second * factor for second in _LAST_SECONDS]) for unit, factor in UNITS.items()}
    never[DATE_DIGITS] = np.isin(values, _LAST_DATES)
    others = values[~np.any(list(never.values()), axis=0)]
    if np.isfinite(others).any():
        return guess_unit(others)
    return next((unit for unit, found in never.items() if found.any()), "s")


def read_windows(items: Any) -> Availability | None:
    """Return the windows of a table of items, None if it has no column of ``WINDOW_COLUMNS``."""
    return Availability.read({name: items.column(name).to_pylist() for name in ("item_id", *WINDOW_COLUMNS)
                              if name in items.column_names})  # fmt: skip
