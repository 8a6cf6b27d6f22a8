"""Availability windows: the times at which items may be offered. Rankings read them; training does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray

# Columns of items.parquet: offered from the first time on, and no longer at the second. Null = without that limit.
WINDOW_COLUMNS = ("available_from", "available_until")


class Availability:
    """Windows of the items of a run.

    Attributes:
        has_window: (I,) mask of the items with a limit.
    """

    def __init__(self, starts: IntArray, ends: IntArray) -> None:
        """Store (I,) seconds since 1970; the smallest and the largest int64 mean no limit."""
        limits = np.iinfo(np.int64)
        self._starts, self._ends = starts, ends
        self.has_window: NDArray[np.bool_] = (starts > limits.min) | (ends < limits.max)

    @classmethod
    def read(cls, items: Mapping[str, Sequence[Any]]) -> Availability | None:
        """Return the windows of an item table, None if it has no column of ``WINDOW_COLUMNS``.

        Args:
            items: columns of the table; the times are integers and None.
        """
        if not set(WINDOW_COLUMNS) & set(items):
            return None
        limits, arrays = np.iinfo(np.int64), []
        for name, open_end in zip(WINDOW_COLUMNS, (limits.min, limits.max), strict=True):
            times = items.get(name, [None] * len(next(iter(items.values()))))
            arrays.append(np.array([open_end if time is None else time for time in times], dtype=np.int64))
        return cls(*arrays)

    def find_available(self, now: int) -> NDArray[np.bool_]:
        """Return the (I,) mask of the items that are available at a time, in seconds since 1970."""
        mask: NDArray[np.bool_] = (self._starts <= now) & (now < self._ends)
        return mask
