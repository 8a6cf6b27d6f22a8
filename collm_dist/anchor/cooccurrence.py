"""Co-occurrence of items in users' likes, as of a time fold.

Shapes: F time folds, N targets, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.prompts.ragged import Ragged
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.metrics import FloatArray
from collm_dist.random_keys import hash_integers

# Two items co-occur if a user liked them within this many likes of each other.
WINDOW = 10
# Users are left out, by hash, beyond about this many likes: each stores up to WINDOW pairs of 8 bytes.
MAX_LIKES = 5_000_000


class Cooccurrence:
    """Counts of items and of pairs of items, by the fold in which the later of the two events happened.

    A key orders by item or pair, then by fold, so two binary searches count what happened before a fold.
    """

    def __init__(self, pair_keys: IntArray, item_keys: IntArray, num_items: int, num_folds: int) -> None:
        """Store sorted keys: ``(first * num_items + second) * num_folds + fold`` and ``item * num_folds + fold``."""
        self._pairs, self._items = pair_keys, item_keys
        self._num_items, self._num_folds = num_items, num_folds

    @classmethod
    def fit(cls, train: Mapping[str, NDArray[Any]], num_items: int, fold_starts: Sequence[int]) -> Cooccurrence:
        """Count the likes of the training rows.

        Args:
            train: user_idx, item_idx, label, sampled, timestamp of the training rows, each user's in time order.
            num_items: size of the item table.
            fold_starts: timestamps (seconds) at which folds 1, 2, ... begin.
        """
        # By all rows, not by likes: which users count must not depend on a label.
        share = min(1.0, MAX_LIKES / max(1, len(train["label"])))
        is_kept = (hash_integers(0, train["user_idx"]) >> np.uint64(11)) / 2**53 < share
        rows = np.flatnonzero((train["label"] == 1) & (train["sampled"] == 0) & is_kept)
        users, items = train["user_idx"][rows], train["item_idx"][rows].astype(np.int64)
        folds = np.searchsorted(np.asarray(fold_starts), train["timestamp"][rows], side="right")
        num_folds = len(fold_starts) + 1
        pairs = [np.zeros(0, dtype=np.int64)]
        for distance in range(1, min(WINDOW, len(items) - 1) + 1):
            same = users[:-distance] == users[distance:]
            first, second, fold = items[:-distance][same], items[distance:][same], folds[distance:][same]
            low, high = np.minimum(first, second), np.maximum(first, second)
            pairs.append((low * num_items + high) * num_folds + fold)
        return cls(np.sort(np.concatenate(pairs)), np.sort(items * num_folds + folds), num_items, num_folds)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Cooccurrence:
        """Build the table from the result of ``to_arrays``."""
        return cls(arrays["pairs"], arrays["items"], *arrays["sizes"].tolist())

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the counts as arrays by name."""
        sizes = np.array([self._num_items, self._num_folds])
        return {"pairs": self._pairs, "items": self._items, "sizes": sizes}

    def score(self, block: ContextBlock, folds: IntArray) -> FloatArray:
        """Return (N,) scores: the cosine-normalized co-occurrences of each target with the last likes, added up.

        Args:
            block: the targets.
            folds: (N,) fold of each target; only events of earlier folds count.
        """
        history = Ragged(block.history_offsets, block.history_items).take_last(np.full(block.num_contexts, WINDOW))
        likes = history.take(block.target_contexts)
        target, fold = block.item_idx[likes.rows], folds[likes.rows]
        low, high = np.minimum(target, likes.values), np.maximum(target, likes.values)
        together = self._count(self._pairs, low * self._num_items + high, fold)
        sizes = self._count(self._items, target, fold) * self._count(self._items, likes.values, fold)
        cosines = together / np.sqrt(np.maximum(sizes, 1))
        return np.bincount(likes.rows, cosines, block.num_targets).astype(np.float64)

    def _count(self, keys: IntArray, values: IntArray, folds: IntArray) -> IntArray:
        """Return the number of events of (K,) items or pairs before (K,) folds."""
        first = values * self._num_folds
        return np.searchsorted(keys, first + folds) - np.searchsorted(keys, first)
