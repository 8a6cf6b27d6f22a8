"""AUC, UAUC, log-loss, NDCG@k and hit rate@k. Exact with ties, vectorised over users and groups.

No metric depends on the order of rows with equal scores: AUC counts a tied pair as one half; NDCG and hit rate are
expected values over all orders of the tied rows. An undefined metric is None, never NaN.

Shapes: N rows, G groups (users or candidate lists).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class GroupValues:
    """Values of a metric in the groups that define it.

    Attributes:
        groups: (G,) groups, ascending.
        values: (G,) values.
    """

    groups: IntArray
    values: FloatArray

    def compute_mean(self) -> float | None:
        """Return the unweighted mean over the groups, None without groups."""
        return float(self.values.mean()) if len(self.values) else None


@dataclass(frozen=True)
class _Sorted:
    """Rows sorted by group, then by score.

    Attributes:
        order: (N,) row at each sorted position.
        groups: (G,) distinct groups.
        group: (N,) position in ``groups`` of each sorted row.
        start: (G,) first sorted position of each group.
        first, size: (N,) for the run of rows with the same group and score: its first position within the group, and
            its length.
    """

    order: IntArray
    groups: IntArray
    group: IntArray
    start: IntArray
    first: IntArray
    size: IntArray


def _check_rows(labels: ArrayLike, scores: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return both as float64 vectors, or raise ValueError, see ``compute_group_auc``."""
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"labels {y.shape} and scores {s.shape} must be vectors of the same length")
    if not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    if not np.isfinite(s).all():
        raise ValueError(f"{int((~np.isfinite(s)).sum())} of {len(s)} scores are not finite")
    return y, s


def _sort_rows(groups: ArrayLike, scores: FloatArray) -> _Sorted:
    """Sort by (group, score ascending) and find the runs of equal scores."""
    keys = np.asarray(groups, dtype=np.int64)
    order = np.lexsort((scores, keys))
    sorted_keys, sorted_scores = keys[order], scores[order]
    new_group = np.diff(sorted_keys, prepend=sorted_keys[:1] - 1) != 0
    new_run = new_group | (np.diff(sorted_scores, prepend=np.nan) != 0)
    start, run_start = np.flatnonzero(new_group), np.flatnonzero(new_run)
    group = np.cumsum(new_group) - 1
    run = np.cumsum(new_run) - 1
    run_size = np.diff(run_start, append=len(order))
    return _Sorted(order, sorted_keys[start], group, start, run_start[run] - start[group], run_size[run])


def compute_group_auc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> GroupValues:
    """Return the AUC within each group that has both labels.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) finite, higher = more likely a like.
        groups: (N,) integers, such as dense users.

    Raises:
        ValueError: a label is not 0 or 1, a score is not finite, or the lengths differ.
    """
    y, s = _check_rows(labels, scores)
    rows = _sort_rows(groups, s)
    positive, num_groups = y[rows.order], len(rows.groups)
    average_rank = rows.first + (rows.size + 1) / 2  # from 1
    positives = np.bincount(rows.group, positive, num_groups)
    negatives = np.bincount(rows.group, 1 - positive, num_groups)
    rank_sum = np.bincount(rows.group, average_rank * positive, num_groups)
    has_both = (positives > 0) & (negatives > 0)
    p, n = positives[has_both], negatives[has_both]
    return GroupValues(rows.groups[has_both], (rank_sum[has_both] - p * (p + 1) / 2) / (p * n))


