"""Trials of a search for stage settings, run side by side as Ray actors."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import TrialState

from collm_dist.cf.search_space import describe_settings
from collm_dist.orchestration.stage_study import TrialConfigs, build_distribution, build_trial, list_trials
from collm_dist.orchestration.stage_trial import StageTrial, TrialPlan, TrialReport
from collm_dist.tuning.checkpoints import Progress
from collm_dist.tuning.selection import build_selection

_POLL_SECONDS = 0.5
# A trial whose actor is lost more often than this fails.
_MAX_LOSSES = 3


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


class TrialRunner:
    """Runs the trials of a study that are not done."""

    def __init__(
        self, configs: TrialConfigs, plan: TrialPlan, folder: Path, study: optuna.Study, *, parallel: int
    ) -> None:
        """Take the search; Ray must be connected.

        Args:
            configs: configurations of trials.
            plan: shared by all trials.
            folder: absolute folder of the search.
            study: Optuna's study, whose trials that ran before are queued.
            parallel: trials that run side by side.
        """
        self._configs, self._plan, self._folder, self._study, self._parallel = configs, plan, folder, study, parallel
        cpus = int(ray.cluster_resources().get("CPU", 1))
        options = {"num_cpus": 1 if plan.num_gpus else max(1, cpus // parallel), "num_gpus": plan.num_gpus}
        self._actors = ray.remote(StageTrial).options(**options)
        settings = configs.config
        self._rule = build_selection(settings.stage1 if plan.stage == "stage1" else settings.stage2)

    def run(self) -> None:
        """Run the trials; on an error or an interruption those that run stay resumable."""
        running: list[_Running] = []
        done = sum(trial.state.is_finished() for trial in list_trials(self._study))
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
        trial = self._study.ask({name: build_distribution(form) for name, form in self._configs.space.items()})
        if "number" not in trial.user_attrs:
            trial.set_user_attr("number", number)
        return _Running(trial, self._build_actor(trial), Progress())

    def _build_actor(self, trial: optuna.Trial) -> Any:
        folder = find_trial(self._folder, trial.user_attrs["number"])
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
        trial = build_trial(self._configs, self._study.trials[attempt])
        value = trial.metrics.get(self._rule.metric)
        shown = "" if value is None else f"{value:.4f} at step {trial.best_epoch} of {trial.epochs}, "
        settings = describe_settings(trial.settings)
        print(f"  [{done}/{total}] trial {trial.number} {trial.state}: {shown}{settings}{trial.error}", flush=True)


def find_trial(folder: Path, number: int) -> Path:
    """Return the folder of a trial."""
    return folder / "trials" / f"{number:03d}"
