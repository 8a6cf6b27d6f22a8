"""Search for the CF model's settings with Ray Tune: random search with early stopping by ASHA.

A trial trains like ``launch/pretrain_cf.py`` on train and valid only; it never sees test rows. Each trial has its own
checkpoints, so a killed search loses a few epochs per trial.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from collm_dist.cf.jobs import Job, check_inputs, write_text_vectors
from collm_dist.cf.models.registry import check_tuning
from collm_dist.cf.search_space import Settings, apply_settings, describe_settings, draw_settings
from collm_dist.cf.trainer import METRICS, is_better
from collm_dist.cf.worker import LogTarget, run_single_worker
from collm_dist.config import Config
from collm_dist.data.accepted_config import check_earlier_steps
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import CollmError, ConfigError, LaunchError
from collm_dist.orchestration.cluster import connect_ray, run_here
from collm_dist.orchestration.leaderboard import (
    SearchResult,
    Trial,
    print_leaderboard,
    rank_trials,
    read_curve,
    run_once,
    suggest_command,
    write_results,
)
from collm_dist.runs.atomic_files import clear_unfinished, compute_json_hash, write_json
from collm_dist.runs.fingerprints import flatten_config
from collm_dist.runs.input_files import drop_times
from collm_dist.runs.run_dir import RunDir

FOLDER = "cf_search"
SPLITS = ("train", "valid")
_TEXTS = "item_text"
# Seconds between Tune's state files; a trial missing from the last one reads its own checkpoint and ends at once.
_STATE_SECONDS = "2"


def run_search(config: Config, run_dir: RunDir) -> dict[str, Any]:
    """Run or resume a search and return its summary.

    Args:
        config: the experiment; ``cf`` holds the settings of trial 0, ``cf_search`` the search space.
        run_dir: run whose data step is done.

    Raises:
        ConfigError: a setting cannot be searched as configured, or no trial finished.
        ArtifactError: the data step is not done, or was made with other settings; or the folder holds another search.
        DataError: the validation rows do not suffice to select an epoch.
        LaunchError: the run is in use, or Ray failed.
    """
    trials = _plan_trials(config)
    check_earlier_steps(config, run_dir, "cf")
    folder = (run_dir.path / FOLDER).absolute()
    fingerprint = compute_step_fingerprint(config, run_dir, "cf") | {
        f"config.cf_search.{name}": value for name, value in flatten_config(config.cf_search).items()
    }
    return run_once(
        folder,
        run_dir.path,
        "cf",
        fingerprint,
        show=lambda summary: print_leaderboard(_describe_result(config, folder), summary, folder),
        search=lambda: _search(config, run_dir, folder, trials, fingerprint),
    )


def describe_search(config: Config) -> list[str]:
    """Return the settings of each trial."""
    return [f"trial {number:3} {describe_settings(settings)}" for number, settings in enumerate(_plan_trials(config))]


def _plan_trials(config: Config) -> list[Settings]:
    if config.cf.model == "none":
        raise ConfigError("cf_search: cf.model 'none' is not trained; set a collaborative model")
    if config.cf_search.grace_epochs > config.cf.num_epochs:
        raise ConfigError(f"cf_search.grace_epochs {config.cf_search.grace_epochs} exceeds cf.num_epochs "
                          f"{config.cf.num_epochs}: no trial could be stopped; lower it")  # fmt: skip
    return draw_settings(config)


def _search(
    config: Config, run_dir: RunDir, folder: Path, trials: Sequence[Settings], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    data_dir = run_dir.step_dir("data").absolute()
    configs = [apply_settings(config, settings) for settings in trials]
    _check_inputs(configs, data_dir)
    jobs = _plan_jobs(configs, trials, data_dir, folder, fingerprint)
    with clear_unfinished(folder), connect_ray(config.cluster):
        outcomes = _run_trials(config, jobs, trials, folder)
    ranked = rank_trials(outcomes, config.cf.select_metric)
    result = _describe_result(config, folder)

    summary = write_results(result, folder, ranked, lambda settings: apply_settings(config, settings)) | {
        "fingerprint": dict(fingerprint)
    }
    write_json(folder / "summary.json", summary)
    for job in jobs:
        shutil.rmtree(job.checkpoints, ignore_errors=True)
    for name in (_TEXTS, "tune"):
        shutil.rmtree(folder / name, ignore_errors=True)
    print_leaderboard(result, summary, folder)
    return summary


def _check_inputs(configs: Sequence[Config], data_dir: Path) -> None:
    """Check the models of all trials as the CF step does, each model once."""
    distinct = {}
    for config in configs:
        cf = config.cf
        distinct[compute_json_hash([cf.model, cf.arguments, cf.user_vectors, cf.item_vectors])] = config
    for config in distinct.values():
        check_inputs(config.cf, data_dir)
        if config.stage2.train_cf:
            check_tuning(config.cf.model)


def _plan_jobs(
    configs: Sequence[Config], trials: Sequence[Settings], data_dir: Path, folder: Path, fingerprint: Mapping[str, Any]
) -> list[Job]:
    """Return a job per trial; create its checkpoint folder and, for each width, a file of the items' text vectors."""
    jobs = []
    for number, (config, settings) in enumerate(zip(configs, trials, strict=True)):
        cf, item_text = config.cf, None
        if cf.item_text is not None:
            # The width suffices as a name: a folder holds one search, on one data step.
            item_text = folder / _TEXTS / f"{cf.item_text}.npy"
            write_text_vectors(data_dir, cf.item_text, item_text)
        checkpoints = folder / "trials" / f"{number:03d}" / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        key = compute_json_hash([drop_times(fingerprint), settings])
        seed = cf.seeds[0] if cf.seeds else config.run.seed
        jobs.append(Job(data_dir, checkpoints, key, cf, seed, splits=SPLITS, item_text=item_text))
    return jobs


