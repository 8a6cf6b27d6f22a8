"""Pair features: fixed formulas of counts before a row."""

from dataclasses import replace

import numpy as np
import pytest

from collm_dist.data.samples.pair_features import (
    ITEM_PRIOR_WEIGHT,
    PAIR_FEATURES,
    USER_PRIOR_WEIGHT,
    compute_log_odds,
    compute_pair_features,
)
from collm_dist.metrics import compute_auc, compute_uauc
from tests.unit.evaluation_data import build_block, needs_ml1m, read_ml1m


def test_formulas():
    block = build_block([0, 0, 1], item_idx=[0, 1, 1], label=[1, 0, 1])
    block = replace(
        block,
        user_likes=np.array([0, 10, 0]),
        user_rows=np.array([0, 10, 40]),
        item_likes=np.array([5, 0, 0]),
        item_rows=np.array([10, 0, 0]),
    )
    features = compute_pair_features(block)
    assert features.shape == (3, len(PAIR_FEATURES))
    assert features.dtype == np.float32
    named = dict(zip(PAIR_FEATURES, features.T, strict=True))
    assert named["user_log_odds"] == pytest.approx([0, np.log(15 / 5), np.log(5 / 45)])
    assert named["item_log_odds"] == pytest.approx([0, 0, 0])
    assert named["sum_log_odds"] == pytest.approx(named["user_log_odds"] + named["item_log_odds"])
    assert named["user_log_rows"] == pytest.approx(np.log1p([0, 10, 40]) / 4)
    assert named["user_unknown"].tolist() == [1, 0, 0]
    assert named["item_unknown"].tolist() == [0, 1, 1]


def test_labels_are_not_read():
    block = build_block([0, 0, 1], item_idx=[0, 1, 1], label=[1, 0, 1])
    flipped = replace(block, label=1 - block.label)
    assert np.array_equal(compute_pair_features(block), compute_pair_features(flipped))


def test_large_counts_stay_moderate():
    """Features have similar magnitudes for small and large logs."""
    assert abs(compute_log_odds(np.array([0, 10**9]), np.array([10**9, 10**9]), 5.0)).max() < 25
    assert np.log1p(10**9) / 4 < 6


@needs_ml1m
def test_the_formula_alone_ranks_like_a_fitted_logistic():
    """The as-of logistic has .775 / .672 on these rows; measured for the formula: .7750 / .6697."""
    rows = read_ml1m()
    user = compute_log_odds(rows["user_likes"], rows["user_rows"], USER_PRIOR_WEIGHT)
    item = compute_log_odds(rows["item_likes"], rows["item_rows"], ITEM_PRIOR_WEIGHT)
    test = rows["split"] == "test"
    labels, scores = rows["label"][test], (user + item)[test]
    assert compute_auc(labels, scores) == pytest.approx(0.775, abs=0.001)
    assert compute_uauc(labels, scores, rows["user_idx"][test])[0] == pytest.approx(0.670, abs=0.001)
