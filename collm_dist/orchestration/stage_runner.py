"""Trials of a search for stage settings, run side by side as Ray actors."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import TrialState

from collm_dist.cf.search_space import describe_settings
from collm_dist.config import Config
from collm_dist.errors import ConfigError
from collm_dist.orchestration.stage_study import TrialConfigs, build_distribution, build_trial, list_trials
from collm_dist.orchestration.stage_trial import (
    StageTrial,
    TrialPlan,
    TrialReport,
    end_trial_processes,
    keep_log,
)
from collm_dist.tuning.checkpoints import Progress
from collm_dist.tuning.selection import build_selection

_POLL_SECONDS = 0.5
# A trial whose actor is lost more often than this fails.
_MAX_LOSSES = 3
# An actor without a place answers only once another trial has ended, so the others are asked meanwhile.
_ANSWER_SECONDS = 1.0
# Wait for a process that stops; its actor kills it before.
_STOP_SECONDS = 90.0
# Wait for an actor that has not answered yet: it may be starting its process, or have no place.
_START_SECONDS = 10.0
# A trial that waits longer for its place is mentioned, once a search.
_PLACE_SECONDS = 60.0


@dataclass
class _Running:
    """A trial that runs.

    Attributes:
        trial: Optuna's trial.
        config: the experiment with the trial's settings.
        actor: its actor, see ``StageTrial``.
        progress: the best validation so far, by the stage's rule.
        num_validations: validations reported to Optuna.
        losses: actors lost.
        question: the actor's answer to come; None = not asked.
        has_started: whether the actor has answered.
        begun: time at which the trial was submitted.
    """

    trial: optuna.Trial
    config: Config
    actor: Any
    progress: Progress
    num_validations: int = 0
    losses: int = 0
    question: Any = None
    has_started: bool = False
    begun: float = field(default_factory=time.monotonic)


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
        options = {"num_cpus": 1 if plan.num_gpus else _share_cpus(parallel), "num_gpus": plan.num_gpus}
        self._needs = f"{options['num_cpus']} CPU" + f" and {plan.num_gpus} GPU" * (plan.num_gpus > 0)
        self._has_warned = False
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
                    member = self._start(done + len(running))
                    if isinstance(member, _Running):
                        running.append(member)
                    else:
                        done += 1
                        self._print(member, done, total)
                for member in list(running):
                    if self._advance(member):
                        running.remove(member)
                        done += 1
                        self._print(member.trial.number, done, total)
                time.sleep(_POLL_SECONDS)
        finally:
            with suppress(ray.exceptions.RayError):
                self._stop(running)

    def _start(self, number: int) -> _Running | int:
        """Start the next trial. If its settings do not fit together, it fails: return Optuna's number of it."""
        trial = self._study.ask({name: build_distribution(form) for name, form in self._configs.space.items()})
        if "number" not in trial.user_attrs:
            trial.set_user_attr("number", number)
        try:
            config = self._configs.build(trial.params)
        except ConfigError as error:  # the plan has checked each value by itself, not their combinations
            trial.set_user_attr("error", str(error)[:300])
            self._study.tell(trial, state=TrialState.FAIL)
            return trial.number
        return _Running(trial, config, self._build_actor(trial, config), Progress())

    def _build_actor(self, trial: optuna.Trial, config: Config) -> Any:
        folder = find_trial(self._folder, trial.user_attrs["number"])
        return self._actors.remote(self._plan, config, folder)

    def _advance(self, member: _Running) -> bool:
        """Report a trial's new validations to Optuna, and return whether the trial has ended."""
        trial, progress = member.trial, member.progress
        try:
            state = self._read_state(member)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            member.losses += 1
            if member.losses > _MAX_LOSSES:
                self._kill(member)
                trial.set_user_attr("error", f"its process was lost {member.losses} times: {error}"[-300:])
                self._study.tell(trial, state=TrialState.FAIL)
                return True
            member.actor, member.has_started = self._build_actor(trial, member.config), False
            return False
        if state is None:
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

    def _read_state(self, member: _Running) -> TrialReport | None:
        """Return the state of a trial, or None if its actor has not answered yet."""
        if member.question is None:
            member.question = member.actor.read_state.remote()
        if not ray.wait([member.question], timeout=_ANSWER_SECONDS)[0]:
            self._mention_wait(member)
            return None
        answer, member.question = member.question, None
        state: TrialReport = ray.get(answer)
        member.has_started = True
        return state

    def _mention_wait(self, member: _Running) -> None:
        if not (member.has_started or self._has_warned) and time.monotonic() - member.begun > _PLACE_SECONDS:
            self._has_warned = True
            print(f"  trial {member.trial.user_attrs['number']} waits for {self._needs} on a node of the Ray cluster; "
                  "lower stage_search.parallel_trials to start trials only when they fit", flush=True)  # fmt: skip

    def _end(self, member: _Running, state: TrialState) -> None:
        """Stop a trial's process, free its resources and tell the study."""
        try:
            ray.get(member.actor.end.remote(), timeout=_STOP_SECONDS)
            ray.kill(member.actor)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # lost since its last answer
            self._kill(member)
            keep_log(self._find_folder(member), self._plan.stage)
        value = member.progress.best_value if state == TrialState.COMPLETE else None
        self._study.tell(member.trial, value, state=state)

    def _stop(self, running: list[_Running]) -> None:
        """Stop trials, which write a checkpoint."""
        stops = {member.actor.stop.remote(): member for member in running}
        started = [stop for stop, member in stops.items() if member.has_started]
        if started:
            ray.wait(started, num_returns=len(started), timeout=_STOP_SECONDS)
        ended = ray.wait(list(stops), num_returns=len(stops), timeout=_START_SECONDS)[0] if stops else []
        for member in (member for stop, member in stops.items() if stop not in ended):
            self._kill(member)

    def _kill(self, member: _Running) -> None:
        """Kill an actor that does not answer, and the processes on this host that it has started."""
        ray.kill(member.actor)
        end_trial_processes(self._find_folder(member))

    def _find_folder(self, member: _Running) -> Path:
        return find_trial(self._folder, member.trial.user_attrs["number"])

    def _print(self, attempt: int, done: int, total: int) -> None:
        trial = build_trial(self._configs, self._study.trials[attempt])
        shown = ""
        if trial.metrics:
            name = self._rule.metric if self._rule.metric in trial.metrics else "logloss"
            shown = f"{name} {trial.metrics[name]:.4f} at step {trial.best_epoch} of {trial.epochs}, "
        settings, cause = describe_settings(trial.settings), f": {trial.error}" if trial.error else ""
        print(f"  [{done}/{total}] trial {trial.number} {trial.state}: {shown}{settings}{cause}", flush=True)


def _share_cpus(parallel: int) -> int:
    """Return the CPUs of each of so many trials: no more than a node has, or no trial could be placed."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(sum(nodes) // parallel, max(nodes, default=1)))


def find_trial(folder: Path, number: int) -> Path:
    """Return the folder of a trial."""
    return folder / "trials" / f"{number:03d}"
