"""State of the user before each row, vectorized over all users of a bucket.

Rows are sorted by (user, timestamp, row id). No result depends on a row's own label or on a later row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray


def find_group_starts(*keys: IntArray) -> IntArray:
    """Return for each of (N,) sorted rows the position where its group of equal keys starts."""
    changed = np.zeros(len(keys[0]), dtype=bool)
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    starts: IntArray = np.maximum.accumulate(np.where(changed, np.arange(len(changed)), 0))
    return starts


def count_before(flags: IntArray, groups: tuple[IntArray, ...], timestamps: IntArray) -> IntArray:
    """Count the flagged rows of the same group strictly before each row's timestamp.

    Args:
        flags: (N,) 0 or 1.
        groups: (N,) keys of the groups; rows are sorted by them, then by timestamp.
        timestamps: (N,) seconds since 1970.
    """
    before = np.concatenate([[0], np.cumsum(flags)])
    counts: IntArray = before[find_group_starts(*groups, timestamps)] - before[find_group_starts(*groups)]
    return counts


def locate(ids: IntArray, queries: IntArray) -> IntArray:
    """Return the position of each query in ``ids``, which are distinct, unsorted, and contain all queries."""
    order = np.argsort(ids)
    positions: IntArray = order[np.searchsorted(ids[order], queries)]
    return positions


@dataclass(frozen=True)
class UserState:
    """State of the user before each of (N,) rows.

    Attributes:
        num_likes: (N,) likes so far under the ties rule; user and num_likes identify the context.
        history_ends: (N,) one past the last history item in ``liked_items``; the history of a row is
            ``liked_items[history_ends - num_likes : history_ends]``.
        liked_items: (L,) liked items of all users, in order.
        user_likes, user_rows: (N,) real events strictly before the row's timestamp.
        dislike_counts, dislike_ends, disliked_items: the same for dislikes, strictly before the timestamp.
        disliked_likes: for each of ``disliked_items``, likes of the user before it, by time and row id.
    """

    num_likes: IntArray
    history_ends: IntArray
    liked_items: IntArray
    user_likes: IntArray
    user_rows: IntArray
    dislike_counts: IntArray
    dislike_ends: IntArray
    disliked_items: IntArray
    disliked_likes: IntArray


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
        user_idx, item_idx, timestamps, labels: (N,) columns of the rows.
        sampled: (N,) 1 for sampled negatives, which are not events and count nowhere.
        row_ids: (N,) ids of the rows.
        group_ids: (N,) row id of the row itself, or of the positive that a negative was sampled for. A negative has the
            state of its positive; at its own position, the positive would be part of its history.
        ties: whether earlier rows with the same timestamp count (order) or not (strict).
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
        disliked_likes=(likes_before[:-1] - likes_before[user_starts])[dislikes == 1],
    )


def gather_last(items: IntArray, ends: IntArray, counts: IntArray, limit: int) -> tuple[IntArray, IntArray]:
    """Return (N + 1,) offsets and the last ``limit`` items of each row's ``items[end - count : end]``."""
    lengths = np.minimum(counts, limit)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) + np.repeat(ends - lengths - offsets[:-1], lengths)
    return offsets, items[positions]
