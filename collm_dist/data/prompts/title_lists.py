"""Lists of titles in prompts: which items are shown, and their tokens.

Shapes: C contexts, N targets, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from collm_dist.data.prompts.ragged import Ragged, hash_rows, join_columns, repeat_values, to_offsets
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.random_keys import hash_integers

DEFAULT_DISLIKED_LENGTH, DEFAULT_RATED_LENGTH = 5, 10
DEFAULT_RATED_MARKS = (" (liked)", " (disliked)")


def take_newest(items: Ragged, cost: IntArray, budget: IntArray) -> tuple[Ragged, int]:
    """Return the newest items that fit, and the number of items dropped.

    Args:
        items: (R rows) items, oldest first.
        cost: tokens of each item.
        budget: (R,) most tokens of each row.
    """
    totals = to_offsets(cost)
    newer = totals[items.offsets[1:]][items.rows] - totals[:-1]
    kept = np.bincount(items.rows[newer <= budget[items.rows]], minlength=len(budget))
    return items.take_last(kept), len(items.values) - int(kept.sum())


def list_entries(items: Ragged, entries: Ragged, separator: Sequence[int], empty: Sequence[int]) -> Ragged:
    """Return the tokens of (R rows) items: entries with separators, or ``empty`` for a row without items.

    Args:
        items: (R rows) items.
        entries: tokens of each item.
        separator, empty: tokens.
    """
    is_last = np.zeros(len(items.values), dtype=bool)
    is_last[items.offsets[1:][items.lengths > 0] - 1] = True
    listed = join_columns([entries, repeat_values(separator, ~is_last)], len(items.values)).merge(items.offsets)
    return join_columns([listed, repeat_values(empty, items.lengths == 0)], len(items.lengths))


def take_last_dislikes(block: ContextBlock, length: int) -> Ragged:
    """Return (N rows) the last ``length`` dislikes before each target, oldest first."""
    dislikes = Ragged(block.dislike_offsets, block.dislike_items)
    return dislikes.take_last(np.full(block.num_targets, length))


def hash_dislikes(block: ContextBlock, length: int) -> IntArray:
    """Return (N,) keys that differ where the last ``length`` dislikes differ."""
    return hash_rows(take_last_dislikes(block, length)).view(np.int64)


def hash_ratings(block: ContextBlock, length: int) -> IntArray:
    """Return (N,) keys that differ where the last ``length`` rated items of a context's targets differ."""
    return hash_integers(0, hash_dislikes(block, length), hash_rows(_take_last_places(block, length))).view(np.int64)


def take_context_dislikes(block: ContextBlock, length: int) -> Ragged:
    """Return (C rows) the last ``length`` dislikes of each context, whose targets must agree; see ``cut_contexts``."""
    _check_agreement(block, hash_dislikes(block, length))
    return take_last_dislikes(block, length).take(block.target_offsets[:-1])


def take_context_ratings(block: ContextBlock, length: int) -> Ragged:
    """Return (C rows) the last ``length`` liked and disliked items of each context, oldest first.

    A value is twice the item, plus 1 if it was liked. The targets of a context must agree; see ``cut_contexts``.
    """
    _check_agreement(block, hash_ratings(block, length))
    firsts, contexts = block.target_offsets[:-1], block.num_contexts
    likes = Ragged(block.history_offsets, block.history_items).take_last(np.full(contexts, length))
    dislikes, places = (
        taken.take(firsts) for taken in (take_last_dislikes(block, length), _take_last_places(block, length))
    )
    # In half likes before the context: after its like number n from the end is half a like later than that like.
    since = np.concatenate([2 * (likes.lengths[likes.rows] - 1 - likes.columns), 2 * places.values - 1])
    rows = np.concatenate([likes.rows, dislikes.rows])
    order = np.lexsort((-since, rows))  # keeps the order of dislikes between two likes
    values = np.concatenate([2 * likes.values + 1, 2 * dislikes.values])[order]
    both = Ragged(to_offsets(np.bincount(rows, minlength=contexts)), values)
    return both.take_last(np.full(contexts, length))


def _take_last_places(block: ContextBlock, length: int) -> Ragged:
    """Return (N rows) the likes since each of the last ``length`` dislikes."""
    assert block.likes_since is not None, "a prompt with rated titles needs shards with the order of dislikes"
    return Ragged(block.dislike_offsets, block.likes_since).take_last(np.full(block.num_targets, length))


def _check_agreement(block: ContextBlock, keys: IntArray) -> None:
    firsts = block.target_offsets[:-1]
    assert (keys == keys[firsts][block.target_contexts]).all(), "cut contexts where the dislikes change"
