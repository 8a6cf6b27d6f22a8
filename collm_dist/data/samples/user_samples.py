"""From a user's rows to samples: what had happened strictly before each row. Vectorised over all users of a bucket.

Rows come sorted by (user, timestamp, row id). Nothing here looks at a row's own label or at a later row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray


def find_group_starts(*keys: IntArray) -> IntArray:
    """Return for each of (N,) sorted rows the position at which its group of equal keys starts."""
    changed = np.zeros(len(keys[0]), dtype=bool)
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    starts: IntArray = np.maximum.accumulate(np.where(changed, np.arange(len(changed)), 0))
    return starts


def count_before(flags: IntArray, groups: tuple[IntArray, ...], timestamps: IntArray) -> IntArray:
    """Return how many flagged rows of the same group stand strictly before each row's timestamp.

    Args:
        flags: (N,) 0/1.
        groups: keys that rows are grouped by; rows are sorted by them, then by timestamp.
        timestamps: (N,).
    """
    before = np.concatenate([[0], np.cumsum(flags)])
    counts: IntArray = before[find_group_starts(*groups, timestamps)] - before[find_group_starts(*groups)]
    return counts


def locate(ids: IntArray, wanted: IntArray) -> IntArray:
    """Return the position in ``ids`` (distinct, any order) of each wanted one; all of them are there."""
    order = np.argsort(ids)
    positions: IntArray = order[np.searchsorted(ids[order], wanted)]
    return positions


@dataclass(frozen=True)
class UserState:
    """What was known of the user before each of (N,) rows.

    Attributes:
        num_likes: (N,) likes so far under the ties rule; with the user it names the context.
        history_ends: (N,) one past the last history item in ``liked_items``; the history of a row is
            ``liked_items[history_ends - num_likes : history_ends]``.
        liked_items: (L,) liked items of all users, in order.
        user_likes, user_rows: (N,) real events strictly before the row's timestamp.
        dislike_counts, dislike_ends, disliked_items: the same as for likes, strictly before.
    """

    num_likes: IntArray
    history_ends: IntArray
    liked_items: IntArray
    user_likes: IntArray
    user_rows: IntArray
    dislike_counts: IntArray
    dislike_ends: IntArray
    disliked_items: IntArray


def compute_user_state(
    user_idx: IntArray,
    item_idx: IntArray,
    timestamps: IntArray,
    labels: NDArray[np.int8],
    sampled: NDArray[np.int8],
    row_ids: IntArray,
    group_ids: IntArray,
    ties: Literal["strict", "order"],
) -> UserState:
    """Compute the state of the user before each of (N,) rows sorted by user, timestamp and row id.

    Args:
        user_idx, item_idx, timestamps, labels: of the rows.
        sampled: 1 for sampled negatives; they are no events and count nowhere.
        row_ids: of the rows.
        group_ids: row id of the event that a row belongs to: its own, or that of the positive it was sampled for, whose
            state it shares. Its own place would be after the positive, which would then stand in its history.
        ties: whether rows of one timestamp count as earlier by their order, or not at all.
    """
    real = (1 - sampled).astype(np.int64)
    likes, dislikes = real * labels, real * (1 - labels)
    likes_before = np.concatenate([[0], np.cumsum(likes)])
    strict_starts, user_starts = find_group_starts(user_idx, timestamps), find_group_starts(user_idx)
    seen_until = locate(row_ids, group_ids) if ties == "order" else strict_starts
    dislikes_before = np.concatenate([[0], np.cumsum(dislikes)])
    return UserState(
        num_likes=likes_before[seen_until] - likes_before[user_starts],
        history_ends=likes_before[seen_until],
        liked_items=item_idx[likes == 1],
        user_likes=likes_before[strict_starts] - likes_before[user_starts],
        user_rows=count_before(real, (user_idx,), timestamps),
        dislike_counts=dislikes_before[strict_starts] - dislikes_before[user_starts],
        dislike_ends=dislikes_before[strict_starts],
        disliked_items=item_idx[dislikes == 1],
    )


def gather_last(items: IntArray, ends: IntArray, counts: IntArray, limit: int) -> tuple[IntArray, IntArray]:
    """Return offsets (N + 1,) and items of the last ``limit`` of each row's ``items[end - count : end]``."""
    lengths = np.minimum(counts, limit)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) + np.repeat(ends - lengths - offsets[:-1], lengths)
    return offsets, items[positions]
