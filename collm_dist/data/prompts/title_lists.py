"""Lists of titles in prompts: which items are shown, and their tokens.

Shapes: C contexts, N targets, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from collm_dist.data.prompts.ragged import Ragged, hash_rows, join_columns, repeat_values, to_offsets
from collm_dist.data.shards.context_block import ContextBlock, IntArray

DEFAULT_DISLIKED_LENGTH = 5


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


def list_titles(items: Ragged, titles: Ragged, separator: Sequence[int], empty: Sequence[int]) -> Ragged:
    """Return the tokens of (R rows) items: titles with separators, or ``empty`` for a row without items."""
    is_last = np.zeros(len(items.values), dtype=bool)
    is_last[items.offsets[1:][items.lengths > 0] - 1] = True
    parts = [titles.take(items.values), repeat_values(separator, ~is_last)]
    listed = join_columns(parts, len(items.values)).merge(items.offsets)
    return join_columns([listed, repeat_values(empty, items.lengths == 0)], len(items.lengths))


def take_last_dislikes(block: ContextBlock, length: int) -> Ragged:
    """Return (N rows) the last ``length`` dislikes before each target, oldest first."""
    dislikes = Ragged(block.dislike_offsets, block.dislike_items)
    return dislikes.take_last(np.full(block.num_targets, length))


def hash_dislikes(block: ContextBlock, length: int) -> IntArray:
    """Return (N,) keys that differ where the last ``length`` dislikes differ."""
    return hash_rows(take_last_dislikes(block, length)).view(np.int64)


def take_context_dislikes(block: ContextBlock, length: int) -> Ragged:
    """Return (C rows) the last ``length`` dislikes of each context, whose targets must agree; see ``cut_contexts``."""
    firsts = block.target_offsets[:-1]
    keys = hash_dislikes(block, length)
    assert (keys == keys[firsts][block.target_contexts]).all(), "cut contexts where the dislikes change"
    return take_last_dislikes(block, length).take(firsts)
