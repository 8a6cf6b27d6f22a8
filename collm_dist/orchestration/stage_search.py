"""Search for the settings of a tuning stage: Optuna's TPE sampler and asynchronous successive halving, on Ray.

A trial trains the stage like ``launch/train.py``, on the data, CF model and earlier stage of the run; it never sees
test rows. Trials are Ray actors. Optuna's journal and the checkpoints of the trials outlive a killed search, so the
same command loses a few steps of the trials that ran.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from collm_dist.cf.search_space import Settings
from collm_dist.config import Config
from collm_dist.config.loader import change_settings
from collm_dist.data.accepted_config import check_earlier_steps, list_steps
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import ConfigError
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.leaderboard import (
    SearchResult,
    choose_metric,
    print_leaderboard,
    rank_trials,
    read_curve,
    run_once,
    suggest_command,
    write_results,
)
from collm_dist.orchestration.stage_runner import TrialRunner, find_trial
from collm_dist.orchestration.stage_study import TrialConfigs, build_trial, list_trials, open_study
from collm_dist.orchestration.stage_trial import StageName, TrialPlan
from collm_dist.runs.atomic_files import clear_unfinished, write_json
from collm_dist.runs.fingerprints import compute_fingerprint, flatten_config
from collm_dist.runs.run_dir import RunDir

# Settings of a stage that a search must not choose, with the reason.
_NOT_SEARCHED = {
    "select_metric": "trials are compared by it",
    "guard_metric": "all trials are compared under the same guard",
    "guard_margin": "all trials are compared under the same guard",
    "max_valid_contexts": "all trials are compared on the same validation rows",
    "enabled": "trials train the stage",
    "refresh_every_days": "trials train the stage",
}
_DEFAULT_RATES: dict[Any, tuple[Any, ...]] = {"log_uniform": (3e-5, 3e-3)}


def run_stage_search(config: Config, run_dir: RunDir, stage: StageName) -> dict[str, Any]:
    """Run or resume a search and return its summary.

    Args:
        config: the experiment; ``stage_search`` holds the search space.
        run_dir: run whose steps before the stage are done.
        stage: the searched stage.

    Raises:
        ConfigError: a setting cannot be searched as configured, or no trial finished.
        ArtifactError: an earlier step is not done, or was made with other settings; or the folder holds another search.
        LaunchError: the run is in use, or Ray failed.
    """
    configs = plan_search(config, run_dir, stage)
    check_earlier_steps(config, run_dir, stage)
    folder = (run_dir.path / f"{stage}_search").absolute()
    fingerprint = compute_step_fingerprint(config, run_dir, stage) | {
        f"config.stage_search.{name}": value for name, value in flatten_config(config.stage_search).items()
    }
    return run_once(
        folder,
        run_dir.path,
        stage,
        fingerprint,
        show=lambda summary: print_leaderboard(_describe_result(configs, stage, {}), summary, folder),
        search=lambda: _search(configs, run_dir, folder, stage, fingerprint),
    )


def describe_stage_search(config: Config, run_dir: RunDir, stage: StageName) -> list[str]:
    """Return the searched settings and their domains."""
    search, configs = config.stage_search, plan_search(config, run_dir, stage)
    return [
        f"{search.num_trials} trials of {stage}, compared by valid {_get_metric(config, stage)}",
        *(f"  {name}: {kind} {list(values)}" for name, form in configs.space.items() for kind, values in form.items()),
    ]


def plan_search(config: Config, run_dir: RunDir, stage: StageName) -> TrialConfigs:
    """Check every setting of the search space and return the configurations of trials.

    Raises:
        ConfigError: the stage is not enabled; or a value is invalid, or a setting belongs to an earlier step, changes
            how trials are compared, or changes nothing.
    """
    if stage not in list_steps(config):
        raise ConfigError(f"{stage}.enabled is false, so there is nothing to search; set it to true")
    space = config.stage_search.space or {f"{stage}.learning_rate": _DEFAULT_RATES}
    own = compute_fingerprint(config, stage, run_dir, skip_missing=True)
    for name, form in space.items():
        ((kind, values),) = form.items()
        place = f"stage_search.space.{name}"
        variants = [_change(config, name, value, f"{place}.{kind}") for value in values]
        if kind in ("uniform", "log_uniform"):
            _check_fraction(config, name, kind, values)
        for variant in variants:
            _check_shared(config, variant, run_dir, stage, place)
        if all(compute_fingerprint(variant, stage, run_dir, skip_missing=True) == own for variant in variants):
            raise ConfigError(
                f"{place}: {kind} {list(values)} changes no result of {stage}, so all trials would be equal; search a "
                f"setting that {stage} trains with, such as {stage}.learning_rate"
            )
    return TrialConfigs(config, space)


def _change(config: Config, name: str, value: Any, place: str) -> Config:
    try:
        return change_settings(config, {name: value})
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_fraction(config: Config, name: str, kind: str, values: Sequence[float]) -> None:
    """Refuse a domain of real numbers for a setting that takes whole numbers, as its bounds may be."""
    low, high = values
    try:
        change_settings(config, {name: low + (high - low) / math.e})
    except ConfigError as error:
        raise ConfigError(
            f"stage_search.space.{name}.{kind}: draws numbers between {low} and {high}, and {error}; for whole numbers "
            f"set integer: [{math.ceil(low)}, {math.floor(high)}]"
        ) from None


def _check_shared(config: Config, variant: Config, run_dir: RunDir, stage: StageName, place: str) -> None:
    """Refuse a value that changes what all trials share: the earlier steps, and the rule that compares trials."""
    steps = list_steps(config)
    for step in steps[: steps.index(stage)]:
        # Of the settings alone: the raw logs need not be on this machine.
        fingerprints = [compute_fingerprint(each, step, run_dir, skip_missing=True) for each in (config, variant)]
        if fingerprints[0] != fingerprints[1]:
            remedy = "compare runs instead" if step == "data" else f"search it with launch/search.py --step {step}"
            raise ConfigError(f"{place}: changes the step '{step}', which trials of {stage} share; {remedy}")
    for setting, reason in _NOT_SEARCHED.items():
        if getattr(getattr(variant, stage), setting, None) != getattr(getattr(config, stage), setting, None):
            raise ConfigError(f"{place}: changes {stage}.{setting}, but {reason}; set it for the whole search")


def _get_metric(config: Config, stage: StageName) -> str:
    return (config.stage1 if stage == "stage1" else config.stage2).select_metric


def _search(
    configs: TrialConfigs, run_dir: RunDir, folder: Path, stage: StageName, fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    study = open_study(configs, folder)
    with clear_unfinished(folder), connect_ray(configs.config.cluster):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        plan = TrialPlan(RunDir(run_dir.path.absolute()), stage, num_gpus=min(gpus, 1), working_dir=Path.cwd())
        TrialRunner(
            configs, plan, folder, study, parallel=configs.config.stage_search.parallel_trials or max(gpus, 1)
        ).run()
    metric = _get_metric(configs.config, stage)
    trials = [build_trial(configs, trial) for trial in list_trials(study)]
    ranked = rank_trials(trials, metric)
    compared = choose_metric(trials, metric)
    curves = {trial.number: read_curve(_find_log(folder, trial.number), compared) for trial in trials}
    result = _describe_result(configs, stage, curves)

    def build_config(settings: Settings) -> Config:
        return change_settings(configs.config, settings)

    summary = write_results(result, folder, ranked, build_config) | {"fingerprint": dict(fingerprint)}
    write_json(folder / "summary.json", summary)
    print_leaderboard(result, summary, folder)
    return summary


def _describe_result(
    configs: TrialConfigs, stage: StageName, curves: Mapping[int, Sequence[tuple[int, float]]]
) -> SearchResult:
    metric = _get_metric(configs.config, stage)
    return SearchResult(
        name=f"{stage} search",
        metric=metric,
        metrics=tuple(dict.fromkeys([metric, "auc", "uauc", "logloss"])),
        space=configs.space,
        unit="step",
        curves=curves,
        next_command=suggest_command(
            RunDir(Path(configs.config.run.dir)), stage, f"python launch/train.py --stage {stage[-1]} --config"
        ),
    )


def _find_log(folder: Path, number: int) -> Path:
    return find_trial(folder, number) / "metrics.jsonl"
