"""Figures of the report and of the hyperparameter search, drawn without a display."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collm_dist.evaluation.calibration import (
    compute_calibration,
    compute_calibration_error,
    count_drawn_bins,
)
from collm_dist.metrics import FloatArray
from collm_dist.monitoring import read_metrics

_DPI = 110
_PANEL_COLUMNS = 4


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the bytes depend only on the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def plot_forest(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], metric: str, title: str) -> Figure | None:
    """Draw a dot with its interval for each model, in the order of the table.

    Args:
        rows: rows of the table, of one split and slice.
        names: display name of each model.
        metric: auc, uauc or ndcg@k.
        title: of the plot.

    Returns:
        None if no row has the metric.
    """
    rows = [row for row in rows if row.get(metric) is not None]
    if not rows:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    values = np.array([row[metric] for row in rows])
    lows = np.array([row[f"{metric}_low"] if row[f"{metric}_low"] is not None else row[metric] for row in rows])
    highs = np.array([row[f"{metric}_high"] if row[f"{metric}_high"] is not None else row[metric] for row in rows])
    places = np.arange(len(rows))
    axes.hlines(places, lows, highs, color="tab:blue", linewidth=2)
    axes.plot(values, places, "o", color="tab:blue")
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.3f}", (value, place), xytext=(0, 6), textcoords="offset points", ha="center", size=8)
    if metric in ("auc", "uauc"):
        axes.axvline(0.5, color="0.6", linestyle=":")
    axes.set_yticks(places, [names.get(row["model"], row["model"]) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlabel(metric.upper())
    axes.set_title(title)
    return figure


def plot_calibration(labels: NDArray[Any], logits: Mapping[str, FloatArray], title: str) -> Figure:
    """Draw the observed over the predicted share of likes, a panel per model, with standard errors.

    Few rows make few bins; the calibration error in the panel's title is that of the report, over ten.

    Args:
        labels: (N,) 0 or 1.
        logits: (N,) by the models' display names.
        title: of the figure.
    """
    num_bins = count_drawn_bins(len(labels))
    columns = min(len(logits), _PANEL_COLUMNS)
    rows = -(-len(logits) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.4, 2.7 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (name, scores) in zip(panels, logits.items(), strict=False):
        bins = compute_calibration(labels, scores, num_bins)
        predicted, observed = np.array([(part.predicted, part.observed) for part in bins]).T
        # By the predicted share, which is never 0: a bin without likes has an error too.
        errors = np.sqrt(predicted * (1 - predicted) / [part.rows for part in bins])
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":")
        axes.errorbar(
            predicted, observed, errors, marker="o", markersize=4, linewidth=1, elinewidth=1, color="tab:blue"
        )
        axes.set_title(f"{name}\nerror {compute_calibration_error(compute_calibration(labels, scores)):.3f}", size=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
    for axes in panels[len(logits) :]:
        axes.set_axis_off()
    rows_per_bin = max(len(labels) // num_bins, 1)
    figure.suptitle(f"{title}: {num_bins} bins of about {rows_per_bin:,} rows, bars of one standard error", size=11)
    figure.supxlabel("predicted share of likes", size=10)
    figure.supylabel("observed share of likes", size=10)
    return figure


def read_curves(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read the (steps, values) of each metric in a stage's metrics.jsonl."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for point in read_metrics(path):
        step = point.pop("step", None)
        for name, value in point.items():
            if isinstance(step, int) and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return curves


def plot_training(logs: Mapping[str, Path]) -> Figure | None:
    """Draw loss (left) and validation AUC and UAUC (right) over steps, a row of plots per stage.

    Args:
        logs: path of each stage's metrics.jsonl, by stage; missing files are skipped.

    Returns:
        None if all files are missing.
    """
    curves = {stage: read_curves(path) for stage, path in logs.items() if path.exists()}
    if not curves:
        return None
    figure = Figure(figsize=(10, 3.2 * len(curves)), layout="constrained")
    grid = figure.subplots(len(curves), 2, squeeze=False)
    for (stage, by_name), panels in zip(curves.items(), grid, strict=True):
        for axes, kind in zip(panels, ("loss", "auc"), strict=True):
            for name, (steps, values) in by_name.items():
                if kind in name.lower():
                    axes.plot(steps, values, label=name, linewidth=1)
            axes.set_xlabel("step")
            axes.set_title(f"{stage}: {'loss' if kind == 'loss' else 'AUC'}")
            if axes.lines:
                axes.legend(fontsize=8)
    return figure


def plot_search(
    curves: Mapping[int, Sequence[tuple[int, float]]],
    scores: Mapping[int, float],
    settings: Mapping[str, Mapping[int, Any]],
    logarithmic: Collection[str],
    best: int,
    metric: str,
    unit: str = "epoch",
) -> Figure:
    """Draw a search: the metric over epochs or steps and over each setting, a line or dot per trial, the best in red.

    Args:
        curves: (epoch or step, metric) points of each trial, by its number.
        scores: best metric of each trial that has one.
        settings: value of each setting in each trial.
        logarithmic: settings with a logarithmic axis.
        best: number of the best trial.
        metric: display name of the metric.
        unit: label of the curves' axis.
    """
    columns = 2 if len(settings) < 3 else 3
    rows = -(-(1 + len(settings)) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    numbers = [*(number for number in scores if number != best), best]  # drawn last, so it is on top
    colors = ["tab:red" if number == best else "0.6" for number in numbers]
    for number, color in zip(numbers, colors, strict=True):
        panels[0].plot(*zip(*curves[number], strict=True), color=color, linewidth=1)
    panels[0].set_xlabel(unit)
    panels[0].set_ylabel(metric)
    for axes, (name, values) in zip(panels[1:], settings.items(), strict=False):
        shown = [values[number] for number in numbers]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in shown):
            shown = [str(value) for value in shown]
        axes.scatter(shown, [scores[number] for number in numbers], c=colors)
        if name in logarithmic:
            axes.set_xscale("log")
        axes.tick_params(axis="x", which="both", rotation=45, labelsize=7)
        axes.set_xlabel(name)
    for axes in panels[1 + len(settings) :]:
        axes.set_axis_off()
    return figure
