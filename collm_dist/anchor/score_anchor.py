"""Anchors: logistic regressions on simple scores, fitted by time folds, as files of a run.

A training row of fold k is scored with the weights fitted to the rows of the folds before k, so its anchor depends on
no label of an equal or later time; with ``preprocessing.ties: order``, on none of its own or a later row. Rows of fold
0 have the anchor 0. Rows after the training data are scored with the weights fitted to the last folds. Of the folds
before, the newest are used that hold ``anchor.recent_share`` of the training rows.

Shapes: N targets, F time folds, X features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from collm_dist.anchor.cooccurrence import Cooccurrence
from collm_dist.anchor.features import FEATURES, AnchorKind, FeatureSource
from collm_dist.anchor.text_similarity import TextSimilarity
from collm_dist.cf.cross_fit import load_train_times
from collm_dist.cf.model_files import load_cf_model
from collm_dist.config import Config
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.data.shards.global_order import GlobalOrder, slice_targets
from collm_dist.data.shards.interactions import load_interactions, load_item_table
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError
from collm_dist.metrics import FloatArray
from collm_dist.phases import follow, show_phase
from collm_dist.runs.anchor_inputs import (
    FORMAT_VERSION,
    check_anchor,
    find_anchor_record,
    get_recent_share,
    is_anchor_current,
    list_anchor_inputs,
    reads_cf,
)
from collm_dist.runs.atomic_files import compute_file_hash, open_atomic, write_json
from collm_dist.runs.run_dir import RunDir, add_record_hash, check_record_hash

NUM_FOLDS = 16
_ARRAYS = "arrays.safetensors"
# The weights are fitted to about this many rows; users beyond them are left out, by hash.
_MAX_FIT_ROWS = 2_000_000
# Rows whose features are computed at once.
_BATCH_ROWS = 1 << 13


@dataclass(frozen=True)
class Anchor:
    """A fitted anchor.

    Attributes:
        source: computes the features.
        weights: (F, X) weights of each fold.
        intercepts: (F,).
    """

    source: FeatureSource
    weights: FloatArray
    intercepts: FloatArray

    def score(self, block: ContextBlock) -> NDArray[np.float32]:
        """Return the (N,) anchors of a block's targets, logits of a like."""
        logits = np.empty(block.num_targets, dtype=np.float32)
        for start in range(0, block.num_targets, _BATCH_ROWS):
            stop = min(start + _BATCH_ROWS, block.num_targets)
            part = slice_targets(block, start, stop)
            folds = self.source.find_folds(part)
            logits[start:stop] = (self.source.compute(part) * self.weights[folds]).sum(axis=1) + self.intercepts[folds]
        return logits


def prepare_anchor(config: Config, run_dir: RunDir) -> None:
    """Fit the configured anchor and write its folder, unless it is there already for today's data and CF model.

    Raises:
        ArtifactError: the data step, or a CF step that the anchor reads, is not done.
    """
    kind = config.anchor.kind
    if kind is None or is_anchor_current(config, run_dir):
        return
    anchor = fit_anchor(config, run_dir, kind)
    folder, path = run_dir.anchor_dir, find_anchor_record(run_dir)
    folder.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    parts = {"texts": anchor.source.texts, "cooccurrence": anchor.source.cooccurrence}
    arrays = {
        f"{name}.{key}": np.ascontiguousarray(array)
        for name, part in parts.items()
        if part is not None
        for key, array in part.to_arrays().items()
    }
    with open_atomic(folder / _ARRAYS, "wb") as file:
        file.write(safetensors.numpy.save(arrays))
    record = {
        "format_version": FORMAT_VERSION,
        "arrays_sha256": compute_file_hash(folder / _ARRAYS),
        "inputs": list_anchor_inputs(config, run_dir, kind),
        "features": FEATURES[kind],
        "fold_starts": anchor.source.fold_starts,
        "weights": anchor.weights.tolist(),
        "intercepts": anchor.intercepts.tolist(),
    }
    write_json(path, add_record_hash(record))


def load_anchor(config: Config, run_dir: RunDir) -> Anchor | None:
    """Load the anchor of a run; None if ``anchor.kind`` is none.

    Raises:
        ArtifactError: a file is missing or damaged, or belongs to other data or another CF model.
    """
    kind = config.anchor.kind
    if kind is None:
        return None
    check_anchor(config, run_dir)
    path = find_anchor_record(run_dir)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check_record_hash(record)
        if compute_file_hash(path.with_name(_ARRAYS)) != record["arrays_sha256"]:
            raise ValueError(f"the SHA-256 of {_ARRAYS} differs")
        arrays = safetensors.numpy.load_file(path.with_name(_ARRAYS))
        weights, intercepts = np.asarray(record["weights"]), np.asarray(record["intercepts"])
        starts = tuple(record["fold_starts"])
        if weights.shape != (len(starts) + 1, len(FEATURES[kind])) or intercepts.shape != weights.shape[:1]:
            raise ValueError(f"weights of shape {weights.shape}")
        texts = TextSimilarity.from_arrays(_take_part(arrays, "texts")) if kind == "blend" else None
        cooccurrence = Cooccurrence.from_arrays(_take_part(arrays, "cooccurrence")) if kind == "blend" else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise ArtifactError(
            f"{path.parent} is damaged ({error}): restore it from a copy, or delete it and run the pipeline or the "
            "stage again, which makes the anchor"
        ) from error
    return Anchor(_build_source(config, run_dir, kind, starts, texts, cooccurrence), weights, intercepts)


