"""Comparison on hand-made rows: slices, candidate lists, undefined numbers, paired differences."""

import json

import numpy as np
import pytest

from collm_dist.evaluation.comparison import TableSettings, compute_table
from collm_dist.evaluation.evaluated_rows import EvaluatedRows, ScoredModel
from collm_dist.metrics import compute_auc, compute_uauc
from tests.unit.evaluation_data import build_block


def _model(name, scores):
    return ScoredModel(name, "likes", "earlier likes", np.asarray(scores, dtype=float))


def _random_rows(count=300, users=25):
    random = np.random.default_rng(0)
    block = build_block(
        random.integers(0, users, count),
        item_idx=random.integers(0, 40, count),
        label=random.integers(0, 2, count),
        row_id=np.arange(count) + 1000,
        group_id=np.arange(count) + 1000,
        user_in_train=random.integers(0, 2, count),
        item_in_train=random.integers(0, 2, count),
    )
    return block, random


def test_every_slice_has_exact_values():
    block, random = _random_rows()
    scores = random.normal(size=300)
    rows = EvaluatedRows.from_block("test", block)
    table, differences = compute_table(rows, [_model("a", scores)], [("a", "b")], TableSettings(50, 0.9, 0))
    assert differences == []
    warm = (block.user_in_train == 1) & (block.item_in_train == 1)
    masks = {"all": warm | True, "warm": warm, "cold_user": block.user_in_train == 0}
    masks["cold_item"] = block.item_in_train == 0
    assert [row["slice"] for row in table] == list(masks)
    for row in table:
        mask = masks[row["slice"]]
        labels, users = block.label[mask], block.user_idx[mask]
        assert row["rows"] == mask.sum()
        assert row["auc"] == pytest.approx(compute_auc(labels, scores[mask]), abs=1e-12)
        assert (row["uauc"], row["users_counted"]) == compute_uauc(labels, scores[mask], users)
        assert row["auc_low"] < row["auc"] < row["auc_high"]
        assert row["uauc_low"] < row["uauc_high"]
    assert set(table[0]) == {
        *("model", "split", "slice", "rows", "users_counted", "training_labels", "inputs", "logloss"),
        *("auc", "auc_low", "auc_high", "uauc", "uauc_low", "uauc_high"),
    }


def test_differences_are_paired():
    block, random = _random_rows()
    better = block.label + random.normal(size=300)
    rows = EvaluatedRows.from_block("test", block)
    models = [_model("a", better), _model("b", better + 0.01 * random.normal(size=300)), _model("c", better)]
    table, differences = compute_table(rows, models, [("a", "b"), ("a", "c")], TableSettings(200, 0.95, 0))
    of_all = [row for row in differences if row["slice"] == "all"]
    assert [row["versus"] for row in of_all] == ["b", "c"]
    interval, alone = of_all[0]["auc_high"] - of_all[0]["auc_low"], table[0]["auc_high"] - table[0]["auc_low"]
    assert interval < alone / 5
    assert (of_all[1]["auc"], of_all[1]["auc_low"], of_all[1]["uauc_high"]) == (0, 0, 0)


def test_undefined_numbers_are_none_and_json():
    block = build_block([0, 1, 2], label=[1, 1, 1], row_id=[1, 2, 3], group_id=[1, 2, 3])
    rows = EvaluatedRows.from_block("test", block)
    models = [_model("a", [1, 2, 3]), _model("b", [1, 2, 3])]
    table, differences = compute_table(rows, models, [("a", "b")], TableSettings(10, 0.95, 0))
    assert [row["slice"] for row in table if row["model"] == "a"] == ["all", "cold_user", "cold_item"]
    for row in table + differences:
        assert row["auc"] is row["auc_low"] is row["uauc"] is row["uauc_high"] is None
    json.dumps([table, differences], allow_nan=False)
    without, _ = compute_table(rows, models, [], TableSettings(0, 0.95, 0))
    assert without[0]["auc_low"] is None


def test_candidate_lists_stay_whole_in_slices_and_are_ranked():
    # two lists of three; the first positive's item is warm though a candidate's is not
    block = build_block(
        [0, 0, 0, 1, 1, 1],
        item_idx=[1, 2, 3, 4, 5, 6],
        label=[1, 0, 0, 1, 0, 0],
        row_id=[10, 100, 101, 20, 102, 103],
        group_id=[10, 10, 10, 20, 20, 20],
        user_in_train=[1, 1, 1, 1, 1, 1],
        item_in_train=[1, 0, 1, 0, 1, 1],
    )
    rows = EvaluatedRows.from_block("test", block)
    models = [_model("a", [3, 2, 1, 2, 3, 1]), _model("b", [1, 1, 1, 1, 1, 1])]
    table, differences = compute_table(rows, models, [("a", "b")], TableSettings(20, 0.95, 0, cutoffs=(1, 2)))
    by_key = {(row["model"], row["slice"]): row for row in table}
    assert by_key["a", "warm"]["rows"] == by_key["a", "cold_item"]["rows"] == 3
    assert by_key["a", "all"]["lists"] == 2
    assert (by_key["a", "warm"]["hr@1"], by_key["a", "cold_item"]["hr@1"]) == (1, 0)
    assert by_key["a", "all"]["ndcg@2"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert by_key["b", "all"]["hr@2"] == pytest.approx(2 / 3)
    assert differences[0]["hr@1"] == pytest.approx(0.5 - 1 / 3)
    assert by_key["a", "all"]["hr@1_low"] is None  # two users are too few for an interval


def test_lists_of_a_few_users_have_an_interval():
    """Twelve users with a list each; the first six lists have their positive in the first place."""
    positives = np.arange(12) * 3
    block = build_block(
        np.repeat(np.arange(12), 3),
        item_idx=np.arange(36),
        label=np.tile([1, 0, 0], 12),
        row_id=np.arange(36),
        group_id=np.repeat(positives, 3),
        user_in_train=np.ones(36, int),
        item_in_train=np.ones(36, int),
    )
    scores = np.tile([3.0, 2.0, 1.0], 12)
    scores[positives[6:]] = 0
    rows = EvaluatedRows.from_block("test", block)
    table, _ = compute_table(rows, [_model("a", scores)], [], TableSettings(200, 0.95, 0, cutoffs=(1,)))
    assert table[0]["hr@1"] == 0.5
    assert 0.1 < table[0]["hr@1_low"] < 0.5 < table[0]["hr@1_high"] < 0.9
