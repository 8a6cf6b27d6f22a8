"""Bootstrap: parity with a plain loop that repeats users, coverage, and speed at the size of ML-1M."""

import time

import numpy as np
import pytest

from collm_dist.evaluation.bootstrap import (
    MIN_USERS,
    build_auc_statistic,
    build_mean_statistic,
    compute_interval,
    compute_samples,
)
from collm_dist.metrics import compute_auc, compute_group_auc


def _rows(random, num_users=30, num_rows=200, levels=7):
    users = random.integers(0, num_users, num_rows)
    labels = random.integers(0, 2, num_rows)
    scores = random.integers(0, levels, num_rows) + labels * random.integers(0, 2, num_rows)
    return labels, scores.astype(float), users


def test_multiplicities_equal_repeated_rows():
    random = np.random.default_rng(0)
    labels, scores, users = _rows(random)
    weights = random.integers(0, 4, (30, 5)).astype(float)
    auc = build_auc_statistic(labels, scores, users)(weights)
    by_user = compute_group_auc(labels, scores, users)
    uauc = build_mean_statistic(by_user, by_user.groups)(weights)
    for column in range(5):
        repeats = weights[users, column].astype(int)
        expected = compute_auc(np.repeat(labels, repeats), np.repeat(scores, repeats))
        assert auc[column] == pytest.approx(expected, abs=1e-12)
        user_repeats = weights[by_user.groups, column].astype(int)
        assert uauc[column] == pytest.approx(np.repeat(by_user.values, user_repeats).mean(), abs=1e-12)


def test_a_resample_without_both_labels_is_not_counted():
    statistic = build_auc_statistic([1, 0], [0.2, 0.1], [0, 1])
    assert np.isnan(statistic(np.array([[2.0], [0.0]])))[0]
    samples = compute_samples({"auc": statistic}, num_users=2, num_rows=2, num_samples=50, seed=0)["auc"]
    assert np.isnan(samples).any()
    assert compute_interval(samples, 0.95, MIN_USERS) == (1.0, 1.0)
    assert compute_interval(np.full(3, np.nan), 0.95, MIN_USERS) == (None, None)


def test_too_few_users_have_no_interval():
    assert compute_interval(np.array([0.1, 0.2]), 0.95, MIN_USERS - 1) == (None, None)


def test_same_seed_same_interval_and_equal_models_differ_by_nothing():
    labels, scores, users = _rows(np.random.default_rng(1))
    statistics = {
        "a": build_auc_statistic(labels, scores, users),
        "monotone": build_auc_statistic(labels, np.exp(scores), users),
    }
    first = compute_samples(statistics, 30, len(labels), 100, seed=3)
    again = compute_samples(statistics, 30, len(labels), 100, seed=3)
    assert np.array_equal(first["a"], again["a"])
    assert np.array_equal(first["a"], first["monotone"])


def test_interval_covers_the_truth():
    """90 % intervals must cover the true AUC in 80-98 % of 100 trials with heterogeneous users."""
    random = np.random.default_rng(2)
    covered = 0
    for trial in range(100):
        users = np.repeat(np.arange(80), 6)
        shift = random.normal(size=80)[users] * 0.5
        labels = random.integers(0, 2, len(users))
        scores = labels + shift + random.normal(size=len(users))  # AUC = P(N(1, 2 * 1.25) > 0)
        statistic = {"auc": build_auc_statistic(labels, scores, users)}
        low, high = compute_interval(compute_samples(statistic, 80, len(users), 200, trial)["auc"], 0.9, 80)
        covered += low <= 0.7364 <= high
    assert 80 <= covered <= 98


def test_fast_enough_for_eight_models():
    random = np.random.default_rng(4)
    labels, _, users = _rows(random, num_users=838, num_rows=7331)
    statistics = {str(model): build_auc_statistic(labels, random.normal(size=7331), users) for model in range(8)}
    start = time.perf_counter()
    compute_samples(statistics, 838, 7331, 1000, seed=0)
    assert time.perf_counter() - start < 20
