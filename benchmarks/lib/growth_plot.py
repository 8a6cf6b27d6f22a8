"""Plots of measurements against size, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]


def plot_growth(panels: Mapping[str, Mapping[str, Points]], size_name: str, path: Path) -> None:
    """Draw a panel for each measurement.

    Args:
        panels: lines of (size, value) points by name, by the label of the vertical axis.
        size_name: label of the horizontal axis.
        path: the PNG file.
    """
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (label, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel=size_name, ylabel=label)
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
