"""Split rules: interactions to train, valid and test by time, or outside all windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collm_dist.config import SplitConfig

SPLITS = ("train", "valid", "test")
OUTSIDE = -1
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class SplitRule:
    """Start and end of each split in seconds since 1970, UTC. A row belongs to the last split that has started.

    Attributes:
        starts: (timestamp, row id) at which train, valid and test start. The row id breaks ties: rows with the
            timestamp of a start but a smaller row id belong to the previous split.
        ends: exclusive end timestamps; None = open.
    """

    starts: tuple[tuple[int, int], ...]
    ends: tuple[int | None, ...]

    def assign(self, timestamps: IntArray, row_ids: IntArray) -> NDArray[np.int8]:
        """Return the split of (N,) rows: 0, 1, 2 for train, valid, test, and ``OUTSIDE``."""
        split = np.full(len(timestamps), OUTSIDE, dtype=np.int8)
        for index, ((start, first_row), end) in enumerate(zip(self.starts, self.ends, strict=True)):
            inside = (timestamps > start) | ((timestamps == start) & (row_ids >= first_row))
            split[inside] = index
            if end is not None:
                split[inside & (timestamps >= end)] = OUTSIDE
        return split


def add_months(first: int, months: int) -> int:
    """Return the start, in seconds, of the calendar month that is ``months`` after the month of a timestamp."""
    month = np.datetime64(first, "s").astype("datetime64[M]") + months
    return int(month.astype("datetime64[s]").astype(np.int64))


def build_calendar_rule(split: SplitConfig, first_timestamp: int) -> SplitRule:
    """Return windows of whole months counted from the data's first month (the paper's ML-1M)."""
    windows = (split.train_months, split.valid_months, split.test_months)
    return SplitRule(
        starts=tuple((add_months(first_timestamp, first), 0) for first, _ in windows),
        ends=tuple(add_months(first_timestamp, last + 1) for _, last in windows),
    )


def get_amazon_book_window() -> tuple[int, int, int]:
    """Return the starts of 2017, of December 2017 and of 2018 in seconds."""
    start = int(np.datetime64("2017-01-01", "s").astype(np.int64))
    return start, add_months(start, 11), add_months(start, 12)


def build_amazon_book_rule(december: IntArray, december_rows: IntArray) -> SplitRule:
    """Return CoLLM's rule for 2017: eleven months train; the halves of December, by time and row id, valid and test.

    Args:
        december, december_rows: timestamps and row ids of December's rows.
    """
    start, december_start, end = get_amazon_book_window()
    order = np.lexsort((december_rows, december))
    middle = order[len(order) // 2] if len(order) else 0
    half = (int(december[middle]), int(december_rows[middle])) if len(order) else (end, 0)
    return SplitRule(starts=((start, 0), (december_start, 0), half), ends=(end, end, end))


def build_ratio_rule(split: SplitConfig, timestamps: IntArray, counts: IntArray) -> SplitRule:
    """Return a rule by shares of rows in time order. Rows of one second all go to the later split.

    Args:
        split: the shares.
        timestamps, counts: (T,) distinct timestamps in ascending order, and (T,) numbers of rows.
    """
    ends = np.cumsum(counts)
    shares = (split.train_ratio, split.train_ratio + split.valid_ratio)
    rows_before = [int(share * ends[-1] + 1e-6) for share in shares]  # in floating point 0.7 + 0.1 < 0.8
    cuts = [int(timestamps[np.searchsorted(ends, before, side="right")]) for before in rows_before]
    return SplitRule(starts=((int(timestamps[0]), 0), (cuts[0], 0), (cuts[1], 0)), ends=(None, None, None))
