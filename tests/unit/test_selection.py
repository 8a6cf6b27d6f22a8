"""Rule that picks the best checkpoint."""

from __future__ import annotations

import pytest

from collm_dist.config.stage_sections import Stage2Config
from collm_dist.errors import DataError
from collm_dist.tuning.checkpoints import Progress
from collm_dist.tuning.selection import SelectionRule, build_selection


def judge_all(rule: SelectionRule, validations: list[dict[str, float | None]]) -> tuple[Progress, list[bool]]:
    progress = Progress()
    return progress, [rule.judge(progress, step, metrics) for step, metrics in enumerate(validations)]


def list_values(name: str, *values: float | None) -> list[dict[str, float | None]]:
    return [{"auc": 0.5, "logloss": 0.6, name: value} for value in values]


@pytest.mark.parametrize(
    ("metric", "values", "accepted"),
    [
        ("auc", (0.6, 0.5, 0.6, 0.7), [True, False, False, True]),
        ("logloss", (0.6, 0.5, 0.5, 0.7), [True, True, False, False]),
        ("ndcg@10", (0.1, 0.2), [True, True]),
    ],
)
def test_without_a_guard_the_best_value_wins_and_the_first_of_equal_ones(metric, values, accepted):
    validations = list_values(metric, *values)
    progress, found = judge_all(SelectionRule(metric), validations)
    assert found == accepted
    best = max(step for step, is_best in enumerate(accepted) if is_best)
    assert (progress.best_step, progress.best_metrics) == (best, validations[best])
    assert progress.bad_validations == len(values) - 1 - best
    assert (progress.guard_start, progress.guard_refusals) == (None, 0)


def test_logloss_selects_if_the_metric_is_undefined():
    validations = [{"auc": None, "logloss": value} for value in (0.6, 0.7, 0.5)]
    assert judge_all(SelectionRule("auc"), validations)[1] == [True, False, True]
    assert judge_all(SelectionRule("auc"), [{"auc": None, "logloss": None}] * 2)[1] == [True, False]


@pytest.mark.parametrize(
    ("guard", "values", "accepted"),
    [
        ("uauc", (0.60, 0.596, 0.594, 0.596, 0.9), [True, True, False, True, True]),
        ("logloss", (0.60, 0.604, 0.606, 0.5, 0.604), [True, True, False, True, True]),
        ("hr@5", (0.3, 0.2, 0.2, 0.299, 0.25), [True, False, False, True, False]),
    ],
)
def test_a_guard_compares_with_the_first_validation_of_the_stage(guard, values, accepted):
    """The selection metric rises all the time."""
    validations = [{"logloss": 0.6, "ndcg@10": 0.1 * step, guard: value} for step, value in enumerate(values, start=1)]
    progress, found = judge_all(SelectionRule("ndcg@10", guard), validations)
    assert found == accepted
    assert progress.guard_refusals == accepted.count(False)
    assert progress.guard_start == (-values[0] if guard == "logloss" else values[0])


def test_a_refused_validation_counts_as_one_without_improvement():
    validations = [{"auc": value, "logloss": loss} for value, loss in ((0.5, 0.6), (0.9, 0.9), (0.4, 0.6))]
    progress, _ = judge_all(SelectionRule("auc", "logloss", 0.0), validations)
    assert (progress.best_step, progress.bad_validations, progress.guard_refusals) == (0, 2, 1)


def test_a_resumed_stage_keeps_the_start_of_the_guard():
    rule, progress = SelectionRule("auc", "auc", 0.0), Progress(guard_start=0.7, best_value=0.7)
    assert not rule.judge(progress, 5, {"auc": 0.6, "logloss": 0.6})
    assert progress.guard_start == 0.7


def test_an_undefined_guard_is_refused():
    with pytest.raises(DataError, match=r"guard_metric uauc is undefined on the validation rows.*choose another"):
        SelectionRule("auc", "uauc").judge(Progress(), 0, {"auc": 0.5, "uauc": None, "logloss": 0.6})


def test_settings_and_their_defaults():
    assert build_selection(Stage2Config()) == SelectionRule("auc")
    guarded = Stage2Config(select_metric="ndcg@10", guard_metric="auc")
    assert build_selection(guarded) == SelectionRule("ndcg@10", "auc", 0.005)
    assert build_selection(guarded).names == ["ndcg@10", "auc"]
    assert build_selection(Stage2Config(guard_metric="uauc", guard_margin=0)).margin == 0
    with pytest.raises(ValueError, match=r"guard_margin 0\.1 needs a guard_metric"):
        Stage2Config(guard_margin=0.1)
