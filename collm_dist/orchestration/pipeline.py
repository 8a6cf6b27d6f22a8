"""All steps in order. Imports of torch and Ray wait until a step has to run, so that a finished run is told at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from collm_dist.artifacts import STEPS, RunDir, Step, compute_fingerprint, find_changes, is_step_current
from collm_dist.config import Config
from collm_dist.data.prompts import load_prompt_text
from collm_dist.errors import CollmError, ConfigError, LaunchError
from collm_dist.orchestration.run_lock import hold_run
from collm_dist.orchestration.status import Status

ROOT = Path(__file__).resolve().parents[2]


class StepFailedError(CollmError):
    """A step's own process failed; it has printed why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else 1
        self.retryable = exit_code in (3, 75)


def run_pipeline(config: Config, config_path: Path, overrides: Sequence[str], force: Sequence[str]) -> None:
    """Run what is not done yet, and print the state as the last line.

    Args:
        config: the experiment.
        config_path, overrides: what it was loaded from; steps in processes of their own load it again.
        force: steps to redo; the later ones follow.

    Raises:
        CollmError: as a step raised it.
    """
    if os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_JOB_SUBMISSION_ID"):
        _refuse_relative(config.run.dir)
    run_dir = RunDir(Path(config.run.dir))
    with hold_run(run_dir.path):
        status = Status(run_dir.path / "status.json")
        status.update(state="running")
        try:
            with status.beating():
                _run_steps(config, run_dir, config_path, overrides, force, status)
        except CollmError as error:
            status.fail(error)
            raise
        except BaseException as error:
            status.update(state="failed", error_class=type(error).__name__, exit_code=1, message=str(error))
            raise
        finally:
            if status.values["state"] == "running":
                status.update(state="done", step=None, exit_code=0)
            print(status.to_line(), flush=True)


def _refuse_relative(path: str) -> None:
    if not Path(path).is_absolute():
        raise ConfigError(
            f"run.dir: '{path}' is relative, and inside a Ray job that is the uploaded copy, which is thrown away; "
            "give an absolute path that all nodes share"
        )


def _run_steps(
    config: Config, run_dir: RunDir, config_path: Path, overrides: Sequence[str], force: Sequence[str], status: Status
) -> None:
    steps = [step for step in STEPS if step != "stage1" or config.stage1.enabled]
    forced = steps[min(steps.index(step) for step in force) :] if force else []  # type: ignore[arg-type]
    write_config(config, run_dir)
    for step in steps:
        status.update(step=step)
        fingerprint = compute_step_fingerprint(config, run_dir, step)
        if step not in forced and (
            is_step_current(run_dir, step, fingerprint) or _reuse(config, run_dir, step, fingerprint)
        ):
            print(f"{step}: done ({run_dir.record_path(step)})", flush=True)
            continue
        print(f"{step}: starting", flush=True)
        _RUNNERS[step](config, run_dir, _child_arguments(config_path, overrides, step, step in forced))
    print(f"\nReport: {run_dir.step_dir('eval') / 'report.md'}\nCurves: tensorboard --logdir {run_dir.path}")


def write_config(config: Config, run_dir: RunDir) -> None:
    """Write the resolved configuration into the run directory."""
    import yaml

    from collm_dist.artifacts import open_atomic

    with open_atomic(run_dir.path / "config.yaml") as file:
        yaml.safe_dump(config.model_dump(mode="json"), file, sort_keys=False, allow_unicode=True)


def compute_step_fingerprint(config: Config, run_dir: RunDir, step: Step) -> dict[str, Any]:
    """Return what a step depends on today, by the same rule as the step itself; needs neither torch nor Ray."""
    inputs: dict[str, Any] = {}
    if step == "data":
        from collm_dist.data.readers import open_source

        inputs = open_source(config.dataset).inputs()
    elif step in ("stage1", "stage2"):
        inputs = {"prompt": load_prompt_text(config.prompt.stage1 if step == "stage1" else config.prompt.stage2)}
    return compute_fingerprint(config, step, run_dir, inputs, skip_missing=step == "eval")


def _reuse(config: Config, run_dir: RunDir, step: Step, fingerprint: dict[str, Any]) -> bool:
    """Link a step with an equal fingerprint from one of ``run.reuse``."""
    for name in config.run.reuse:
        other = RunDir(Path(name))
        if not other.is_done(step) or find_changes(other.read_record(step).get("fingerprint", {}), fingerprint):
            continue
        target = run_dir.step_dir(step)
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            shutil.rmtree(target)
        target.symlink_to(other.step_dir(step).resolve(), target_is_directory=True)
        print(f"{step}: linked from {other.path}")
        return True
    return False


def _child_arguments(config_path: Path, overrides: Sequence[str], step: Step, forced: bool) -> list[str]:
    return ["--config", str(config_path), *overrides, *(["--force", step] if forced else [])]


def _run_data(config: Config, run_dir: RunDir, arguments: list[str]) -> None:
    from collm_dist.orchestration.preprocess import run_preprocess

    run_preprocess(config, run_dir, force="--force" in arguments)


def _run_cf(config: Config, run_dir: RunDir, arguments: list[str]) -> None:
    from collm_dist.orchestration.pretrain import run_pretrain

    run_pretrain(config, run_dir, force="--force" in arguments)


def _run_script(script: str, step: Step, *extra: str) -> Callable[[Config, RunDir, list[str]], None]:
    def run(config: Config, run_dir: RunDir, arguments: list[str]) -> None:
        command = [*_get_launcher(config), str(ROOT / "launch" / script), *arguments, *extra]
        environment = dict(os.environ)
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        code = subprocess.run(command, env=environment, check=False).returncode  # noqa: S603 - a list, no shell
        # The deepspeed launcher is silent about some deaths of its children: only the record counts.
        if code != 0 or not run_dir.is_done(step):
            raise StepFailedError(f"step '{step}' failed with exit code {code}; its own message is above", code)

    return run


def _get_launcher(config: Config) -> list[str]:
    """Return the command that starts the tuning processes of this machine."""
    import torch

    on_gpu = torch.cuda.is_available()
    count = config.cluster.num_processes or (torch.cuda.device_count() if on_gpu else 1)
    if count == 1:
        return [sys.executable]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    if not deepspeed.exists():
        raise LaunchError(f"{deepspeed} is missing: install deepspeed into this environment")
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Inside a Ray task CUDA_VISIBLE_DEVICES says which GPUs are ours; --num_gpus would make the launcher ignore it.
    limit = [] if on_gpu and config.cluster.num_processes is None else ["--num_gpus", str(count)]
    return [str(deepspeed), *limit]


_RUNNERS: dict[Step, Callable[[Config, RunDir, list[str]], None]] = {
    "data": _run_data,
    "cf": _run_cf,
    "stage1": _run_script("train.py", "stage1", "--stage", "1"),
    "stage2": _run_script("train.py", "stage2", "--stage", "2"),
    "eval": _run_script("evaluate_model.py", "eval"),
}