def _take_part(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of one part by their names in it."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def fit_anchor(config: Config, run_dir: RunDir, kind: AnchorKind) -> Anchor:
    """Fit an anchor of a run, without writing it.

    Raises:
        ArtifactError: the data step, or a CF step that the anchor reads, is not done.
    """
    data_dir = run_dir.step_dir("data")
    manifest = load_manifest(data_dir)
    split = manifest.splits["train"]
    starts = divide_times(load_train_times(data_dir, manifest), split.last_timestamp)
    texts = cooccurrence = None
    if kind == "blend":
        with show_phase("anchor: similarity of item texts"):
            texts = TextSimilarity.fit(load_item_table(data_dir)["text"])
        columns = ("user_idx", "item_idx", "label", "sampled", "timestamp")
        with show_phase("anchor: co-occurrence of items"):
            train = load_interactions(data_dir, columns, "train", include_sampled=False)
            cooccurrence = Cooccurrence.fit(train, manifest.num_items, starts)
    source = _build_source(config, run_dir, kind, starts, texts, cooccurrence)
    # Users, not contexts: which rows are left out must not depend on a label.
    max_users = None if split.rows <= _MAX_FIT_ROWS else max(1, _MAX_FIT_ROWS * manifest.num_users // split.rows)
    order = GlobalOrder(data_dir, manifest, "train", config.run.seed, _BATCH_ROWS, max_users=max_users)
    rows = []
    with show_phase("anchor: scores of training rows", order.num_rows, "rows") as phase:
        for block in order.iter_batches():
            rows.append((source.compute(block), block.label, source.find_folds(block)))
            phase.advance(block.num_targets)
    features, labels, folds = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    weights, intercepts = np.zeros((len(starts) + 1, features.shape[1])), np.zeros(len(starts) + 1)
    firsts = find_first_folds(np.bincount(folds, minlength=len(starts)), get_recent_share(config))
    for fold in follow(range(1, len(starts) + 1), "anchor: regressions of time folds", "folds"):
        is_fitted = (folds < fold) & (folds >= firsts[fold])
        weights[fold], intercepts[fold] = _fit_logistic(features[is_fitted], labels[is_fitted])
    return Anchor(source, weights, intercepts)


def divide_times(times: IntArray, last_timestamp: int) -> tuple[int, ...]:
    """Return the timestamps (seconds) at which folds 1, 2, ... and the time after the training rows begin.

    Up to ``NUM_FOLDS`` folds hold about equal numbers of rows; rows of one second are in one fold. Fewer distinct
    timestamps give fewer folds.

    Args:
        times: sorted timestamps of the training rows.
        last_timestamp: of the training rows.
    """
    quantiles = {int(times[len(times) * fold // NUM_FOLDS]) for fold in range(1, NUM_FOLDS)}
    return (*sorted(start for start in quantiles if start > times[0]), last_timestamp + 1)


def find_first_folds(rows: IntArray, recent_share: float) -> list[int]:
    """Return for each fold, and for the time after the training rows, the first of the folds that it is fitted to.

    These are the fewest newest folds before it that hold ``recent_share`` of all training rows or more; as folds of
    equal size are not exactly equal, half a fold less is enough. All folds before it, if they hold less.

    Args:
        rows: (F,) training rows of each fold.
        recent_share: see ``AnchorConfig``.
    """
    before = np.concatenate([[0], np.cumsum(rows)])
    needed = before[-1] * (recent_share - 0.5 / NUM_FOLDS)
    enough = [np.flatnonzero(before[fold] - before[:fold] >= needed) for fold in range(len(before))]
    return [int(folds[-1]) if len(folds) else 0 for folds in enough]


def _build_source(
    config: Config,
    run_dir: RunDir,
    kind: AnchorKind,
    starts: Sequence[int],
    texts: TextSimilarity | None,
    cooccurrence: Cooccurrence | None,
) -> FeatureSource:
    manifest = load_manifest(run_dir.step_dir("data"))
    cf = load_cf_model(run_dir, manifest) if reads_cf(config, run_dir, kind) else None
    return FeatureSource(kind, tuple(starts), cf, texts, cooccurrence, manifest.max_history_length)


def _fit_logistic(features: FloatArray, labels: IntArray) -> tuple[FloatArray, float]:
    """Return weights and intercept of a logistic regression on standardized features, for the features as they are.

    Rows of one label, or no rows, give weights of 0. The first folds have no rows if all their users are left out.
    """
    from sklearn.linear_model import LogisticRegression  # late: the import takes a second
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        likes, rows = labels.sum(), len(labels)
        return np.zeros(features.shape[1]), float(np.log((likes + 0.5) / (rows - likes + 0.5)))
    scaler = StandardScaler().fit(features)
    regression = LogisticRegression(max_iter=1000).fit(scaler.transform(features), labels)
    weights = regression.coef_[0] / scaler.scale_
    return weights, float(regression.intercept_[0] - weights @ scaler.mean_)
