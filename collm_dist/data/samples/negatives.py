"""Sampled negatives for logs without ratings: a pure function of the seed and the positive row."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.samples.event_pool import EventPool
from collm_dist.data.shards.context_block import IntArray
from collm_dist.random_keys import hash_integers, to_unit_interval

MAX_ATTEMPTS = 32


class LikedItems:
    """Lookup of whether a user had liked an item at a given time."""

    def __init__(self, user_idx: IntArray, item_idx: IntArray, timestamps: IntArray, num_items: int) -> None:
        """Index (L,) likes by user and item, each pair with its earliest time."""
        self._num_items = num_items
        keys = user_idx * num_items + item_idx
        order = np.lexsort((timestamps, keys))
        self._keys, first = np.unique(keys[order], return_index=True)
        self._times = timestamps[order][first]

    def contains(self, user_idx: IntArray, item_idx: IntArray, timestamps: IntArray) -> NDArray[np.bool_]:
        """Return for each query whether the user had liked the item at or before the timestamp."""
        keys = user_idx * self._num_items + item_idx
        positions = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        liked: NDArray[np.bool_] = (self._keys[positions] == keys) & (self._times[positions] <= timestamps)
        return liked


def sample_negatives(
    *,
    user_idx: IntArray,
    timestamps: IntArray,
    row_ids: IntArray,
    counts: IntArray,
    liked: LikedItems,
    num_items: int,
    seed: int,
    method: Literal["uniform", "popularity"],
    pool: EventPool,
) -> tuple[IntArray, IntArray, IntArray]:
    """Draw negatives for (P,) positives.

    An item is excluded if the user liked it up to and including that second, or if it was already drawn for the same
    positive. A positive gets fewer negatives if ``MAX_ATTEMPTS`` draws yield only excluded items.

    Args:
        user_idx, timestamps, row_ids: of the positives.
        counts: (P,) negatives to draw per positive.
        liked: all likes of these users.
        num_items: number of items.
        seed: seed of the draws.
        method: uniform, or in proportion to earlier events in ``pool`` (uniform if there are no earlier events).
        pool: events to draw from by popularity.

    Returns:
        (M,) positions of the positives, (M,) drawn items, (M,) numbers of the draws within their positives.
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    slot = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    items = np.full(len(owner), -1, dtype=np.int64)
    for attempt in range(MAX_ATTEMPTS):
        open_slots = np.flatnonzero(items < 0)
        if len(open_slots) == 0:
            break
        positives = owner[open_slots]
        uniform = to_unit_interval(hash_integers(seed, row_ids[positives], slot[open_slots], attempt))
        drawn = (uniform * num_items).astype(np.int64)
        if method == "popularity":
            earlier = np.searchsorted(pool.timestamps, timestamps[positives], side="left")
            by_event = pool.item_idx[np.minimum((uniform * earlier).astype(np.int64), max(len(pool.item_idx) - 1, 0))]
            drawn = np.where(earlier > 0, by_event, drawn)
        items[open_slots] = np.where(liked.contains(user_idx[positives], drawn, timestamps[positives]), -1, drawn)
        _reopen_repeats(owner, slot, items, num_items)
    kept = items >= 0
    return owner[kept], items[kept], slot[kept]


def _reopen_repeats(owner: IntArray, slot: IntArray, items: IntArray, num_items: int) -> None:
    """Keep the first of several equal items of a positive, and reset the others to -1."""
    filled = np.flatnonzero(items >= 0)
    keys = owner[filled] * num_items + items[filled]
    order = np.lexsort((slot[filled], keys))
    repeated = np.zeros(len(order), dtype=bool)
    repeated[1:] = keys[order][1:] == keys[order][:-1]
    items[filled[order][repeated]] = -1
