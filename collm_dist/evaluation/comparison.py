"""Comparison of models on the same rows: metrics by slice, bootstrap intervals, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray
from collm_dist.evaluation.bootstrap import (
    Statistic,
    build_auc_statistic,
    build_mean_statistic,
    compute_interval,
    compute_samples,
)
from collm_dist.evaluation.evaluated_rows import EvaluatedRows, ScoredModel
from collm_dist.metrics import (
    FloatArray,
    compute_auc,
    compute_group_auc,
    compute_group_hits,
    compute_group_ndcg,
    compute_logloss,
)
from collm_dist.phases import follow


@dataclass(frozen=True)
class TableSettings:
    """Settings of the comparison.

    Attributes:
        num_samples: number of resamples; 0 = no intervals.
        confidence: coverage of the intervals.
        seed: of the resamples.
        cutoffs: k of NDCG@k and HR@k; empty if rows are not candidate lists.
    """

    num_samples: int
    confidence: float
    seed: int
    cutoffs: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Metric:
    """A metric of one model on one slice, with its bootstrap statistic.

    ``count`` is the number of rows (AUC), of users with both labels (UAUC) or of candidate lists; ``users`` is the
    number of users who take part.
    """

    value: float | None
    count: int
    users: int
    statistic: Statistic


def compute_table(
    rows: EvaluatedRows, models: Sequence[ScoredModel], pairs: Sequence[tuple[str, str]], settings: TableSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of the table and the paired differences for each non-empty slice.

    Args:
        rows: the evaluated rows.
        models: scores of each model.
        pairs: (model, versus) names to compare; pairs with a missing model are skipped.
        settings: intervals and cutoffs.

    Returns:
        Rows ``{model, split, slice, rows, users_counted, auc, auc_low, auc_high, uauc.., logloss, training_labels,
        inputs}``, with ``lists``, ``ndcg@k..`` and ``hr@k..`` and without log-loss if there are cutoffs; differences
        ``{model, versus, split, slice, rows, auc, auc_low, auc_high, ..}``. An undefined number is None.
    """
    table: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    names = {model.name for model in models}
    slices = list(rows.slices.items())
    for slice_name, mask in follow(slices, f"eval: metrics and intervals on {rows.split}", "slices"):
        if not mask.any():
            continue
        _, users = np.unique(rows.user_idx[mask], return_inverse=True)
        metrics = {
            (model.name, metric): number
            for model in models
            for metric, number in _compute_metrics(rows, mask, users, model, settings.cutoffs).items()
        }
        num_rows, num_users = int(mask.sum()), int(users.max()) + 1
        statistics = {key: metric.statistic for key, metric in metrics.items()}
        samples = compute_samples(statistics, num_users, num_rows, settings.num_samples, settings.seed)
        common = {"split": rows.split, "slice": slice_name, "rows": num_rows}
        for model in models:
            table.append({**common, **_describe(model, rows, mask, metrics, samples, settings)})
        for name, versus in pairs:
            if {name, versus} <= names:
                compared = _compare(name, versus, metrics, samples, settings.confidence)
                differences.append({**common, "model": name, "versus": versus, **compared})
    return table, differences


def _compute_metrics(
    rows: EvaluatedRows, mask: NDArray[np.bool_], users: IntArray, model: ScoredModel, cutoffs: tuple[int, ...]
) -> dict[str, _Metric]:
    """Return the metrics of one model on one slice; ``users`` holds the slice's dense users."""
    labels, scores = rows.label[mask], model.scores[mask]
    by_user = compute_group_auc(labels, scores, users)
    num_users, num_both = int(users.max()) + 1, len(by_user.groups)
    auc, mean_auc = build_auc_statistic(labels, scores, users), build_mean_statistic(by_user, by_user.groups)
    metrics = {
        "auc": _Metric(compute_auc(labels, scores), len(labels), num_users, auc),
        "uauc": _Metric(by_user.compute_mean(), num_both, num_both, mean_auc),
    }
    if cutoffs:
        lists, first_row, group = np.unique(rows.group_id[mask], return_index=True, return_inverse=True)
        owner = users[first_row]
        for k in cutoffs:
            for name, compute in (("ndcg", compute_group_ndcg), ("hr", compute_group_hits)):
                values = compute(labels, scores, group, k)
                statistic = build_mean_statistic(values, owner[values.groups])
                metrics[f"{name}@{k}"] = _Metric(values.compute_mean(), len(lists), num_users, statistic)
    return metrics


def _describe(
    model: ScoredModel,
    rows: EvaluatedRows,
    mask: NDArray[np.bool_],
    metrics: dict[tuple[str, str], _Metric],
    samples: dict[tuple[str, str], FloatArray],
    settings: TableSettings,
) -> dict[str, Any]:
    """Return the model's own columns of its row in the table."""
    row: dict[str, Any] = {
        "model": model.name,
        "training_labels": model.training_labels,
        "inputs": model.inputs,
        "users_counted": metrics[model.name, "uauc"].count,
        # Lists have another share of likes than the training rows, which the scores expect.
        "logloss": (
            compute_logloss(rows.label[mask], model.scores[mask]) if model.has_logits and not settings.cutoffs else None
        ),
    }
    for (name, metric), number in metrics.items():
        if name == model.name:
            row[metric] = number.value
            row[f"{metric}_low"], row[f"{metric}_high"] = compute_interval(
                samples[name, metric], settings.confidence, number.users
            )
            if metric.startswith("ndcg"):
                row["lists"] = number.count
    return row


def _compare(
    name: str,
    versus: str,
    metrics: dict[tuple[str, str], _Metric],
    samples: dict[tuple[str, str], FloatArray],
    confidence: float,
) -> dict[str, float | None]:
    """Return the differences of all metrics between two models with paired intervals."""
    differences: dict[str, float | None] = {}
    for model, metric in metrics:
        if model != name:
            continue
        ours, theirs = metrics[name, metric].value, metrics[versus, metric].value
        differences[metric] = ours - theirs if ours is not None and theirs is not None else None
        paired = samples[name, metric] - samples[versus, metric]
        differences[f"{metric}_low"], differences[f"{metric}_high"] = compute_interval(
            paired, confidence, metrics[name, metric].users
        )
    return differences
