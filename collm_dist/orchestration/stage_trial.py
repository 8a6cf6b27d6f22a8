"""A trial of a search for stage settings: a Ray actor with the process that trains the stage."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collm_dist.config import Config
from collm_dist.config.loader import change_settings, dump_config
from collm_dist.monitoring import read_metrics
from collm_dist.runs.error_file import ERROR_FILE_VARIABLE, read_error
from collm_dist.runs.lock import BEAT_SECONDS, STALE_SECONDS, end_processes, is_locked
from collm_dist.runs.reuse import link_step
from collm_dist.runs.run_dir import RunDir, Step
from collm_dist.runs.step_processes import build_command, build_environment, terminate_workers

StageName = Literal["stage1", "stage2"]
Validation = tuple[int, dict[str, float | None]]
# Environment variable of a trial's process, by which a process that outlived its actor is found.
_TRIAL_VARIABLE = "COLLM_SEARCH_TRIAL"
_STOP_SECONDS = 60.0
# A trial whose node was lost waits for its lock to become stale; then its process says who holds the lock.
_LOCK_SECONDS = STALE_SECONDS + BEAT_SECONDS
_TRAIN = Path(__file__).parents[1] / "commands" / "train.py"


@dataclass(frozen=True)
class TrialPlan:
    """Facts that all trials of a search share.

    Attributes:
        base: run whose earlier steps are used.
        stage: the searched stage.
        num_gpus: GPUs of a trial.
        working_dir: folder that relative paths in the config refer to.
    """

    base: RunDir
    stage: StageName
    num_gpus: int
    working_dir: Path

    def list_earlier_steps(self) -> list[Step]:
        """Return the steps before the stage that are done in the base run."""
        steps: list[Step] = ["data", "cf"] if self.stage == "stage1" else ["data", "cf", "stage1"]
        return [step for step in steps if self.base.is_done(step)]


@dataclass(frozen=True)
class TrialReport:
    """State of a trial.

    Attributes:
        validations: (step, metrics) so far, in order.
        has_ended: whether the process has ended.
        error: cause of a failure; empty = none.
    """

    validations: list[Validation]
    has_ended: bool
    error: str


class StageTrial:
    """Trains a stage in its own folder; another actor can resume from the checkpoints there."""

    def __init__(self, plan: TrialPlan, config: Config, folder: Path) -> None:
        """Start or resume the stage, once no process on another node holds the lock of its run.

        Args:
            plan: shared by all trials.
            config: the experiment with the trial's settings.
            folder: absolute folder of the trial, visible on all nodes.
        """
        self._folder = folder
        run_dir = RunDir(folder / "run")
        run_dir.path.mkdir(parents=True, exist_ok=True)
        end_trial_processes(folder)
        for step in plan.list_earlier_steps():
            link_step(step, plan.base, run_dir)
        if plan.base.anchor_dir.exists() and not run_dir.anchor_dir.exists():
            shutil.copytree(plan.base.anchor_dir, run_dir.anchor_dir)
        own: dict[str, Any] = {
            "run.dir": str(run_dir.path), "run.reuse": [], "cluster.num_processes": None,
            "monitoring.progress_bar": False, "monitoring.prometheus_dir": None, "stage1.refresh_every_days": None,
        }  # fmt: skip
        path = folder / "config.yaml"
        path.write_text(dump_config(change_settings(config, own)), encoding="utf-8")
        self._log = run_dir.step_dir(plan.stage) / "metrics.jsonl"
        self._error_file, self._output = folder / "error.json", folder / "output.txt"
        self._error_file.unlink(missing_ok=True)
        self._config, self._plan = path, plan
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = time.monotonic() + _LOCK_SECONDS
        self._start_if_free()

    def _start_if_free(self) -> None:
        """Start the process, unless the lock is still that of a process on a node that was lost."""
        if is_locked(self._folder / "run") and time.monotonic() < self._deadline:
            return
        plan = self._plan
        command = build_command(_TRAIN, ["--config", str(self._config), "--stage", plan.stage[-1]], 1, plan.num_gpus)
        environment = build_environment(1, plan.num_gpus)
        environment |= {ERROR_FILE_VARIABLE: str(self._error_file), _TRIAL_VARIABLE: str(self._folder)}
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - built by build_command
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=plan.working_dir
            )

    def read_state(self) -> TrialReport:
        """Return the state of the trial."""
        if self._process is None:
            self._start_if_free()
        code = None if self._process is None else self._process.poll()  # before the log is read
        return TrialReport(read_validations(self._log), code is not None, self._describe_failure(code) if code else "")

    def _describe_failure(self, code: int) -> str:
        error = read_error(self._error_file)
        return f"the process ended with exit code {code}; see {self._output}" if error is None else str(error)

    def stop(self) -> None:
        """Stop the stage if it still trains; it writes a checkpoint. Afterwards no process of the trial is left."""
        if self._process is None:
            return
        if self._process.poll() is None:
            # The launcher would end at the signal and leave its worker training.
            terminate_workers(self._process.pid)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        end_trial_processes(self._folder)  # those that hang, and survivors of a killed launcher
        self._process.wait()

    def end(self) -> None:
        """Stop the stage, keep its log, and delete its weights."""
        self.stop()
        keep_log(self._folder, self._plan.stage)


def end_trial_processes(folder: Path) -> None:
    """Kill the processes of a trial on this host, its launcher's workers included."""
    end_processes(_TRIAL_VARIABLE, str(folder))


def keep_log(folder: Path, stage: StageName) -> None:
    """Keep the log of a trial whose processes have ended, and delete its weights."""
    run_dir = RunDir(folder / "run")
    log = run_dir.step_dir(stage) / "metrics.jsonl"
    if log.exists():
        shutil.copy(log, folder / "metrics.jsonl")
    shutil.rmtree(run_dir.path, ignore_errors=True)


def read_validations(log: Path) -> list[Validation]:
    """Return the validations in a log that may still be written; it lacks metrics that are undefined."""
    validations: list[Validation] = []
    for line in read_metrics(log):
        metrics = {name.removeprefix("valid/"): line[name] for name in line if name.startswith("valid/")}
        if metrics:
            validations.append((line["step"], metrics))
    return validations
