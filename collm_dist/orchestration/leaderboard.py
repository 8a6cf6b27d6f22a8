"""Results of a search: leaderboard as table, Parquet file and plot, and the best settings as a config."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.cf.search_space import Settings, describe_settings
from collm_dist.config import Config
from collm_dist.config.cf_search_section import SearchSpace
from collm_dist.config.loader import dump_config
from collm_dist.errors import ArtifactError, ConfigError, as_collm_error
from collm_dist.evaluation.plots import plot_search, save_figure
from collm_dist.monitoring import read_metrics
from collm_dist.runs.atomic_files import open_atomic, write_json
from collm_dist.runs.damage import read_json_file
from collm_dist.runs.fingerprints import find_changes
from collm_dist.runs.local_paths import check_links
from collm_dist.runs.lock import hold_run_lock
from collm_dist.runs.run_dir import RunDir, Step
from collm_dist.runs.status import RunStatus
from collm_dist.runs.stop_signals import preemptible

_SHOWN = 10
_REMEDY = "delete it, then run the same command again"


@dataclass(frozen=True)
class Trial:
    """Result of a trial.

    Attributes:
        number: trial number.
        settings: settings of the trial.
        state: finished; stopped early for worse metrics; or failed.
        epochs, best_epoch: number of trained epochs, and the best epoch; 0 if no epoch was completed. Of a tuning
            stage the steps of the last and the best validation.
        metrics: validation metrics after the best epoch, by name.
        error: cause of a failure.
        is_own: whether these are the config's own settings.
    """

    number: int
    settings: Settings
    state: Literal["finished", "stopped", "failed"]
    epochs: int
    best_epoch: int
    metrics: dict[str, float]
    error: str
    is_own: bool = False

    @classmethod
    def from_report(cls, number: int, settings: Settings, report: Mapping[str, Any], error: str) -> Trial:
        """Build a trial from its last report, in which the names of metrics begin with ``valid_``."""
        metrics: dict[str, float] = {
            name.removeprefix("valid_"): value for name, value in report.items() if name.startswith("valid_")
        }
        state: Literal["finished", "stopped", "failed"] = "finished" if report.get("finished") else "stopped"
        if error or not metrics:
            state = "failed"
        return cls(number, settings, state, report.get("epoch", 0), report.get("best_epoch", 0), metrics, error)


@dataclass(frozen=True)
class SearchResult:
    """Context of a leaderboard.

    Attributes:
        name: name of the search, as in the config.
        metric: metric by which trials are compared if it is defined, see ``choose_metric``.
        metrics: metrics that are shown.
        space: searched settings and their domains.
        unit: progress of a trial, in words.
        curves: (progress, value) points of each trial, by its number.
        next_command: uses the best config, whose path is appended.
        prefix: of the settings' names in the table.
    """

    name: str
    metric: str
    metrics: tuple[str, ...]
    space: SearchSpace
    unit: str
    curves: Mapping[int, Sequence[tuple[int, float]]]
    next_command: str
    prefix: str = ""


def suggest_command(run_dir: RunDir, step: Step, command: str) -> str:
    """Return the command that uses the best config, whose path is appended: in a new run if the step is done already.

    Args:
        run_dir, step: what was searched for.
        command: runs the step in the run itself.
    """
    if not run_dir.is_done(step):
        return command
    settings = [f"run.dir={run_dir.path}_searched", f"run.reuse=[{run_dir.path}]"]
    return f"python launch/run_pipeline.py {shlex.join(settings)} --config"


def choose_metric(trials: Sequence[Trial], metric: str) -> str:
    """Return the metric that compares trials: logloss if no finished trial has the given metric.

    A metric may be undefined on the validation rows, such as UAUC if no user has both labels. Trials then select by
    logloss too, see ``SelectionRule``.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    is_undefined = finished and all(_is_missing(trial, metric) for trial in finished)
    return "logloss" if is_undefined else metric


def _is_missing(trial: Trial, metric: str) -> bool:
    return math.isnan(trial.metrics.get(metric, math.nan))


