"""Fresh events beside a run's log: a user's own events, and everyone's counts of items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray
from collm_dist.serving.event_store import Changes, Ranges

Duplicates = Literal["keep", "first", "collapse"]
UserEvents = tuple[IntArray, IntArray, NDArray[np.int8]]


class EventSource(Protocol):
    """Access to an ``EventStore``, possibly in another process."""

    def read(self, users: Iterable[str], since: int = 0, ranges: Ranges = ()) -> Changes:
        """See ``EventStore.read``."""
        ...

    def count_items(self, items: Iterable[str], before: int, ranges: Ranges = ()) -> dict[str, tuple[int, int]]:
        """See ``EventStore.count_items``."""
        ...

    def find_ranges(self, names: Iterable[str]) -> Ranges:
        """See ``EventStore.find_ranges``."""
        ...


class FreshEvents:
    """The events of a store that a run's log does not hold, as this run's items.

    Events of items that the run does not know are left out: they have neither title nor vector. Memory: two numbers per
    item of the run, and the events of the users of one call. It is not thread-safe.

    Attributes:
        end: first second after all fresh events.
    """

    def __init__(
        self, source: EventSource, item_ids: list[str], item_index: Mapping[str, int], *,
        read_parts: Iterable[str], duplicates: Duplicates,
        forget: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Store the run's item table, and find which parts of the store its log holds.

        Args:
            source: the store.
            item_ids, item_index: raw ids in the order of their indices, and the index of each.
            read_parts: names of the parts that the run has read.
            duplicates: ``dataset.duplicates``; with ``first`` and ``collapse`` a user's repeated events count once in
                the user's own history. Counts of items have all of them.
            forget: called when users have been forgotten since the last reading.
        """
        self._source, self._item_ids, self._item_index = source, item_ids, item_index
        self._duplicates, self._ranges = duplicates, source.find_ranges(read_parts)
        self._likes, self._rows = np.zeros((2, len(item_ids)), np.int64)
        self._users: dict[str, UserEvents] | None = None
        self._forget, self._last, self._forgotten = forget, 0, 0
        self.end = -(2**62)

    @contextmanager
    def reading(self, users: Iterable[str]) -> Iterator[None]:
        """Read the users' events and all new counts of items; both stay as they are during the block."""
        if self._users is not None:  # within another block
            yield
            return
        while True:
            changes = self._source.read(users, self._last, self._ranges)
            for item, (likes, rows) in changes.items.items():
                if (index := self._item_index.get(item)) is not None:
                    self._likes[index] += likes
                    self._rows[index] += rows
            self._last, self.end = changes.last, max(self.end, changes.end)
            if changes.forgotten != self._forgotten:
                self._forgotten = changes.forgotten
                self._forget()
            if changes.is_complete:
                break
        self._users = {user: self._to_arrays(rows) for user, rows in changes.users.items()}
        try:
            yield
        finally:
            self._users = None

    def _to_arrays(self, rows: list[tuple[str, int, int]]) -> UserEvents:
        known = [(self._item_index[item], time, label) for item, time, label in rows if item in self._item_index]
        items, times, labels = np.array(known, np.int64).reshape(-1, 3).T
        return times, items, labels.astype(np.int8)

    def has_events(self, user: str) -> bool:
        """Return whether a user, one of those of ``reading``, has events of items that the run knows."""
        return self._users is not None and user in self._users and len(self._users[user][0]) > 0

    def add_user_events(self, user: str, as_of: int, logged: UserEvents) -> UserEvents:
        """Return times, items and labels of a user's logged and fresh events before a time, oldest first.

        Args:
            user: raw id; the events of others than those of ``reading`` are not known here.
            as_of: seconds since 1970.
            logged: the same of the log, before ``as_of``.
        """
        assert self._users is not None, "read within a block"
        if user not in self._users:
            return logged
        times, items, labels = self._users[user]
        count = int(np.searchsorted(times, as_of))
        if count == 0:
            return logged
        times = np.concatenate([logged[0], times[:count]])
        items = np.concatenate([logged[1], items[:count]])
        labels = np.concatenate([logged[2], labels[:count]])
        order = np.argsort(times, kind="stable")
        times, items, labels = times[order], items[order], labels[order]
        if self._duplicates == "keep":
            return times, items, labels
        _, firsts, groups = np.unique(items, return_index=True, return_inverse=True)
        if self._duplicates == "collapse":
            liked = np.zeros(len(firsts), np.int8)
            np.maximum.at(liked, groups, labels)
            labels = liked[groups]
        firsts.sort()
        return times[firsts], items[firsts], labels[firsts]

    def count_item_events(self, item_idx: IntArray, as_of: int) -> tuple[IntArray, IntArray]:
        """Return (N,) likes and (N,) events of items strictly before a time (seconds since 1970)."""
        if as_of >= self.end:
            return self._likes[item_idx], self._rows[item_idx]
        fresh = item_idx[self._rows[item_idx] > 0]
        counts = self._source.count_items([self._item_ids[index] for index in fresh], as_of, self._ranges)
        found = np.array([counts.get(self._item_ids[index], (0, 0)) for index in item_idx], np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]
