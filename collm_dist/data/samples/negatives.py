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
    """Answers whether users had liked items by some moment."""

    def __init__(self, user_idx: IntArray, item_idx: IntArray, timestamps: IntArray, num_items: int) -> None:
        """Index (L,) likes by user and item, with the earliest time of each."""
        self._num_items = num_items
        keys = user_idx * num_items + item_idx
        order = np.lexsort((timestamps, keys))
        self._keys, first = np.unique(keys[order], return_index=True)
        self._times = timestamps[order][first]

    def contains(self, user_idx: IntArray, item_idx: IntArray, timestamps: IntArray) -> NDArray[np.bool_]:
        """Return for each query whether the user had liked the item at or before the timestamp."""
        keys = user_idx * self._num_items + item_idx
        found = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        liked: NDArray[np.bool_] = (self._keys[found] == keys) & (self._times[found] <= timestamps)
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

    Never an item that the user has liked by then (or at that very second), never one twice for a positive. Where so
    many items are liked that none is found in ``MAX_ATTEMPTS`` draws, a positive gets fewer.

    Args:
        user_idx, timestamps, row_ids: of the positives.
        counts: (P,) how many each shall get.
        liked: all likes of these users.
        num_items: items to draw from.
        seed: of the draws.
        method: uniform, or in proportion to earlier events in ``pool`` (uniform where there are none).
        pool: see ``EventPool``.

    Returns:
        (M,) position of the positive, (M,) drawn item, (M,) number of the draw within its positive.
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    slot = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    items = np.full(len(owner), -1, dtype=np.int64)
    for attempt in range(MAX_ATTEMPTS):
        open_slots = np.flatnonzero(items < 0)
        if len(open_slots) == 0:
            break
        who = owner[open_slots]
        uniform = to_unit_interval(hash_integers(seed, row_ids[who], slot[open_slots], attempt))
        drawn = (uniform * num_items).astype(np.int64)
        if method == "popularity":
            earlier = np.searchsorted(pool.timestamps, timestamps[who], side="left")
            by_event = pool.item_idx[np.minimum((uniform * earlier).astype(np.int64), max(len(pool.item_idx) - 1, 0))]
            drawn = np.where(earlier > 0, by_event, drawn)
        items[open_slots] = np.where(liked.contains(user_idx[who], drawn, timestamps[who]), -1, drawn)
        _reopen_repeats(owner, slot, items, num_items)
    kept = items >= 0
    return owner[kept], items[kept], slot[kept]


def _reopen_repeats(owner: IntArray, slot: IntArray, items: IntArray, num_items: int) -> None:
    """Of equal items of one positive keep the first slot's; open the others again."""
    filled = np.flatnonzero(items >= 0)
    keys = owner[filled] * num_items + items[filled]
    order = np.lexsort((slot[filled], keys))
    repeated = np.zeros(len(order), dtype=bool)
    repeated[1:] = keys[order][1:] == keys[order][:-1]
    items[filled[order][repeated]] = -1
