"""Summary of the CF step: metrics of the model beside trivial baselines on the same rows, and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from collm_dist.cf.trainer import METRICS, measure_scores
from collm_dist.config import CfConfig
from collm_dist.data.shards.context_block import concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.data.shards.manifest import Manifest
from collm_dist.evaluation.baselines import TRAIN_COLUMNS, fit_bias_logistic, fit_item_mean

_BATCH_ROWS = 1 << 16
# With more training rows the logistic regression would take longer than the model.
_MAX_LOGISTIC_ROWS = 3_000_000
SPLITS = ("valid", "test")
Metrics = Mapping[str, Mapping[str, float]]


def summarize(
    cf: CfConfig, data_dir: Path, manifest: Manifest, results: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the summary of a CF step.

    Args:
        cf: the settings.
        data_dir, manifest: of the data step.
        results: result of each seed's training (see ``Job.read_result``), the first seed first.
    """
    first = next(iter(results.values()))
    metrics = {split: first["metrics"][split] for split in SPLITS}
    baselines = _score_baselines(data_dir, manifest)
    beaten = {
        name: {split: _is_beaten(metrics, scores, split) for split in SPLITS} for name, scores in baselines.items()
    }
    return {
        "model": cf.model,
        "num_workers": cf.num_workers,
        "metrics": metrics,
        "train_metrics": first["metrics"]["train"],
        "seeds": {str(seed): {split: result["metrics"][split] for split in SPLITS} for seed, result in results.items()},
        "spread": _summarize_seeds([result["metrics"] for result in results.values()]),
        "baselines": baselines,
        "beats": beaten,
        "warnings": [
            *_find_warnings(metrics, baselines, beaten),
            *_find_unfinished(results, cf.num_epochs),
        ],
        "epochs": first["epochs"],
        "best_epoch": first["best_epoch"],
    }


def _summarize_seeds(metrics: list[Metrics]) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean and standard deviation over the seeds by split and metric."""
    spread: dict[str, dict[str, dict[str, float]]] = {}
    for split in SPLITS:
        shared = [name for name in METRICS if all(name in by_split[split] for by_split in metrics)]
        by_metric = {name: [by_split[split][name] for by_split in metrics] for name in shared}
        spread[split] = {
            name: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
            for name, values in by_metric.items()
        }
    return spread


def _score_baselines(data_dir: Path, manifest: Manifest) -> dict[str, dict[str, dict[str, float]]]:
    train = load_interactions(data_dir, TRAIN_COLUMNS, "train")
    scorers = {"item_mean": fit_item_mean(train, manifest.num_items)}
    if manifest.splits["train"].rows <= _MAX_LOGISTIC_ROWS:
        scorers["bias_logistic"] = fit_bias_logistic(train, manifest.num_users, manifest.num_items)
    metrics: dict[str, dict[str, dict[str, float]]] = {name: {} for name in scorers}
    for split in SPLITS:
        order = GlobalOrder(data_dir, manifest, split, 0, _BATCH_ROWS, shuffle=False)
        block = concatenate_blocks(list(order.iter_batches(0)))
        users = block.user_idx[block.target_contexts]
        for name, scorer in scorers.items():
            metrics[name][split] = measure_scores(block.label, scorer(block), users)
    return metrics


def _is_beaten(metrics: Metrics, baseline: Metrics, split: str) -> bool | None:
    """Return whether the model's AUC is above the baseline's; None if either is not defined."""
    ours, theirs = metrics[split].get("auc"), baseline[split].get("auc")
    return None if ours is None or theirs is None else ours > theirs


def _find_warnings(
    metrics: Metrics, baselines: Mapping[str, Metrics], beaten: Mapping[str, Mapping[str, bool | None]]
) -> list[str]:
    # Of valid alone: who tunes by test has no test rows any more.
    return [
        f"on valid the model (AUC {metrics['valid']['auc']:.4f}) does not beat the baseline {name} "
        f"({baselines[name]['valid']['auc']:.4f}): its vectors carry little information. Tune cf.learning_rate, "
        "cf.weight_decay and cf.num_epochs, or run launch/search.py --step cf"
        for name, outcome in beaten.items()
        if outcome["valid"] is False
    ]


def _find_unfinished(results: Mapping[int, Mapping[str, Any]], max_epochs: int) -> list[str]:
    return [
        f"seed {seed}: the last epoch ({max_epochs}) was the best one; raise cf.num_epochs"
        for seed, result in results.items()
        if result["best_epoch"] == max_epochs
    ]


def print_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Print the metrics beside those of the baselines, and the warnings."""
    print(f"cf: best epoch {summary['best_epoch']} of {summary['epochs']}")
    for split in summary["metrics"]:
        for name, metrics in ((summary["model"], summary["metrics"]), *summary["baselines"].items()):
            shown = "  ".join(
                f"{metric} {metrics[split][metric]:.4f}" for metric in METRICS if metric in metrics[split]
            )
            print(f"  {split:5} {name:14} {shown}")
        if len(summary["seeds"]) > 1:
            spread = summary["spread"][split].items()
            shown = "  ".join(f"{metric} {value['mean']:.4f} +- {value['std']:.4f}" for metric, value in spread)
            print(f"  {split:5} {len(summary['seeds'])} seeds        {shown}")
    for warning in summary["warnings"]:
        print(f"  {'!' * 20} WARNING: {warning}")
    print(f"  {path}")
