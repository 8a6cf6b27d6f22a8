"""Notes and warnings of the report: data summary, statistical power, missing models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from statistics import NormalDist
from typing import Any

import numpy as np

from collm_dist.config import Config, StageConfig
from collm_dist.data.shards.manifest import Manifest
from collm_dist.evaluation.evaluated_rows import EvaluatedRows
from collm_dist.evaluation.report_markdown import MODEL_NAMES

# With a larger standard error of the AUC, the differences that papers report (.01 to .03) are not significant.
_COARSE_STANDARD_ERROR = 0.015


def describe_data(config: Config, manifest: Manifest, evaluated: Mapping[str, EvaluatedRows]) -> dict[str, Any]:
    """Return a summary of the evaluated data; of a path it holds only the last component.

    Args:
        config: the experiment.
        manifest: of its data.
        evaluated: evaluated rows of each split.
    """
    dataset = config.dataset
    implicit = manifest.feedback == "implicit"
    return {
        "name": dataset.asset or PurePosixPath(str(dataset.path).rstrip("/")).name,
        "format": dataset.format,
        "feedback": manifest.feedback,
        "ties": manifest.ties,
        "num_users": manifest.num_users,
        "num_items": manifest.num_items,
        "splits": {
            name: {"rows": info.rows, "contexts": info.contexts, "real_rows": info.real_rows}
            for name in ("train", "valid", "test")
            if (info := manifest.splits.get(name)) is not None
        },
        "evaluated": {
            name: {
                "rows": len(rows.row_id),
                "users": len(np.unique(rows.user_idx)),
                "likes": int(rows.label.sum()),
                "like_share": float(rows.label.mean()),
                "sampled": int(rows.sampled.sum()),
            }
            for name, rows in evaluated.items()
        },
        "max_users": config.evaluation.max_users,
        "sampling": {
            "negatives_per_positive": dataset.negatives_per_positive,
            "negative_sampling": dataset.negative_sampling,
            "num_candidates": config.evaluation.num_candidates,
        }
        if implicit
        else None,
        "content_hash": manifest.content_hash,
    }


def estimate_standard_error(row: Mapping[str, Any], likes: int, confidence: float) -> float | None:
    """Return the standard error of an AUC from its interval, or by Hanley and McNeil (1982) if it has none.

    The formula assumes independent rows, so it is too small if users have many rows.

    Args:
        row: row of the table.
        likes: number of likes among its rows.
        confidence: coverage of the interval.

    Returns:
        None if only one label occurs.
    """
    auc, low, high = row["auc"], row["auc_low"], row["auc_high"]
    if low is not None and high is not None and high > low:
        return float((high - low) / (2 * NormalDist().inv_cdf((1 + confidence) / 2)))
    dislikes = row["rows"] - likes
    if auc is None or not likes or not dislikes:
        return None
    above, below = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (likes - 1) * (above - auc**2) + (dislikes - 1) * (below - auc**2)
    return float(np.sqrt(max(variance, 0.0) / (likes * dislikes)))


def list_warnings(report: Mapping[str, Any], confidence: float) -> list[str]:
    """Return a warning for each evaluated split that is too small to compare models."""
    warnings = []
    for split, counts in report["data"]["evaluated"].items():
        rows = [row for row in report["rows"] if (row["split"], row["slice"]) == (split, "all")]
        errors = [estimate_standard_error(row, counts["likes"], confidence) for row in rows if row["auc"] is not None]
        known = [error for error in errors if error is not None]
        if split == "train" or (known and max(known) < _COARSE_STANDARD_ERROR):
            continue
        size = f"{split}: {counts['rows']:,} evaluated rows of {counts['users']:,} users"
        if known:
            warnings.append(
                f"{size}. The standard error of an AUC is about {max(known):.3f}, so the values say little; "
                "only paired differences whose interval excludes 0 are significant."
            )
        else:
            warnings.append(
                f"{size}. They have only one label, so AUC is not defined and no model is better than another."
            )
    return warnings


def list_notes(config: Config, report: Mapping[str, Any]) -> list[str]:
    """Return notes on how the numbers were computed, one sentence or two each."""
    evaluation, data = config.evaluation, report["data"]
    notes = []
    if evaluation.bootstrap_samples:
        notes.append(
            f"Brackets are {evaluation.confidence:.0%} percentile intervals from {evaluation.bootstrap_samples:,} "
            "bootstrap resamples of users; differences are paired on the same resamples."
        )
    if evaluation.max_users is not None:
        notes.append(
            f"Only {evaluation.max_users:,} users, chosen by hash, are evaluated; they are the same for all models."
        )
    if evaluation.max_contexts is not None:
        notes.append(
            f"Only {evaluation.max_contexts:,} contexts of a split, chosen by hash, are evaluated; they are the same "
            "for all models."
        )
    if data["sampling"] is not None:
        sampling = data["sampling"]
        notes.append(
            f"Every real row is a like. Dislikes are sampled ({sampling['negative_sampling']}): "
            f"{sampling['negatives_per_positive']} for each training like; each like of valid and test is ranked "
            f"among {sampling['num_candidates']} candidates, itself included. Counts and histories contain "
            "only real events; AUC compares likes with sampled dislikes."
        )
    notes.append(
        "Warm: user and item occur in training rows. Cold user, cold item: the user or the item does not. Users with "
        "only one label have no AUC and are not part of UAUC."
    )
    selected = [
        f"{shown} by {rule}"
        for name, shown, rule in (
            ("cf", "collaborative model", config.cf.select_metric),
            ("stage1", "stage 1", _describe_selection(config.stage1)),
            ("stage2", "stage 2", _describe_selection(config.stage2)),
        )
        if name not in report["left_out"]
    ]
    notes.append(
        (f"Checkpoints were selected on valid: {', '.join(selected)}. " if selected else "")
        + f"Models are compared with the trivial baseline {MODEL_NAMES[report['best_trivial']]}, "
        + ("the best on valid." if "valid" in evaluation.splits else "fixed in advance because valid is not evaluated.")
    )
    notes += _note_blend(config, report)
    if "stage2" not in report["left_out"]:
        notes += _note_slots(config)
    notes += _note_memorization(report)
    notes += [f"Not in the table: {MODEL_NAMES[name]} ({reason})." for name, reason in report["left_out"].items()]
    return notes


def _note_blend(config: Config, report: Mapping[str, Any]) -> list[str]:
    """Return a note if the blend of simple scores has no collaborative score."""
    if "cf" in report["left_out"]:
        reason = report["left_out"]["cf"]
    elif config.cf.cross_fit == "off":
        reason = "cf.cross_fit is off, so the model has seen the labels of the rows that the blend is fitted to"
    else:
        return []
    return [f"The {MODEL_NAMES['blend']} leaves out the collaborative score: {reason}."]


def _note_slots(config: Config) -> list[str]:
    """Return notes on the origin of the vectors in the slots of stage 2."""
    notes = []
    if config.stage2.train_cf:
        notes.append(
            ("Id tokens were" if config.cf.model == "none" else "The collaborative model was")
            + " trained in stage 2 too"
            + (", from new random weights" if config.stage2.train_cf == "scratch" else "")
            + " (stage2.train_cf). Slots without LLM use the vectors after stage 2."
        )
    if config.stage2.train_cf == "scratch":
        notes.append("The vectors of stage 2 depend on the labels of its own training rows only.")
    elif config.cf.cross_fit == "off":
        notes.append(
            "Stage 2 was trained on rows that the collaborative model was fitted to (cf.cross_fit: off, as in the "
            "paper), where its vectors look better than they are."
        )
    else:
        notes.append(
            "Slots do not depend on the row's label: collaborative vectors come from models fitted to earlier time "
            f"folds (cf.cross_fit: {config.cf.cross_fit}) and from the history."
        )
    return notes


def _note_memorization(report: Mapping[str, Any]) -> list[str]:
    """Return a note on the AUC of stage 1 on its training rows and on valid: memorized labels leave stage 2 little."""
    auc = {
        row["split"]: row["auc"]
        for row in report["rows"]
        if (row["model"], row["slice"]) == ("stage1", "all") and row["auc"] is not None
    }
    if "train" not in auc:
        return []
    beside = f", {auc['valid']:.3f} on valid" if "valid" in auc else ""
    return [
        f"Stage 1 reaches AUC {auc['train']:.3f} on its training rows{beside}. A large gap means memorized labels, "
        "which leave stage 2 little to learn."
    ]


def _describe_selection(stage: StageConfig) -> str:
    if stage.guard_metric is None:
        return stage.select_metric
    return f"{stage.select_metric} (if {stage.guard_metric} did not get worse than before training)"
