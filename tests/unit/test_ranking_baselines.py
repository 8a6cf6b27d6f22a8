"""Baselines for implicit feedback, on sequences short enough to count by hand."""

import numpy as np
import pytest

from collm_dist.evaluation.ranking_baselines import find_last_liked, fit_ranking_baselines, score_popularity
from tests.unit.evaluation_data import build_block


def _train(rows):
    names = ("user_idx", "item_idx", "label", "sampled")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def test_counts_follow_real_likes_of_one_user_only():
    train = _train([(0, 1, 1, 0), (0, 7, 0, 1), (0, 2, 1, 0), (1, 1, 1, 0), (1, 2, 1, 0), (1, 3, 1, 0)])
    _, cooccurrence = fit_ranking_baselines(train, num_items=10)
    block = build_block([5] * 5, histories=[[3, 1]] * 4 + [[]], item_idx=[2, 3, 7, 1, 2])
    # after 1: 2 twice, 3 once; never 7 (a sampled negative) nor 1 (another user's); no history, no count
    assert cooccurrence.score(block) == pytest.approx([2, 1, 0, 0, 0])


def test_popularity_breaks_ties_but_never_beats_a_count():
    train = _train([(0, 1, 1, 0), (0, 2, 1, 0)])
    _, cooccurrence = fit_ranking_baselines(train, num_items=10)
    block = build_block([5] * 3, histories=[[1]] * 3, item_idx=[2, 3, 4], item_likes=[0, 1000, 10])
    assert np.argsort(-cooccurrence.score(block)).tolist() == [0, 1, 2]
    assert np.argsort(-score_popularity(block)).tolist() == [1, 2, 0]


@pytest.mark.parametrize("rows", [[(0, 1, 1, 0)], [(0, 1, 0, 1), (0, 2, 0, 1)]])
def test_without_a_pair_only_popularity_is_left(rows):
    _, cooccurrence = fit_ranking_baselines(_train(rows), num_items=10)
    block = build_block([0, 0], histories=[[1], [1]], item_idx=[2, 3], item_likes=[4, 0])
    scores = cooccurrence.score(block)
    assert 0.5 > scores[0] > scores[1] == 0


def test_last_liked_item():
    assert find_last_liked(build_block([0, 1, 2], histories=[[4, 5], [], [6]])).tolist() == [5, -1, 6]
