"""Results of a search: leaderboard as table, Parquet file and plot, and the best settings as a config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.cf.search_space import Settings, apply_settings, describe_settings
from collm_dist.cf.trainer import METRICS, Metric
from collm_dist.config import Config
from collm_dist.config.loader import dump_config
from collm_dist.evaluation.plots import plot_search, save_figure
from collm_dist.monitoring import read_metrics
from collm_dist.runs.atomic_files import open_atomic

_SHOWN = 10


@dataclass(frozen=True)
class Trial:
    """Result of a trial.

    Attributes:
        number: trial number; trial 0 has the settings of the config itself.
        settings: settings of the trial.
        state: finished; stopped early for worse metrics; or failed.
        epochs, best_epoch: number of trained epochs, and the best epoch; 0 if no epoch was completed.
        metrics: validation metrics after the best epoch, by name.
        error: cause of a failure.
    """

    number: int
    settings: Settings
    state: Literal["finished", "stopped", "failed"]
    epochs: int
    best_epoch: int
    metrics: dict[str, float]
    error: str

    @classmethod
    def from_report(cls, number: int, settings: Settings, report: Mapping[str, Any], error: str) -> Trial:
        """Build a trial from its last report."""
        metrics: dict[str, float] = {name: report[f"valid_{name}"] for name in METRICS if f"valid_{name}" in report}
        state: Literal["finished", "stopped", "failed"] = "finished" if report.get("finished") else "stopped"
        if error or not metrics:
            state = "failed"
        return cls(number, settings, state, report.get("epoch", 0), report.get("best_epoch", 0), metrics, error)


def rank_trials(trials: Sequence[Trial], metric: Metric) -> list[Trial]:
    """Return the trials by metric, best first; ties go to finished trials, then to lower numbers."""
    sign = 1 if metric == "logloss" else -1

    def place(trial: Trial) -> tuple[float, bool, int]:
        value = trial.metrics.get(metric, math.nan)
        value = math.inf if trial.state == "failed" or math.isnan(value) else sign * value
        return value, trial.state != "finished", trial.number

    return sorted(trials, key=place)


def write_results(config: Config, folder: Path, ranked: Sequence[Trial]) -> dict[str, Any]:
    """Write leaderboard.parquet, leaderboard.png and best.yaml, and return the summary.

    The best trial is the best finished one; the final metric of a stopped trial is unknown.

    Args:
        config: configuration of the search.
        folder: output folder.
        ranked: trials, best first; at least one has finished.
    """
    metric, space = config.cf.select_metric, config.cf_search.space
    best = next(trial for trial in ranked if trial.state == "finished")
    table = pa.Table.from_pylist([_build_row(trial) for trial in ranked])
    with open_atomic(folder / "leaderboard.parquet", "wb") as file:
        pq.write_table(table, file)
    cf = apply_settings(config.cf, best.settings)
    with open_atomic(folder / "best.yaml") as file:
        file.write(dump_config(config.model_copy(update={"cf": cf})))
    scored = [trial for trial in ranked if trial.state != "failed"]
    figure = plot_search(
        {trial.number: _read_curve(folder, trial, metric) for trial in scored},
        {trial.number: trial.metrics[metric] for trial in scored},
        {name: {trial.number: trial.settings[name] for trial in scored} for name in space},
        {name for name, form in space.items() if "log_uniform" in form},
        best.number,
        f"valid {metric}",
    )
    save_figure(figure, folder / "leaderboard.png")
    return {
        "metric": metric,
        "best": best.number,
        "best_settings": best.settings,
        "trials": [vars(trial) for trial in ranked],
    }


def _read_curve(folder: Path, trial: Trial, metric: str) -> list[tuple[int, float]]:
    lines = read_metrics(folder / "trials" / f"{trial.number:03d}" / "metrics.jsonl")
    return [(line["step"], line[f"valid/{metric}"]) for line in lines]


def _build_row(trial: Trial) -> dict[str, Any]:
    metrics = {f"valid_{name}": trial.metrics.get(name) for name in METRICS}
    settings = {
        f"cf.{name}": json.dumps(value) if isinstance(value, list | tuple | dict) else value
        for name, value in trial.settings.items()
    }
    return {
        "trial": trial.number, "state": trial.state, **metrics, "best_epoch": trial.best_epoch, "epochs": trial.epochs,
        **settings, "error": trial.error,
    }  # fmt: skip


def print_leaderboard(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the best trials, and trial 0, which has the config's own settings."""
    trials, metric = summary["trials"], summary["metric"]
    print(f"cf_search: {len(trials)} trials by valid {metric}; test was not scored")
    print(f"  {'rank':>4} {'trial':>5} {'auc':>7} {'uauc':>7} {'logloss':>7} {'epoch':>6}  {'state':8}  settings")
    for rank, trial in enumerate(trials, start=1):
        if rank <= _SHOWN or trial["number"] == 0:
            values = " ".join(f"{trial['metrics'].get(name, math.nan):7.4f}" for name in METRICS)
            note = " (the config's own)" if trial["number"] == 0 else ""
            print(f"  {rank:4} {trial['number']:5} {values} {trial['best_epoch']:6}  {trial['state']:8}  "
                  f"{describe_settings(trial['settings'])}{note}")  # fmt: skip
    if (failed := sum(trial["state"] == "failed" for trial in trials)) > 0:
        print(f"  {failed} trials failed; leaderboard.parquet has the errors")
    print(f"  best: trial {summary['best']}; python launch/pretrain_cf.py --config {folder / 'best.yaml'}")
    print(f"  {folder}: leaderboard.parquet leaderboard.png best.yaml")
