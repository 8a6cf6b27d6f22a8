"""What a reader must know beside the numbers: what the data are, how far the numbers carry, what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from statistics import NormalDist
from typing import Any

import numpy as np

from collm_dist.config import Config
from collm_dist.data.shards.manifest import Manifest
from collm_dist.evaluation.evaluated_rows import EvaluatedRows
from collm_dist.evaluation.report_markdown import MODEL_NAMES

# Beyond this standard error of an AUC, the differences that papers report (.01 to .03) cannot be seen.
_COARSE_STANDARD_ERROR = 0.015


def describe_data(config: Config, manifest: Manifest, evaluated: Mapping[str, EvaluatedRows]) -> dict[str, Any]:
    """Return what data the numbers are from; a path is given by its last part alone.

    Args:
        config: the experiment.
        manifest: of its data.
        evaluated: the evaluated rows by split.
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
    """Return the standard error of a row's AUC: from its interval, else by Hanley and McNeil (1982).

    The second takes rows as independent, so it is too small where users have many rows. None without both labels.
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
    """Return one line for each evaluated split whose numbers are too coarse to compare models by."""
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
                f"{size}: the standard error of an AUC is about {max(known):.3f}, so this proves operation, not "
                f"quality; models that differ by less than about {2 * max(known):.2f} cannot be told apart."
            )
        else:
            warnings.append(f"{size}: they hold one label only, so no AUC is defined; this proves operation alone.")
    return warnings


def list_notes(config: Config, report: Mapping[str, Any]) -> list[str]:
    """Return how the numbers were made, in plain words, one line each."""
    evaluation, data = config.evaluation, report["data"]
    notes = []
    if evaluation.bootstrap_samples:
        notes.append(
            f"Brackets are {evaluation.confidence:.0%} percentile intervals from {evaluation.bootstrap_samples:,} "
            "resamples of users; differences are paired on the same resamples."
        )
    if evaluation.max_users is not None:
        notes.append(f"Only {evaluation.max_users:,} users chosen by hash are evaluated, the same for all models.")
    if data["sampling"] is not None:
        sampling = data["sampling"]
        notes.append(
            f"Every real row is a like. Dislikes are sampled ({sampling['negative_sampling']}): "
            f"{sampling['negatives_per_positive']} for each training like; each like of valid and test is ranked "
            f"among {sampling['num_candidates']} candidates, itself included. Counts and histories hold real events "
            "only, and AUC is against sampled dislikes."
        )
    notes.append(
        "Warm: user and item both occur in training rows; cold user, cold item: they do not. A user with one label "
        "only has no AUC and is not in UAUC."
    )
    notes.append(
        "Checkpoints were selected on valid: "
        + ("" if config.cf.model == "none" else f"collaborative model by {config.cf.select_metric}, ")
        + f"stage 1 by {config.stage1.select_metric}, stage 2 by {config.stage2.select_metric}. The trivial baseline "
        f"that the others are compared with is {MODEL_NAMES[report['best_trivial']]}, "
        + ("the best on valid." if "valid" in evaluation.splits else "named in advance, since valid is not evaluated.")
    )
    if config.stage2.train_cf:
        notes.append(
            ("Id tokens were" if config.cf.model == "none" else "The collaborative model was")
            + " trained in stage 2 too"
            + (", from weights drawn anew" if config.stage2.train_cf == "scratch" else "")
            + " (stage2.train_cf). Slots without LLM read the vectors that stage 2 ended with."
        )
    if config.stage2.train_cf == "scratch":
        notes.append("Stage 2's vectors have seen the labels of the rows that it was trained on, and no others.")
    elif config.cf.cross_fit == "off":
        notes.append(
            "Stage 2 was trained on rows that the collaborative model was fitted to (cf.cross_fit: off, the paper's "
            "way): its vectors look better there than they are."
        )
    else:
        notes.append(
            f"What slots carry had not seen the row's label: collaborative vectors come from models of the time folds "
            f"before (cf.cross_fit: {config.cf.cross_fit}) and from the history."
        )
    notes += _note_memorization(report)
    notes += [f"Not in the table: {MODEL_NAMES[name]}: {reason}." for name, reason in report["left_out"].items()]
    return notes


def _note_memorization(report: Mapping[str, Any]) -> list[str]:
    """Return stage 1's AUC on its own training rows beside valid's: labels that it memorized teach stage 2 nothing."""
    auc = {
        row["split"]: row["auc"]
        for row in report["rows"]
        if (row["model"], row["slice"]) == ("stage1", "all") and row["auc"] is not None
    }
    if "train" not in auc:
        return []
    beside = f", {auc['valid']:.3f} on valid" if "valid" in auc else ""
    return [
        f"Stage 1 reaches AUC {auc['train']:.3f} on rows that it trained on{beside}: a wide gap means "
        "that it has memorized labels, which leaves stage 2 little to learn."
    ]
