"""What the CF step says about its model: metrics, and whether the trivial baselines on the same rows are beaten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collm_dist.cf.checkpoint import Progress
from collm_dist.cf.trainer import METRICS, Rows, compute_metrics, measure_scores
from collm_dist.data.context_block import concatenate_blocks
from collm_dist.data.global_order import GlobalOrder
from collm_dist.data.interactions import load_interactions
from collm_dist.data.manifest import Manifest
from collm_dist.evaluation.baselines import TRAIN_COLUMNS, fit_bias_logistic, fit_item_mean

_BATCH_ROWS = 1 << 16
Metrics = Mapping[str, Mapping[str, float]]


def summarize(model: Any, data_dir: Path, manifest: Manifest, splits: Mapping[str, Rows], progress: Progress,
              num_epochs: int) -> dict[str, Any]:  # fmt: skip
    """Return the summary's figures.

    Args:
        model: the trained model, on the CPU.
        data_dir, manifest: of the data step.
        splits: rows of train, valid and test.
        progress: of the training.
        num_epochs: most epochs that it was allowed.
    """
    metrics = {split: compute_metrics(model, splits[split]) for split in ("valid", "test")}
    baselines = _score_baselines(data_dir, manifest)
    return {
        "metrics": metrics,
        "train_metrics": compute_metrics(model, splits["train"]),
        "baselines": baselines,
        "beats_item_mean": {split: _is_beaten(metrics, baselines["item_mean"], split) for split in metrics},
        "warnings": _find_warnings(metrics, baselines, progress, num_epochs),
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _score_baselines(data_dir: Path, manifest: Manifest) -> dict[str, dict[str, dict[str, float]]]:
    train = load_interactions(data_dir, TRAIN_COLUMNS, "train")
    scorers = {
        "item_mean": fit_item_mean(train, manifest.num_items),
        "bias_logistic": fit_bias_logistic(train, manifest.num_users, manifest.num_items),
    }
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in scorers}
    for split in ("valid", "test"):
        order = GlobalOrder(data_dir, manifest, split, 0, _BATCH_ROWS, shuffle=False)
        block = concatenate_blocks(list(order.iter_batches(0)))
        users = block.user_idx[block.target_contexts]
        for name, scorer in scorers.items():
            found[name][split] = measure_scores(block.label, scorer(block), users)
    return found


def _is_beaten(metrics: Metrics, baseline: Metrics, split: str) -> bool | None:
    """Whether the model's AUC is above the baseline's; None where there is no AUC."""
    ours, theirs = metrics[split].get("auc"), baseline[split].get("auc")
    return None if ours is None or theirs is None else ours > theirs


def _find_warnings(metrics: Metrics, baselines: Mapping[str, Metrics], progress: Progress, most: int) -> list[str]:
    warnings = []
    for split in metrics:
        if _is_beaten(metrics, baselines["item_mean"], split) is False:
            warnings.append(
                f"on {split} the model (AUC {metrics[split]['auc']:.4f}) does not beat the item mean "
                f"({baselines['item_mean'][split]['auc']:.4f}): its vectors carry little. Look at cf.learning_rate, "
                "cf.weight_decay and cf.num_epochs"
            )
    if progress.best_epoch == most:
        warnings.append(f"the last epoch allowed ({most}) was the best one: raise cf.num_epochs")
    return warnings


def print_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Show the figures beside those of the baselines, and warnings that cannot be overlooked."""
    print(f"cf: the best of {summary['epochs']} epochs is number {summary['best_epoch']}")
    for split in summary["metrics"]:
        for name, metrics in ((summary["model"], summary["metrics"]), *summary["baselines"].items()):
            shown = "  ".join(f"{one} {metrics[split][one]:.4f}" for one in METRICS if one in metrics[split])
            print(f"  {split:5} {name:14} {shown}")
    for warning in summary["warnings"]:
        print(f"  {'!' * 20} WARNING: {warning}")
    print(f"  {path}")
