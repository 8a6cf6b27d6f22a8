"""Sentences at the top of a report."""

import pytest

from collm_dist.evaluation.verdict import judge, list_verdicts


def make_report(low, high, *, anchor="blend", stage="stage2", split="test"):
    rows = [
        {"split": split, "slice": "all", "model": model, "auc": auc} for model, auc in ((stage, 0.72), ("blend", 0.7))
    ]
    difference = {"split": split, "slice": "all", "model": stage, "versus": "blend", "auc": 0.02, "auc_low": low,
                  "auc_high": high}  # fmt: skip
    return {"rows": rows, "differences": [difference, difference | {"slice": "warm"}], "anchor": anchor}


@pytest.mark.parametrize(
    ("low", "high", "begin"),
    [
        (0.01, 0.03, "The language model adds to its anchor (blend of simple scores): AUC on test 0.7200 and 0.7000"),
        (-0.03, -0.01, "The language model takes away from its anchor"),
        (-0.01, 0.03, "No gain or loss of the language model against its anchor can be shown (blend of simple scores)"),
        (None, None, "The difference between the language model and its anchor has no interval"),
    ],
)
def test_what_the_language_model_adds_comes_first(low, high, begin):
    (verdict,) = list_verdicts(make_report(low, high), "auc")
    assert verdict.startswith(begin)
    assert "difference +0.0200" in verdict


def test_rivals_are_named_without_an_anchor_and_for_the_last_stage():
    (verdict,) = list_verdicts(make_report(0.01, 0.03, anchor=None, stage="stage1", split="valid"), "auc")
    assert verdict.startswith("Stage 1 (text) is better than blend of simple scores: AUC on valid 0.7200 and 0.7000")
    assert list_verdicts({"rows": [], "differences": [], "anchor": None}, "auc") == []


def test_an_end_at_zero_proves_nothing():
    assert judge({"auc_low": 0.0, "auc_high": 0.1}, "auc") == "open"
    assert judge({"auc_low": -0.1, "auc_high": 0.0}, "auc") == "open"
