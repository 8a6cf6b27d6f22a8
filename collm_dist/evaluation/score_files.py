"""Score files: one Parquet file per model and split, for analyses beyond the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from collm_dist.errors import ArtifactError
from collm_dist.evaluation.evaluated_rows import EvaluatedRows, ScoredModel
from collm_dist.metrics import FloatArray, IntArray
from collm_dist.runs.atomic_files import open_atomic


def align_scores(expected_ids: IntArray, row_ids: IntArray, scores: NDArray[Any], source: str) -> FloatArray:
    """Return the scores in the order of the expected row ids.

    Args:
        expected_ids: (N,) row ids to score.
        row_ids: ids of the scored rows, in any order.
        scores: score of each of ``row_ids``.
        source: model and split, for the error message.

    Raises:
        ArtifactError: a row has no score or two, or a score is not finite.
    """
    order = np.argsort(row_ids, kind="stable")
    if not np.array_equal(row_ids[order], np.sort(expected_ids)):
        missing, extra = np.setdiff1d(expected_ids, row_ids), np.setdiff1d(row_ids, expected_ids)
        raise ArtifactError(
            f"{source}: {len(row_ids):,} scores for {len(expected_ids):,} rows; {len(missing):,} rows have none"
            f"{f' (the first: row {missing[0]})' if len(missing) else ''}, {len(extra):,} scores belong to no row. "
            "The shards and the stage come from different data: redo the stage"
        )
    aligned = np.asarray(scores, dtype=np.float64)[order[np.searchsorted(row_ids[order], expected_ids)]]
    broken = np.flatnonzero(~np.isfinite(aligned))
    if len(broken):
        raise ArtifactError(
            f"{source}: {len(broken):,} scores are not finite, the first for row {expected_ids[broken[0]]}; "
            "set llm.dtype to float32, or train again with a lower learning rate"
        )
    return aligned


def write_scores(folder: Path, rows: EvaluatedRows, model: ScoredModel) -> Path:
    """Write ``<model>-<split>.parquet``: row_id, user_idx, item_idx, label, score, sorted by row_id."""
    order = np.argsort(rows.row_id)
    table = pa.table(
        {
            "row_id": rows.row_id[order],
            "user_idx": rows.user_idx[order],
            "item_idx": rows.item_idx[order],
            "label": rows.label[order].astype(np.int8),
            "score": model.scores[order],
        }
    )
    path = folder / f"{model.name}-{rows.split}.parquet"
    with open_atomic(path, "wb") as file:
        pq.write_table(table, file)
    return path
