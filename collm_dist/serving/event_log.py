"""Event log of a run: as-of statistics of users and items, by the same rules as the training samples.

Events at the as-of second itself do not count, as under ``preprocessing.ties: strict``.

Shapes: E events in the log, N queried items.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray
from collm_dist.data.shards.interactions import load_interactions, load_item_counts
from collm_dist.data.shards.manifest import Manifest


class EventLog:
    """All real events of a run in memory (about 30 bytes each), indexed by user in time order and by item.

    Attributes:
        end: first second after all events, the default as-of time.
        first_as_of: earliest as-of time whose statistics are known; None = any.
    """

    first_as_of: int | None = None

    def __init__(
        self, user_idx: IntArray, item_idx: IntArray, timestamps: IntArray, labels: NDArray[np.int8],
        *, num_users: int, num_items: int,
    ) -> None:  # fmt: skip
        """Index (E,) events, sorted by user, timestamp and row id."""
        self.end = int(timestamps.max(initial=0)) + 1
        self._start = int(timestamps.min(initial=self.end))
        self._user_offsets = np.searchsorted(user_idx, np.arange(num_users + 1))
        self._times, self._items, self._labels = timestamps, item_idx, labels
        # An event's key orders by item, then by time, so a single binary search finds both.
        self._span = self.end - self._start + 1
        keys = item_idx.astype(np.int64) * self._span + (timestamps - self._start)
        order = np.argsort(keys, kind="stable")
        self._item_keys = keys[order]
        self._likes_before = np.concatenate([[0], np.cumsum(labels[order], dtype=np.int64)])
        self._item_starts = np.searchsorted(self._item_keys, np.arange(num_items) * self._span)

    @classmethod
    def load(cls, data_dir: Path, manifest: Manifest) -> EventLog:
        """Load the log of a run.

        Raises:
            ArtifactError: a table is missing or damaged.
        """
        if manifest.events_end is not None:
            return ItemTotals(*load_item_counts(data_dir), end=manifest.events_end)
        names = ("user_idx", "item_idx", "timestamp", "label")
        columns = load_interactions(data_dir, names, include_sampled=False)
        return cls(*(columns[name] for name in names), num_users=manifest.num_users, num_items=manifest.num_items)

    def find_user_events(self, user_idx: int, as_of: int) -> tuple[IntArray, NDArray[np.int8]]:
        """Return items and labels of a user's events strictly before a time (seconds since 1970), oldest first.

        An unknown user (-1) has no events.
        """
        return self.find_user_rows(user_idx, as_of)[1:]

    def find_user_rows(self, user_idx: int, as_of: int) -> tuple[IntArray, IntArray, NDArray[np.int8]]:
        """Return times in seconds since 1970, items and labels; otherwise as ``find_user_events``."""
        first, last = (0, 0) if user_idx < 0 else (self._user_offsets[user_idx], self._user_offsets[user_idx + 1])
        last = first + np.searchsorted(self._times[first:last], as_of)
        return self._times[first:last], self._items[first:last], self._labels[first:last]

    def count_item_events(self, item_idx: IntArray, as_of: int) -> tuple[IntArray, IntArray]:
        """Return (N,) likes and (N,) events of items strictly before a time (seconds since 1970)."""
        elapsed = min(max(as_of - self._start, 0), self._span - 1)
        starts = self._item_starts[item_idx]
        ends = np.searchsorted(self._item_keys, item_idx * self._span + elapsed)
        return self._likes_before[ends] - self._likes_before[starts], ends - starts


class ItemTotals(EventLog):
    """Item counts of an export without users: likes and events of each item, after all events."""

    def __init__(self, likes: IntArray, rows: IntArray, *, end: int) -> None:
        """Store (I,) counts and the first second after all events."""
        nothing = np.zeros(0, dtype=np.int64)
        super().__init__(nothing, nothing, nothing, nothing.astype(np.int8), num_users=0, num_items=len(likes))
        self._likes, self._rows = likes, rows
        self.end = self.first_as_of = end

    def count_item_events(self, item_idx: IntArray, as_of: int) -> tuple[IntArray, IntArray]:
        """Return (N,) likes and (N,) events of items; ``as_of`` must not be before the end."""
        return self._likes[item_idx], self._rows[item_idx]
