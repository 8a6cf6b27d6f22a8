"""Similarity of item texts: cosines of TF-IDF vectors, and features that compare a target with earlier feedback.

Shapes: I items, V terms, N targets, P pairs of items, H history items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp  # type: ignore[import-untyped]  # comes with scikit-learn
from numpy.typing import NDArray

from collm_dist.cf.item_text import vectorize_texts
from collm_dist.data.prompts.ragged import Ragged
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.metrics import FloatArray

# Pairs whose vectors are in memory at once.
_PAIRS_AT_ONCE = 1 << 18
# Liked items that the largest similarity is taken over, and the weight of the last one in ``score_last_likes``.
RECENT, LAST_WEIGHT = 10, 0.3
# Weight, in items of equal text, of the prior in the share of likes among similar items.
_PRIOR = 0.5

TEXT_FEATURES: tuple[str, ...] = (
    "text_last_like",
    "text_max_like",
    "text_max_dislike",
    "text_log_likes",
    "text_log_dislikes",
    "text_log_odds",
)


class TextSimilarity:
    """TF-IDF vectors of all items, of unit length; terms are words and pairs of neighbouring words."""

    def __init__(self, vectors: sp.csr_matrix) -> None:
        """Store (I, V) vectors."""
        self.vectors = vectors

    @classmethod
    def fit(cls, texts: Sequence[str]) -> TextSimilarity:
        """Compute the vectors of (I,) item texts; items without words get zeros."""
        return cls(vectorize_texts(texts))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> TextSimilarity:
        """Build the vectors from the result of ``to_arrays``."""
        parts = (arrays["data"], arrays["indices"], arrays["indptr"])
        return cls(sp.csr_matrix(parts, shape=tuple(arrays["shape"].tolist())))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the vectors in compressed sparse rows, as arrays by name."""
        vectors = self.vectors
        arrays = {"data": vectors.data, "indices": vectors.indices, "indptr": vectors.indptr}
        return arrays | {"shape": np.array(vectors.shape)}

    def compare(self, items: IntArray, others: IntArray) -> NDArray[np.float32]:
        """Return the cosine of each pair of (P,) and (P,) dense items."""
        cosines = np.empty(len(items), dtype=np.float32)
        for first in range(0, len(items), _PAIRS_AT_ONCE):
            part = slice(first, first + _PAIRS_AT_ONCE)
            products = self.vectors[items[part]].multiply(self.vectors[others[part]])
            cosines[part] = np.asarray(products.sum(axis=1)).ravel()
        return cosines

    def compute_features(self, block: ContextBlock) -> FloatArray:
        """Return (N, 6) features of a block's targets, in the order of ``TEXT_FEATURES``.

        They compare the target with the stored likes and dislikes before the row: the last like, the most similar of
        the last ``RECENT`` likes, the most similar dislike, the log of one plus the summed similarity to likes and to
        dislikes, and the log-odds of a like among similar items.
        """
        likes, to_likes = self._compare_with_likes(block)
        dislikes = Ragged(block.dislike_offsets, block.dislike_items)
        to_dislikes = self.compare(block.item_idx[dislikes.rows], dislikes.values)
        recent = likes.columns >= (likes.lengths - RECENT)[likes.rows]
        liked = np.bincount(likes.rows, to_likes, block.num_targets)
        disliked = np.bincount(dislikes.rows, to_dislikes, block.num_targets)
        columns = [
            _take_last(likes, to_likes),
            _compute_max(likes, np.where(recent, to_likes, 0.0)),
            _compute_max(dislikes, to_dislikes),
            np.log1p(liked),
            np.log1p(disliked),
            np.log((liked + _PRIOR) / (disliked + _PRIOR)),
        ]
        return np.stack(columns, axis=1)

    def score_last_likes(self, block: ContextBlock) -> FloatArray:
        """Return (N,) scores: the largest similarity to the last ``RECENT`` likes, plus a share of that to the last."""
        likes, to_likes = self._compare_with_likes(block, RECENT)
        return _compute_max(likes, to_likes) + LAST_WEIGHT * _take_last(likes, to_likes)

    def _compare_with_likes(self, block: ContextBlock, count: int | None = None) -> tuple[Ragged, NDArray[np.float32]]:
        """Return the last likes before each target, and the target's similarity to each."""
        history = Ragged(block.history_offsets, block.history_items)
        if count is not None:
            history = history.take_last(np.full(block.num_contexts, count))
        likes = history.take(block.target_contexts)
        return likes, self.compare(block.item_idx[likes.rows], likes.values)


def _compute_max(rows: Ragged, values: NDArray[np.float32]) -> FloatArray:
    """Return the largest non-negative value of each row, 0 for an empty row."""
    largest = np.zeros(len(rows.lengths))
    np.maximum.at(largest, rows.rows, values)
    return largest


def _take_last(rows: Ragged, values: NDArray[np.float32]) -> FloatArray:
    """Return the last value of each row, 0 for an empty row."""
    last = np.zeros(len(rows.lengths))
    filled = rows.lengths > 0
    last[filled] = values[rows.offsets[1:][filled] - 1]
    return last
