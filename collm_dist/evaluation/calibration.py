"""Calibration of predicted likes: bins of a reliability diagram and the expected calibration error."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from collm_dist.evaluation.evaluated_rows import EvaluatedRows, ScoredModel
from collm_dist.metrics import FloatArray

NUM_BINS = 10
# For figures: with fewer rows in a bin, the observed share is mostly noise.
_MIN_BINS, _ROWS_PER_BIN = 3, 40


@dataclass(frozen=True)
class CalibrationBin:
    """A bin of rows with similar predictions: number of rows, mean predicted and observed share of likes."""

    rows: int
    predicted: float
    observed: float


def count_drawn_bins(num_rows: int) -> int:
    """Return the number of bins in which so many rows make a readable figure."""
    return min(max(num_rows // _ROWS_PER_BIN, _MIN_BINS), NUM_BINS)


def compute_calibration(labels: NDArray[Any], logits: FloatArray, num_bins: int = NUM_BINS) -> list[CalibrationBin]:
    """Return bins of about equally many rows, in the order of the predictions, from (N,) labels and logits.

    Where a border of two bins cuts rows with equal predictions, both have the mean label of these rows, so the bins do
    not depend on the order of the rows.
    """
    predicted = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    _, ties, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    observed = (np.bincount(ties, weights=labels) / counts)[ties]
    order = np.argsort(predicted, kind="stable")
    return [
        CalibrationBin(len(rows), float(predicted[rows].mean()), float(observed[rows].mean()))
        for rows in np.array_split(order, num_bins)
        if len(rows)
    ]


def compute_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error: mean absolute difference of predicted and observed, weighted by rows."""
    total = sum(tenth.rows for tenth in bins)
    return sum(tenth.rows * abs(tenth.predicted - tenth.observed) for tenth in bins) / total


def list_calibration(rows: EvaluatedRows, models: Sequence[ScoredModel]) -> list[dict[str, Any]]:
    """Return ``{split, model, error, bins}`` for each model whose scores are log-odds."""
    calibration = []
    for model in models:
        if model.has_logits and len(rows.label):
            bins = compute_calibration(rows.label, model.scores)
            error = compute_calibration_error(bins)
            calibration.append(
                {"split": rows.split, "model": model.name, "error": error, "bins": list(map(asdict, bins))}
            )
    return calibration


def write_calibration(file: TextIO, calibration: Sequence[Mapping[str, Any]]) -> None:
    """Write the bins of ``list_calibration`` as CSV, one row per bin."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["split", "model", "bin", "rows", "predicted", "observed"])
    for curve in calibration:
        for number, values in enumerate(curve["bins"], start=1):
            shares = (f"{values[name]:.6f}" for name in ("predicted", "observed"))
            writer.writerow([curve["split"], curve["model"], number, values["rows"], *shares])