def _describe_result(config: Config, folder: Path) -> SearchResult:
    metric = config.cf.select_metric
    logs = {int(path.parent.name): path for path in (folder / "trials").glob("*/metrics.jsonl")}
    return SearchResult(
        name="cf_search",
        metric=metric,
        metrics=METRICS,
        space=config.cf_search.space,
        unit="epoch",
        curves={number: read_curve(log, metric) for number, log in logs.items()},
        next_command=suggest_command(RunDir(Path(config.run.dir)), "cf", "python launch/pretrain_cf.py --config"),
        prefix="cf.",
    )


def _run_trials(config: Config, jobs: Sequence[Job], trials: Sequence[Settings], folder: Path) -> list[Trial]:
    """Run the remaining trials with Tune."""
    # Tune would return a seemingly finished result on Ctrl-C, write three more logs per trial, and print a banner.
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
                   "RAY_AIR_NEW_OUTPUT": "0", "TUNE_GLOBAL_CHECKPOINT_S": _STATE_SECONDS,
                   "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0"}  # fmt: skip
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    parallel = config.cf_search.parallel_trials or int(gpus or cpus)
    trainable = tune.with_resources(
        tune.with_parameters(run_here(run_trial), jobs=tuple(jobs), tensorboard=config.monitoring.tensorboard),
        {"CPU": 1, "GPU": min(1.0, gpus / parallel)},
    )
    state = folder / "tune"
    try:
        # Killed before its first state file, Tune cannot resume; the trials resume from their own checkpoints.
        if tune.Tuner.can_restore(str(state)) and any(state.glob("experiment_state-*.json")):
            print(f"cf_search: resumes from {state}")
            tuner = tune.Tuner.restore(str(state), trainable=trainable)
        else:
            shutil.rmtree(state, ignore_errors=True)
            tuner = _build_tuner(config, trials, trainable, parallel, folder)
        results = list(tuner.fit())
    except CollmError:
        raise
    except Exception as error:
        raise LaunchError(f"cf_search: Ray Tune failed ({error}); run the command again to resume") from error
    outcomes: list[Trial] = []
    for result in results:
        number = result.config["trial"] if result.config else len(outcomes)
        cause = str(getattr(result.error, "cause", None) or result.error or "")
        trial = Trial.from_report(number, trials[number], result.metrics or {}, cause.strip()[-300:])
        outcomes.append(replace(trial, is_own=number == 0))
    return outcomes


def _build_tuner(config: Config, trials: Sequence[Settings], trainable: Any, parallel: int, folder: Path) -> tune.Tuner:
    metric, search = config.cf.select_metric, config.cf_search
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(range(len(trials))))},
        tune_config=tune.TuneConfig(
            metric=f"valid_{metric}",
            mode="min" if metric == "logloss" else "max",
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=config.cf.num_epochs + 1,  # at max_t ASHA would stop a trial in its last epoch
                grace_period=search.grace_epochs,
                reduction_factor=search.reduction_factor,
            ),
            max_concurrent_trials=parallel,
            reuse_actors=True,
            trial_dirname_creator=_name_trial,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(folder), verbose=0, callbacks=[ProgressLines(trials, metric)]
        ),
    )


def _name_trial(trial: Any) -> str:
    return f"{trial.config['trial']:03d}"


def run_trial(settings: Mapping[str, int], jobs: Sequence[Job], tensorboard: bool) -> None:
    """Train one model as a Tune trial, and report the best metrics so far after each epoch.

    Args:
        settings: ``{"trial": number}``.
        jobs: jobs of all trials.
        tensorboard: whether the trial writes TensorBoard logs.
    """
    job = jobs[settings["trial"]]
    state = job.read_state("final")
    best: dict[str, Any] = {}
    if state is not None:
        best = {"best_epoch": state.progress.best_epoch, **state.progress.best_metrics}

    def report(epoch: int, metrics: Mapping[str, float]) -> None:
        nonlocal best
        if not best or is_better(metrics, best, job.cf.select_metric):
            best = {"best_epoch": epoch, **metrics}
        tune.report({"epoch": epoch, "finished": False, **best})

    run_single_worker(job, LogTarget(job.checkpoints.parent, tensorboard), report)
    state = job.read_state("final")
    assert state is not None
    tune.report({"epoch": state.progress.epoch, "finished": True, **best})


class ProgressLines(tune.Callback):  # type: ignore[misc]
    """Tune callback that prints a line for every trial that ends."""

    def __init__(self, trials: Sequence[Settings], metric: str) -> None:
        """Take the settings of all trials, and the metric to print."""
        self._trials, self._metric = trials, metric

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print a trial that has finished or was stopped."""
        self._show(trials, trial, Trial.from_report(trial.config["trial"], {}, trial.last_result or {}, "").state)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print a trial that has failed."""
        self._show(trials, trial, "failed")

    def _show(self, trials: list[Any], trial: Any, state: str) -> None:
        number, result = trial.config["trial"], trial.last_result or {}
        done = sum(other.status in ("TERMINATED", "ERROR") for other in trials if other is not trial) + 1
        value = result.get(f"valid_{self._metric}")
        shown = "" if value is None else f"{self._metric} {value:.4f}, {result['epoch']} epochs, "
        print(f"  [{done}/{len(self._trials)}] trial {number} {state}: {shown}"
              f"{describe_settings(self._trials[number])}", flush=True)  # fmt: skip