def compute_auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Return the area under the ROC curve; None if only one label occurs.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) finite.

    Raises:
        ValueError: as for ``compute_group_auc``.
    """
    return compute_group_auc(labels, scores, np.zeros(np.shape(labels), dtype=np.int64)).compute_mean()


def compute_uauc(labels: ArrayLike, scores: ArrayLike, users: ArrayLike) -> tuple[float | None, int]:
    """Return the unweighted mean AUC over users with both labels, and the number of these users.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) finite.
        users: (N,) integer user of each row.

    Returns:
        (None, 0) if no user has both labels.

    Raises:
        ValueError: as for ``compute_group_auc``.
    """
    by_user = compute_group_auc(labels, scores, users)
    return by_user.compute_mean(), len(by_user.groups)


def compute_logloss(labels: ArrayLike, logits: ArrayLike) -> float | None:
    """Return the mean binary cross-entropy in nats, from logits; None without rows.

    Raises:
        ValueError: as for ``compute_group_auc``.
    """
    y, s = _check_rows(labels, logits)
    return float((np.logaddexp(0.0, s) - y * s).mean()) if len(y) else None


def _sort_candidates(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> tuple[_Sorted, FloatArray]:
    """Return the rows sorted best first within each group, and their labels."""
    y, s = _check_rows(labels, scores)
    rows = _sort_rows(groups, -s)
    return rows, y[rows.order]


def compute_group_ndcg(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int) -> GroupValues:
    """Return NDCG@k with binary relevance for each candidate list that has a positive.

    Gain 1, discount 1 / log2(rank + 1). Each tied row gets the mean discount of the ranks that the tie covers: the
    expected value over all orders (McSherry and Najork, ECIR 2008).

    Args:
        labels: (N,) 1 = positive; a list may have several.
        scores: (N,) finite.
        groups: (N,) candidate list of each row.
        k: cutoff, at least 1.

    Raises:
        ValueError: as for ``compute_group_auc``.
    """
    rows, positive = _sort_candidates(labels, scores, groups)
    longest = int((rows.first + rows.size).max(initial=0))
    discounts = 1 / np.log2(np.arange(longest) + 2)
    discounts[k:] = 0
    total = np.concatenate(([0.0], np.cumsum(discounts)))  # total[r]: discounts of the first r ranks
    expected = (total[rows.first + rows.size] - total[rows.first]) / rows.size
    dcg = np.bincount(rows.group, expected * positive, len(rows.groups))
    positives = np.bincount(rows.group, positive, len(rows.groups)).astype(np.int64)
    has_positive = positives > 0
    return GroupValues(rows.groups[has_positive], dcg[has_positive] / total[positives[has_positive]])


def compute_group_hits(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int) -> GroupValues:
    """Return, for each candidate list with a positive, the probability of a positive in the first k ranks.

    It is 0 or 1 unless a tie crosses rank k; then it is the share of the tie's orders that place a positive in the
    first k ranks.

    Arguments and errors as for ``compute_group_ndcg``.
    """
    rows, positive = _sort_candidates(labels, scores, groups)
    num_groups = len(rows.groups)
    is_first = np.zeros(len(positive), dtype=bool)
    is_first[np.unique(rows.start[rows.group] + rows.first)] = True
    run = np.cumsum(is_first) - 1
    run_group, first, size = rows.group[is_first], rows.first[is_first], rows.size[is_first]
    misses = size - np.bincount(run, positive, len(size)).astype(np.int64)
    drawn = np.clip(k - first, 0, size)  # ranks of the run within the first k
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, size.max(initial=0) + 1)))))
    # P(no positive among `drawn` of `size`) = C(misses, drawn) / C(size, drawn)
    log_none = (
        log_factorial[misses]
        - log_factorial[np.maximum(misses - drawn, 0)]
        - log_factorial[size]
        + log_factorial[size - drawn]
    )
    none = np.where(drawn > misses, 0.0, np.where(misses == size, 1.0, np.exp(log_none)))
    all_missed = np.ones(num_groups)
    np.multiply.at(all_missed, run_group, none)
    has_positive = np.bincount(rows.group, positive, num_groups) > 0
    return GroupValues(rows.groups[has_positive], 1 - all_missed[has_positive])


def compute_ndcg(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int) -> float | None:
    """Return the mean NDCG@k over candidate lists with a positive; None without any. See ``compute_group_ndcg``."""
    return compute_group_ndcg(labels, scores, groups, k).compute_mean()


def compute_hit_rate(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int) -> float | None:
    """Return the mean hit rate@k over candidate lists with a positive; None without any. See ``compute_group_hits``."""
    return compute_group_hits(labels, scores, groups, k).compute_mean()