def rank_trials(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Return the trials by metric, best first; ties go to finished trials, then to lower numbers.

    An undefined metric gives way to logloss, see ``choose_metric``; trials that lack the metric come last.
    """
    metric = choose_metric(trials, metric)
    sign = 1 if metric == "logloss" else -1

    def place(trial: Trial) -> tuple[float, bool, int]:
        is_last = trial.state == "failed" or _is_missing(trial, metric)
        value = math.inf if is_last else sign * trial.metrics[metric]
        return value, trial.state != "finished", trial.number

    return sorted(trials, key=place)


def write_results(
    result: SearchResult, folder: Path, ranked: Sequence[Trial], build_config: Callable[[Settings], Config]
) -> dict[str, Any]:
    """Write leaderboard.parquet, leaderboard.png and best.yaml, and return the summary.

    The best trial is the best finished one; the final metric of a stopped trial is unknown.

    Args:
        result: context of the leaderboard.
        folder: output folder.
        ranked: trials, best first.
        build_config: returns the configuration with a trial's settings.

    Raises:
        ConfigError: no trial has finished.
    """
    if not any(trial.state == "finished" for trial in ranked):
        first = next((trial.error for trial in ranked if trial.error), "nothing was reported")
        raise ConfigError(f"{result.name}: no trial finished. The first one failed with: {first}")
    best = next(trial for trial in ranked if trial.state == "finished")
    table = pa.Table.from_pylist([_build_row(trial, result) for trial in ranked])
    with open_atomic(folder / "leaderboard.parquet", "wb") as file:
        pq.write_table(table, file)
    with open_atomic(folder / "best.yaml") as file:
        file.write(dump_config(build_config(best.settings)))
    metric = choose_metric(ranked, result.metric)
    scored = [trial for trial in ranked if trial.state != "failed" and not _is_missing(trial, metric)]
    figure = plot_search(
        {trial.number: result.curves[trial.number] for trial in scored},
        {trial.number: trial.metrics[metric] for trial in scored},
        {name: {trial.number: trial.settings[name] for trial in scored} for name in result.space},
        {name for name, form in result.space.items() if "log_uniform" in form},
        best.number,
        f"valid {metric}",
        result.unit,
    )
    save_figure(figure, folder / "leaderboard.png")
    return {
        "metric": metric,
        "best": best.number,
        "best_settings": best.settings,
        "trials": [vars(trial) for trial in ranked],
    }


def run_once(
    folder: Path,
    run: Path,
    step: Step,
    fingerprint: Mapping[str, Any],
    show: Callable[[Mapping[str, Any]], object],
    search: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Run or resume a search under the lock of its run, unless it is done, and return its summary.

    Args:
        folder: of the search.
        run: run directory.
        step: searched step.
        fingerprint: settings and inputs of the search.
        show: prints the summary of a search that is done.
        search: runs the search and returns its summary.

    Raises:
        ArtifactError: the folder holds another search.
        LaunchError: another process writes the run.
    """
    status = RunStatus(folder / "status.json")
    with hold_run_lock(run, status.beat):
        check_links(run)
        summary = _read_summary(folder, fingerprint)
        if summary is not None:
            print(f"search: done already ({folder})")
            show(summary)
            return summary
        status.begin()
        status.enter(step)
        try:
            with preemptible():
                summary = search()
        except (Exception, KeyboardInterrupt) as error:
            status.end(as_collm_error(error))
            raise
        status.end()
        return summary


def _read_summary(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the summary of a finished search; write the fingerprint of a new one."""
    plan, done = folder / "plan.json", folder / "summary.json"
    changes = find_changes(read_json_file(plan, remedy=_REMEDY), fingerprint) if plan.exists() else []
    # A search that was refused, or killed, before its first trial does not claim the folder.
    if changes and (done.exists() or any(path.is_file() for path in (folder / "trials").rglob("*"))):
        raise ArtifactError(f"{folder} holds a search with other settings or inputs:\n  " + "\n  ".join(changes)
                            + "\nEither delete the folder or set run.dir to a new directory.")  # fmt: skip
    if changes:
        shutil.rmtree(folder)
    if not plan.exists():
        write_json(plan, fingerprint)
    return read_json_file(done, remedy=_REMEDY) if done.exists() else None


def read_curve(log: Path, metric: str) -> list[tuple[int, float]]:
    """Return the (step, value) points of a validation metric in a trial's log."""
    return [(line["step"], line[f"valid/{metric}"]) for line in read_metrics(log) if f"valid/{metric}" in line]


def _build_row(trial: Trial, result: SearchResult) -> dict[str, Any]:
    settings = {
        f"{result.prefix}{name}": json.dumps(value) if isinstance(value, list | tuple | dict) else value
        for name, value in trial.settings.items()
    }
    return {
        "trial": trial.number, "state": trial.state,
        **{f"valid_{name}": trial.metrics.get(name) for name in result.metrics},
        "best_epoch": trial.best_epoch, "epochs": trial.epochs, **settings, "error": trial.error,
    }  # fmt: skip


def print_leaderboard(result: SearchResult, summary: Mapping[str, Any], folder: Path) -> None:
    """Print the best trials, and trial 0, which has the config's own settings."""
    trials = summary["trials"]
    print(f"{result.name}: {len(trials)} trials by valid {summary['metric']}; test was not scored")
    if summary["metric"] != result.metric:
        print(f"  {result.metric} is undefined on the validation rows: {summary['metric']} (lower is better) compares "
              "the trials; more validation rows may define it")  # fmt: skip
    header = " ".join(f"{name:>7}" for name in result.metrics)
    print(f"  {'rank':>4} {'trial':>5} {header} {result.unit:>6}  {'state':8}  settings")
    for rank, trial in enumerate(trials, start=1):
        if rank <= _SHOWN or trial["number"] == 0:
            values = " ".join(f"{trial['metrics'].get(name, math.nan):7.4f}" for name in result.metrics)
            note = " (the config's own)" if trial["number"] == 0 and trial.get("is_own", True) else ""
            print(f"  {rank:4} {trial['number']:5} {values} {trial['best_epoch']:6}  {trial['state']:8}  "
                  f"{describe_settings(trial['settings'])}{note}")  # fmt: skip
    if failed := [trial for trial in trials if trial["state"] == "failed"]:
        first = next((trial for trial in failed if trial["error"]), failed[0])
        print(f"  {len(failed)} of the trials failed; leaderboard.parquet has the errors. Trial {first['number']}: "
              f"{first['error'] or 'no validation was reported'}")  # fmt: skip
    print(f"  best: trial {summary['best']}; {result.next_command} {folder / 'best.yaml'}")
    print(f"  {folder}: leaderboard.parquet leaderboard.png best.yaml")
