"""Metrics: parity with scikit-learn, brute force and hand-computed values."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from collm_dist.metrics import (
    compute_auc,
    compute_group_auc,
    compute_hit_rate,
    compute_logloss,
    compute_ndcg,
    compute_uauc,
)

ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=60)


def test_auc_by_hand():
    assert compute_auc([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4]) == 0.75
    assert compute_auc([0, 1], [0.5, 0.5]) == 0.5
    assert compute_auc([0, 1, 1], [2, 2, 1]) == 0.25


def test_auc_of_a_single_label_or_no_rows_is_none():
    assert compute_auc([1, 1], [0.1, 0.2]) is None
    assert compute_auc([], []) is None
    assert compute_uauc([1, 0], [0.1, 0.2], [3, 4]) == (None, 0)
    assert compute_logloss([], []) is None
    assert compute_ndcg([0, 0], [1, 2], [0, 0], 2) is None


@pytest.mark.parametrize(
    "labels, scores", [([0, 2], [1, 2]), ([0, 1], [1, math.nan]), ([0, 1], [1, math.inf]), ([0, 1], [1, 2, 3])]
)
def test_wrong_rows_are_refused(labels, scores):
    with pytest.raises(ValueError, match=r"labels|finite"):
        compute_auc(labels, scores)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_auc_and_uauc_equal_scikit_learn(rows):
    labels, scores, users = (np.array(column) for column in zip(*rows, strict=True))
    if 0 < labels.sum() < len(labels):
        assert compute_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = {
        user: roc_auc_score(labels[users == user], scores[users == user])
        for user in np.unique(users)
        if 0 < labels[users == user].mean() < 1
    }
    by_user = compute_group_auc(labels, scores, users)
    assert by_user.groups.tolist() == list(expected)
    assert by_user.values == pytest.approx(list(expected.values()), abs=1e-12)
    value, num_users = compute_uauc(labels, scores, users)
    assert num_users == len(expected)
    assert value == (pytest.approx(np.mean(list(expected.values())), abs=1e-12) if expected else None)


def test_logloss_equals_scikit_learn_and_survives_extreme_logits():
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 2, 200), random.normal(size=200) * 3
    assert compute_logloss(labels, logits) == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits))), rel=1e-12)
    assert compute_logloss([1, 0], [1000.0, 1000.0]) == 500.0


def _rank_by_hand(labels, scores, k):
    """Return expected NDCG@k and hit rate of one list by enumerating all orders."""
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, sum(labels))))
    ndcg, hits = [], []
    for order in itertools.permutations(range(len(labels))):
        ranked = [scores[row] for row in order]
        if ranked == sorted(scores, reverse=True):
            ndcg.append(sum(labels[row] / math.log2(rank + 2) for rank, row in enumerate(order[:k])) / ideal)
            hits.append(any(labels[row] for row in order[:k]))
    return np.mean(ndcg), np.mean(hits)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 7),
)
def test_ranking_equals_all_orders_of_ties(lists, k):
    labels = [label for rows in lists for label, _ in rows]
    scores = [score for rows in lists for _, score in rows]
    groups = [group for group, rows in enumerate(lists) for _ in rows]
    by_hand = [_rank_by_hand(*zip(*rows, strict=True), k) for rows in lists if any(label for label, _ in rows)]
    if not by_hand:
        assert compute_ndcg(labels, scores, groups, k) is None
        assert compute_hit_rate(labels, scores, groups, k) is None
        return
    assert compute_ndcg(labels, scores, groups, k) == pytest.approx(np.mean([a for a, _ in by_hand]), abs=1e-9)
    assert compute_hit_rate(labels, scores, groups, k) == pytest.approx(np.mean([b for _, b in by_hand]), abs=1e-9)


def test_ranking_does_not_depend_on_the_order_of_rows():
    random = np.random.default_rng(1)
    labels, scores, groups = random.integers(0, 2, 90), random.integers(0, 4, 90), random.integers(0, 9, 90)
    shuffled = random.permutation(90)
    for metric in (compute_ndcg, compute_hit_rate):
        there, here = metric(labels, scores, groups, 3), metric(labels[shuffled], scores[shuffled], groups[shuffled], 3)
        assert here == pytest.approx(there, abs=1e-12)
