"""Search for the settings of a tuning stage: Optuna's TPE sampler and asynchronous successive halving, on Ray.

A trial trains the stage like ``launch/train.py``, on the data, CF model and earlier stage of the run; it never sees
test rows. Trials are Ray actors. Optuna's journal and the checkpoints of the trials outlive a killed search, so the
same command loses a few steps of the trials that ran.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from collm_dist.cf.search_space import Settings, describe_settings
from collm_dist.config import Config
from collm_dist.config.cf_search_section import SearchSpace
from collm_dist.config.loader import change_settings, get_setting
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import ConfigError
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.leaderboard import (
    SearchResult,
    Trial,
    print_leaderboard,
    rank_trials,
    read_curve,
    run_once,
    write_results,
)
from collm_dist.orchestration.stage_trial import StageName, StageTrial, TrialPlan, TrialReport
from collm_dist.runs.atomic_files import clear_unfinished, write_json
from collm_dist.runs.fingerprints import compute_fingerprint, flatten_config
from collm_dist.runs.run_dir import RunDir, Step
from collm_dist.tuning.checkpoints import Progress
from collm_dist.tuning.selection import build_selection

_DEFAULT_RATES: dict[Any, tuple[Any, ...]] = {"log_uniform": (3e-5, 3e-3)}
_POLL_SECONDS = 0.5
# A trial whose actor is lost more often than this fails.
_MAX_LOSSES = 3


@dataclass(frozen=True)
class TrialConfigs:
    """Configurations of trials, from the parameters that the sampler draws.

    Attributes:
        config: the experiment.
        space: searched settings and their domains; of a choice the sampler draws the index.
    """

    config: Config
    space: SearchSpace

    def read_settings(self, parameters: Mapping[str, Any]) -> Settings:
        """Return the settings by dotted name."""
        return {
            name: form["choice"][parameters[name]] if "choice" in form else parameters[name]
            for name, form in self.space.items()
        }

    def build(self, parameters: Mapping[str, Any]) -> Config:
        """Return the configuration of a trial."""
        return change_settings(self.config, self.read_settings(parameters))


def run_stage_search(config: Config, run_dir: RunDir, stage: StageName) -> dict[str, Any]:
    """Run or resume a search and return its summary.

    Args:
        config: the experiment; ``stage_search`` holds the search space.
        run_dir: run whose steps before the stage are done.
        stage: the searched stage.

    Raises:
        ConfigError: a setting cannot be searched as configured, or no trial finished.
        ArtifactError: an earlier step is not done, or the folder holds another search.
        LaunchError: the run is in use, or Ray failed.
    """
    configs = plan_search(config, run_dir, stage)
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
    """Check every value of the search space and return the configurations of trials.

    Raises:
        ConfigError: a value is invalid, or a setting belongs to an earlier step.
    """
    space = config.stage_search.space or {f"{stage}.learning_rate": _DEFAULT_RATES}
    earlier: list[Step] = ["data", "cf"] if stage == "stage1" else ["data", "cf", "stage1"]
    for name, form in space.items():
        ((kind, values),) = form.items()
        for value in values:
            try:
                changed = change_settings(config, {name: value})
            except ConfigError as error:
                raise ConfigError(f"stage_search.space.{name}.{kind}: {error}") from None
            for step in filter(run_dir.is_done, earlier):
                # Of the settings alone: the raw logs need not be on this machine.
                if compute_fingerprint(config, step, run_dir) != compute_fingerprint(changed, step, run_dir):
                    remedy = "search it with launch/search.py --step cf" if step == "cf" else "compare runs instead"
                    raise ConfigError(
                        f"stage_search.space.{name}: changes the step '{step}', which trials of {stage} share; {remedy}"
                    )
    return TrialConfigs(config, space)


def _get_metric(config: Config, stage: StageName) -> str:
    return (config.stage1 if stage == "stage1" else config.stage2).select_metric


def _search(
    configs: TrialConfigs, run_dir: RunDir, folder: Path, stage: StageName, fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    study = _open_study(configs, folder)
    with clear_unfinished(folder), connect_ray(configs.config.cluster):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        plan = TrialPlan(RunDir(run_dir.path.absolute()), stage, num_gpus=min(gpus, 1), working_dir=Path.cwd())
        _Runner(
            configs, plan, folder, study, parallel=configs.config.stage_search.parallel_trials or max(gpus, 1)
        ).run()
    metric = _get_metric(configs.config, stage)
    trials = [_build_trial(configs, trial) for trial in _list_trials(study)]
    ranked = rank_trials(trials, metric)
    curves = {trial.number: read_curve(_find_log(folder, trial.number), metric) for trial in trials}
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
        next_command=f"python launch/train.py --stage {stage[-1]} --config",
    )


def _find_log(folder: Path, number: int) -> Path:
    return _find_trial(folder, number) / "metrics.jsonl"


def _find_trial(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:03d}"


def _open_study(configs: TrialConfigs, folder: Path) -> optuna.Study:
    """Open the study of a search; trials that ran when it was killed are queued again with their numbers."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = configs.config.stage_search
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "journal.jsonl"))),
        study_name="search",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=configs.config.run.seed, constant_liar=True),
        pruner=optuna.pruners.SuccessiveHalvingPruner(search.grace_validations, search.reduction_factor),
    )
    if not study.trials and (own := _find_own(configs)) is not None:
        study.enqueue_trial(own, user_attrs={"number": 0, "is_own": True})
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _list_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the last attempt at each trial, by its number; Optuna counts attempts."""
    last = {trial.user_attrs["number"]: trial for trial in study.trials if "number" in trial.user_attrs}
    return [last[number] for number in sorted(last)]


def _build_trial(configs: TrialConfigs, trial: FrozenTrial) -> Trial:
    report = trial.user_attrs.get("report", {})
    built = Trial.from_report(
        trial.user_attrs["number"], configs.read_settings(trial.params), report, trial.user_attrs.get("error", "")
    )
    return Trial(**{**vars(built), "is_own": trial.user_attrs.get("is_own", False)})


@dataclass
class _Running:
    """A trial that runs.

    Attributes:
        trial: Optuna's trial.
        actor: its actor, see ``StageTrial``.
        progress: the best validation so far, by the stage's rule.
        num_validations: validations reported to Optuna.
        losses: actors lost.
    """

    trial: optuna.Trial
    actor: Any
    progress: Progress
    num_validations: int = 0
    losses: int = 0


class _Runner:
    """Runs the trials of a study that are not done."""

    def __init__(
        self, configs: TrialConfigs, plan: TrialPlan, folder: Path, study: optuna.Study, *, parallel: int
    ) -> None:
        self._configs, self._plan, self._folder, self._study, self._parallel = configs, plan, folder, study, parallel
        cpus = int(ray.cluster_resources().get("CPU", 1))
        options = {"num_cpus": 1 if plan.num_gpus else max(1, cpus // parallel), "num_gpus": plan.num_gpus}
        self._actors = ray.remote(StageTrial).options(**options)
        settings = configs.config
        self._rule = build_selection(settings.stage1 if plan.stage == "stage1" else settings.stage2)

    def run(self) -> None:
        """Run the trials; on an error or an interruption those that run stay resumable."""
        running: list[_Running] = []
        done = sum(trial.state.is_finished() for trial in _list_trials(self._study))
        if done:
            print(f"stage_search: resumes; {done} trials are done")
        total = self._configs.config.stage_search.num_trials
        try:
            while done < total:
                while len(running) < min(self._parallel, total - done):
                    running.append(self._start(done + len(running)))
                for member in list(running):
                    if self._advance(member):
                        running.remove(member)
                        done += 1
                        self._print(member.trial.number, done, total)
                time.sleep(_POLL_SECONDS)
        finally:
            for member in running:
                with suppress(ray.exceptions.RayError):
                    ray.get(member.actor.stop.remote())

    def _start(self, number: int) -> _Running:
        trial = self._study.ask({name: _build_distribution(form) for name, form in self._configs.space.items()})
        if "number" not in trial.user_attrs:
            trial.set_user_attr("number", number)
        return _Running(trial, self._build_actor(trial), Progress())

    def _build_actor(self, trial: optuna.Trial) -> Any:
        folder = _find_trial(self._folder, trial.user_attrs["number"])
        return self._actors.remote(self._plan, self._configs.build(trial.params), folder)

    def _advance(self, member: _Running) -> bool:
        """Report a trial's new validations to Optuna, and return whether the trial has ended."""
        trial, progress = member.trial, member.progress
        try:
            state: TrialReport = ray.get(member.actor.read_state.remote())
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            member.losses += 1
            if member.losses > _MAX_LOSSES:
                trial.set_user_attr("error", f"its process was lost {member.losses} times: {error}"[-300:])
                self._study.tell(trial, state=TrialState.FAIL)
                return True
            member.actor = self._build_actor(trial)
            return False
        for step, metrics in state.validations[member.num_validations :]:
            self._rule.judge(progress, step, dict.fromkeys(["logloss", *self._rule.names]) | metrics)
            member.num_validations += 1
            best = {f"valid_{name}": value for name, value in progress.best_metrics.items() if value is not None}
            trial.set_user_attr("report", {"epoch": step, "best_epoch": progress.best_step, **best})
            trial.report(progress.best_value or 0.0, member.num_validations)
            if not state.has_ended and trial.should_prune():
                self._end(member, TrialState.PRUNED)
                return True
        if state.error:
            trial.set_user_attr("error", state.error[-300:])
            self._end(member, TrialState.FAIL)
        elif state.has_ended:
            trial.set_user_attr("report", {**trial.user_attrs["report"], "finished": True})
            self._end(member, TrialState.COMPLETE)
        return state.has_ended

    def _end(self, member: _Running, state: TrialState) -> None:
        ray.get(member.actor.end.remote())
        ray.kill(member.actor)
        value = member.progress.best_value if state == TrialState.COMPLETE else None
        self._study.tell(member.trial, value, state=state)

    def _print(self, attempt: int, done: int, total: int) -> None:
        trial = _build_trial(self._configs, self._study.trials[attempt])
        value = trial.metrics.get(self._rule.metric)
        shown = "" if value is None else f"{value:.4f} at step {trial.best_epoch} of {trial.epochs}, "
        settings = describe_settings(trial.settings)
        print(f"  [{done}/{total}] trial {trial.number} {trial.state}: {shown}{settings}{trial.error}", flush=True)


def _find_own(configs: TrialConfigs) -> dict[str, Any] | None:
    """Return the sampler's parameters of the config's own settings, or None if they are not in the space."""
    parameters = {}
    for name, form in configs.space.items():
        ((kind, values),) = form.items()
        value = get_setting(configs.config, name)
        if kind == "choice":
            plain = json.loads(json.dumps(values))
            if value not in plain:
                return None
            parameters[name] = plain.index(value)
        elif value is None or not values[0] <= value <= values[1]:
            return None
        else:
            parameters[name] = value
    return parameters


def _build_distribution(form: Mapping[Any, tuple[Any, ...]]) -> optuna.distributions.BaseDistribution:
    ((kind, values),) = form.items()
    if kind == "choice":
        return optuna.distributions.CategoricalDistribution(list(range(len(values))))
    low, high = values
    if kind == "integer":
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=kind == "log_uniform")
