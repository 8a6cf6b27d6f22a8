"""Baselines: hand-computed values, and reference figures on the released ML-1M split."""

import numpy as np
import pytest

from collm_dist.evaluation import baselines
from collm_dist.evaluation.baselines import fit_as_of_logistic, fit_baselines, fit_bias_logistic, fit_item_mean
from collm_dist.metrics import compute_auc, compute_uauc
from tests.unit.evaluation_data import build_block, needs_ml1m, read_ml1m


def _train(**columns):
    count = len(columns["label"])
    return {name: np.asarray(columns.get(name, np.zeros(count)), dtype=np.int64) for name in baselines.TRAIN_COLUMNS}


def test_item_mean_by_hand():
    train = _train(user_idx=[0, 0, 1, 1], item_idx=[0, 0, 0, 1], label=[1, 1, 1, 0])
    scores = fit_item_mean(train, num_items=3)(build_block([0, 0, 1], item_idx=[0, 1, 2]))
    prior = 3.5 / 5
    shares = np.array([(3 + 5 * prior) / 8, (0 + 5 * prior) / 6, prior])
    assert 1 / (1 + np.exp(-scores)) == pytest.approx(shares)


def test_unknown_users_and_items_get_the_intercept():
    random = np.random.default_rng(0)
    train = _train(user_idx=random.integers(0, 5, 200), item_idx=random.integers(0, 7, 200), label=[0, 1] * 100)
    score = fit_bias_logistic(train, num_users=6, num_items=9)
    unknown, known_user = score(build_block([5, 0], item_idx=[8, 8]))
    assert abs(unknown) < 0.2
    assert known_user != unknown


def test_one_label_in_training_gives_a_constant():
    train = _train(user_idx=[0, 1], item_idx=[0, 1], label=[1, 1])
    for baseline in fit_baselines(train, num_users=2, num_items=2):
        scores = baseline.score(build_block([0, 1], item_idx=[0, 1]))
        assert np.isfinite(scores).all(), baseline.name
        assert (scores > 0).all(), baseline.name


def test_as_of_logistic_reads_the_row_not_the_identity():
    train = _train(user_rows=[9, 9, 9, 9] * 20, user_likes=[9, 8, 1, 0] * 20, label=[1, 1, 0, 0] * 20)
    score = fit_as_of_logistic(train)
    scores = score(build_block([0, 0], user_rows=[9, 9], user_likes=[9, 0]))
    assert scores[0] > 0 > scores[1]


def test_only_the_latest_rows_are_fitted_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_FIT_ROWS", 4)
    train = _train(
        item_idx=[0, 0, 0, 0, 1, 1, 1, 1], label=[1, 1, 0, 0, 1, 1, 1, 0], timestamp=[5, 6, 7, 8, 1, 2, 3, 4]
    )
    scores = fit_bias_logistic(train, num_users=1, num_items=2)(build_block([0, 0], item_idx=[0, 1]))
    assert scores == pytest.approx([0.0, 0.0], abs=1e-5)


@needs_ml1m
def test_reference_figures_on_ml1m():
    """Reference figures come from independent code; the tolerance covers other solvers."""
    columns = read_ml1m()
    is_train, is_test = columns["split"] == "train", columns["split"] == "test"
    train = {name: columns[name][is_train] for name in baselines.TRAIN_COLUMNS}
    rows = {name: columns[name][is_test] for name in baselines.TRAIN_COLUMNS}
    assert (is_train.sum(), is_test.sum()) == (33891, 7331)
    reference = {
        "item_mean": (0.7094, 0.6816, 5e-5),
        "item_user_mean": (0.7317, 0.6816, 5e-5),
        "bias_logistic": (0.7371, 0.6804, 5e-4),
        "as_of_logistic": (0.7746, 0.6723, 2e-3),
    }
    block = build_block(rows.pop("user_idx"), **rows)
    for baseline in fit_baselines(train, 838, 3255):
        scores = baseline.score(block)
        auc, uauc, tolerance = reference[baseline.name]
        assert compute_auc(block.label, scores) == pytest.approx(auc, abs=tolerance), baseline.name
        assert compute_uauc(block.label, scores, block.user_idx) == (pytest.approx(uauc, abs=tolerance), 224)
