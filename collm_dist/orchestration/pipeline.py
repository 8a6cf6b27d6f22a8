"""All steps in order, each only if it is not done. A finished run is recognised in a moment: imports are late."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from collm_dist.artifacts import STEPS, RunDir, Step, find_changes, is_step_current, open_atomic
from collm_dist.cli import describe_error, report_error
from collm_dist.config import Config
from collm_dist.config_io import dump_config
from collm_dist.data.fingerprints import compute_step_fingerprint
from collm_dist.errors import ArtifactError, CollmError, ConfigError
from collm_dist.orchestration.children import StepError, build_command, build_environment, run_child
from collm_dist.orchestration.reuse import find_reusable, link_step
from collm_dist.orchestration.run_lock import hold_run_lock
from collm_dist.orchestration.status import RunStatus

# Ray's job supervisor sets this for a job's entry point.
_RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def run_pipeline(config: Config, launch_dir: Path, force: Sequence[Step] = ()) -> int:
    """Run all steps, keep ``status.json``, print it as the last line and return the exit code.

    Args:
        config: the experiment.
        launch_dir: folder of ``train.py`` and ``evaluate_model.py``.
        force: steps to redo; those after the first of them follow.
    """
    run_dir = RunDir(Path(config.run.dir))
    status = RunStatus(run_dir.path / "status.json")
    report = None
    try:
        _check_run_dir(config)
        with hold_run_lock(run_dir.path, status.beat):
            status.begin()
            try:
                _run_steps(config, run_dir, launch_dir, force, status)
            except StepError as error:  # its process has printed it
                report = describe_error(error)
            except (Exception, KeyboardInterrupt) as error:
                report = report_error(error)
            status.end(report)
    except CollmError as error:  # before the lock was ours
        report = report_error(error)
        status.end(report)
    print(status.line, flush=True)
    return report.exit_code if report else 0


def list_steps(config: Config) -> tuple[Step, ...]:
    """Return the steps of an experiment, in order."""
    return tuple(step for step in STEPS if step != "stage1" or config.stage1.enabled)


def _check_run_dir(config: Config) -> None:
    if _RAY_JOB_VARIABLE in os.environ and not Path(config.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir: '{config.run.dir}' is relative; inside a Ray job that is the uploaded copy of the working "
            "directory, which is thrown away: give an absolute path on a file system that all nodes share"
        )


def _run_steps(config: Config, run_dir: RunDir, launch_dir: Path, force: Sequence[Step], status: RunStatus) -> None:
    with open_atomic(run_dir.path / "config.yaml") as file:
        file.write(dump_config(config))
    forced = False
    with ExitStack() as ray_session:
        for step in list_steps(config):
            status.enter(step)
            forced = forced or step in force
            if not forced and _is_there(config, run_dir, step):
                continue
            print(f"== {step}", flush=True)
            if step in ("data", "cf"):
                _run_on_ray(config, run_dir, step, forced, ray_session)
            else:
                ray_session.close()  # its memory is wanted
                _run_as_child(config, run_dir, step, forced, launch_dir)


def _is_there(config: Config, run_dir: RunDir, step: Step) -> bool:
    """Return whether a step is done, or is done in another run and now linked.

    Raises:
        ArtifactError: it was done with something else.
    """
    fingerprint = compute_step_fingerprint(config, run_dir, step)
    if _is_current(run_dir, step, fingerprint):
        print(f"{step}: done already ({run_dir.step_dir(step)})", flush=True)
        return True
    if run_dir.is_done(step):
        # Whether an older report is in the way of a new one, evaluation knows; all others raise.
        return step != "eval" and is_step_current(run_dir, step, fingerprint)
    other = find_reusable(step, fingerprint, config.run.reuse)
    if other is not None:
        link_step(step, other, run_dir)
        print(f"{step}: taken from {other.path}", flush=True)
    return other is not None


def _is_current(run_dir: RunDir, step: Step, fingerprint: dict[str, Any]) -> bool:
    return run_dir.is_done(step) and not find_changes(run_dir.read_record(step).get("fingerprint", {}), fingerprint)


def _run_on_ray(config: Config, run_dir: RunDir, step: Step, force: bool, session: ExitStack) -> None:
    from collm_dist.orchestration.cluster import connect_ray

    session.enter_context(connect_ray(config.cluster))  # the second step finds the first one's cluster
    if step == "data":
        from collm_dist.orchestration.preprocess import run_preprocess

        run_preprocess(config, run_dir, force)
    else:
        from collm_dist.orchestration.pretrain import run_pretrain

        run_pretrain(config, run_dir, force)


def _run_as_child(config: Config, run_dir: RunDir, step: Step, force: bool, launch_dir: Path) -> None:
    import torch

    script = "evaluate_model.py" if step == "eval" else "train.py"
    # The settings of this run, whatever happens to the file that they came from.
    arguments = ["--config", str(run_dir.path / "config.yaml")]
    if step != "eval":
        arguments += ["--stage", step.removeprefix("stage")]
    if force:
        arguments += ["--force", step]
    processes, gpus = config.cluster.num_processes, torch.cuda.device_count()
    command = build_command(launch_dir / script, arguments, processes, gpus)
    run_child(command, build_environment(processes, gpus))
    # The launcher's exit status says nothing of processes that were ended by a signal.
    if not _is_current(run_dir, step, compute_step_fingerprint(config, run_dir, step)):
        raise ArtifactError(f"step '{step}' ended without its record {run_dir.record_path(step)}; see its output above")


def describe_plan(config: Config, run_dir: RunDir) -> list[str]:
    """Return one line for each step about what the pipeline would do, and the numbers that follow from the data."""
    lines, ready = [], True
    for step in list_steps(config):
        if not ready:
            lines.append(f"{step:7} to do, after the steps before it")
            continue
        try:
            fingerprint = compute_step_fingerprint(config, run_dir, step)
            done = is_step_current(run_dir, step, fingerprint)
            other = None if done else find_reusable(step, fingerprint, config.run.reuse)
        except CollmError as error:
            lines += [f"{step:7} {line}" for line in describe_error(error).message.splitlines()]
            ready = False
            continue
        lines.append(f"{step:7} " + ("done" if done else f"to be taken from {other.path}" if other else "to do"))
        ready = done
    if run_dir.is_done("data"):
        from collm_dist.tuning.plan_report import describe_stage_plan

        lines += describe_stage_plan(config, run_dir)
    return lines
