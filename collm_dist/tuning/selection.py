"""Selection of the best checkpoint: a metric that picks it, and a guard metric that must not fall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from collm_dist.config import StageConfig
from collm_dist.errors import DataError
from collm_dist.tuning.checkpoints import Progress

DEFAULT_MARGIN = 0.005

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class SelectionRule:
    """Rule by which a validation becomes the best of a stage.

    Its selection metric must be better than at any earlier choice, and its guard metric must not be worse than at the
    stage's first validation by more than the margin. Higher is better, except for logloss.

    Attributes:
        metric: name of the selection metric; if it is undefined on the validation rows, logloss selects.
        guard: name of the guard metric; None = no guard.
        margin: largest tolerated loss of the guard metric.
    """

    metric: str
    guard: str | None = None
    margin: float = DEFAULT_MARGIN

    @property
    def names(self) -> list[str]:
        """Names of the metrics that the rule reads."""
        return [self.metric] if self.guard is None else [self.metric, self.guard]

    def judge(self, progress: Progress, step: int, metrics: Metrics) -> bool:
        """Record a validation in the progress, and return whether it is the best so far.

        Args:
            progress: position of training; it keeps the guard's start, the best validation and the count of others.
            step: global step of the validation.
            metrics: all validation metrics by name; None = undefined.

        Raises:
            DataError: the guard metric is undefined on the validation rows.
        """
        value = _orient(metrics, self.metric)
        if value is None:
            value = _orient(metrics, "logloss")
        if value is None:
            value = float("-inf")
        passes = self._passes_guard(progress, metrics)
        if passes and (progress.best_value is None or value > progress.best_value):
            progress.best_value, progress.best_step = value, step
            progress.best_metrics, progress.bad_validations = dict(metrics), 0
            return True
        progress.guard_refusals += not passes
        progress.bad_validations += 1
        return False

    def _passes_guard(self, progress: Progress, metrics: Metrics) -> bool:
        if self.guard is None:
            return True
        value = _orient(metrics, self.guard)
        if value is None:
            raise DataError(
                f"guard_metric {self.guard} is undefined on the validation rows, which need likes and dislikes "
                "(uauc: of one user; ndcg@K and hr@K: a like); choose another guard_metric, or raise max_valid_contexts"
            )
        if progress.guard_start is None:
            progress.guard_start = value
        return value >= progress.guard_start - self.margin


def build_selection(stage: StageConfig) -> SelectionRule:
    """Return the rule of a stage's settings."""
    margin = DEFAULT_MARGIN if stage.guard_margin is None else stage.guard_margin
    return SelectionRule(stage.select_metric, stage.guard_metric, margin)


def _orient(metrics: Metrics, name: str) -> float | None:
    """Return a metric with the sign that makes higher better."""
    value = metrics[name]
    return -value if name == "logloss" and value is not None else value
