"""Baselines for implicit feedback, which rank a like among sampled candidates: popularity and co-occurrence.

Both count only real events, never sampled negatives.
"""

from __future__ import annotations

import numpy as np

from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.evaluation.baselines import Baseline, Columns, Scorer
from collm_dist.metrics import FloatArray

# An item counts as liked after another one if it is among the user's next FOLLOWERS likes.
FOLLOWERS = 5


def score_popularity(block: ContextBlock) -> FloatArray:
    """Return the log of one plus the item's likes so far; needs no fitting."""
    return np.log1p(block.item_likes.astype(np.float64))


def fit_last_item_cooccurrence(train: Columns, num_items: int) -> Scorer:
    """Return a scorer: how often training users liked the item after the user's last liked item.

    Equal counts (most are 0) are ordered by popularity, which adds less than half a count.

    Args:
        train: user_idx, item_idx, label, sampled of the training rows, each user's rows in time order.
        num_items: size of the item table.
    """
    is_like = (train["label"] == 1) & (train["sampled"] == 0)
    users, items = train["user_idx"][is_like], train["item_idx"][is_like].astype(np.int64)
    pairs = [
        (items[:-distance] * num_items + items[distance:])[users[:-distance] == users[distance:]]
        for distance in range(1, min(FOLLOWERS, len(items) - 1) + 1)
    ]
    known, counts = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *pairs]), return_counts=True)

    def score(block: ContextBlock) -> FloatArray:
        last = find_last_liked(block)[block.target_contexts]
        popularity = np.log1p(block.item_likes)
        tie_break = popularity / (2 * popularity.max(initial=0) + 1)
        if not len(known):
            return np.asarray(tie_break, dtype=np.float64)
        pair = np.where(last >= 0, last * num_items + block.item_idx, -1)
        place = np.minimum(np.searchsorted(known, pair), len(known) - 1)
        return np.asarray(np.where(known[place] == pair, counts[place], 0) + tie_break, dtype=np.float64)

    return score


def find_last_liked(block: ContextBlock) -> IntArray:
    """Return the (C,) last liked item of each context, -1 without history."""
    lengths = np.diff(block.history_offsets)
    last = np.full(block.num_contexts, -1, dtype=np.int64)
    last[lengths > 0] = block.history_items[block.history_offsets[1:][lengths > 0] - 1]
    return last


def fit_ranking_baselines(train: Columns, num_items: int) -> list[Baseline]:
    """Fit all baselines for implicit feedback; arguments as for ``fit_last_item_cooccurrence``."""
    cooccurrence = fit_last_item_cooccurrence(train, num_items)
    return [
        Baseline("popularity", "likes", "all earlier likes", score_popularity, has_logits=False),
        Baseline("last_item_cooccurrence", "likes", "all earlier likes", cooccurrence, has_logits=False),
    ]
