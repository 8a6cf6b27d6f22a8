"""``config.yaml`` of a run directory: written once a command's settings are accepted, and by no refused command."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence

import safetensors

from collm_dist.config import Config
from collm_dist.config.loader import dump_config
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.data.table_pins import describe_wanted
from collm_dist.errors import ConfigError
from collm_dist.monitoring import check_tracker
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.fingerprints import (
    check_checkpoint_fingerprint,
    compute_fingerprint,
    is_report_current,
    is_step_current,
)
from collm_dist.runs.local_paths import check_links
from collm_dist.runs.reuse import find_reusable
from collm_dist.runs.run_dir import CHECKPOINT_PATTERN, STEPS, RunDir, Step

CONFIG_FILE = "config.yaml"


def list_steps(config: Config) -> tuple[Step, ...]:
    """Return the steps of an experiment in order."""
    return tuple(step for step in STEPS if step != "stage1" or config.stage1.enabled)


def accept_config(
    config: Config,
    run_dir: RunDir,
    force: Sequence[Step] = (),
    own: Collection[Step] = STEPS,
    on_step: Callable[[Step], object] = lambda _: None,
) -> None:
    """Compare finished steps and an interrupted stage's checkpoint with the settings, then write ``config.yaml``.

    Steps after one that is not done are checked when their turn comes, but the settings of a report at once. The caller
    holds the run's lock.

    Args:
        config: the experiment.
        run_dir: its run directory.
        force: steps that are redone whatever they were made with, and so are all later ones.
        own: steps of the command. Of others only the settings are compared, since their inputs, such as the raw logs,
            need not be on this machine.
        on_step: called with each step before it is checked.

    Raises:
        ArtifactError: a step is done with other settings or inputs, or a link leads out of the run; the message names
            them, and nothing is written.
        CheckpointError: an interrupted stage has a checkpoint of other settings or inputs, and no run in ``run.reuse``
            has done the stage with these; nothing is written.
        ConfigError: a library that a setting needs is not installed, or ``force`` has a step that the command does not
            run.
    """
    steps = [step for step in list_steps(config) if step in own]
    for step in force:
        if step not in own:
            raise ConfigError(f"--force {step}: this command does not run {step}; it runs {', '.join(own)}")
        if step not in steps:
            raise ConfigError(f"--force {step}: {step}.enabled is false; set it to true, or omit --force {step}")
    check_tracker(config)
    check_links(run_dir.path)
    for step in list_steps(config):
        if step in force:
            break
        if not run_dir.is_done(step):
            if "eval" not in force and run_dir.is_done("eval"):
                _check_step(config, run_dir, "eval", is_own=False)
            if step in own:
                on_step(step)
                _check_checkpoint(config, run_dir, step)
            break
        on_step(step)
        _check_step(config, run_dir, step, is_own=step in own)
    run_dir.path.mkdir(parents=True, exist_ok=True)
    with open_atomic(run_dir.path / CONFIG_FILE) as file:
        file.write(dump_config(config))


def check_earlier_steps(config: Config, run_dir: RunDir, step: Step) -> None:
    """Check that the steps before one were made with these settings, up to the first that is not done.

    Raises:
        ArtifactError: a step is done with other settings; the message names them.
    """
    for earlier in list_steps(config):
        if earlier == step or not run_dir.is_done(earlier):
            return
        _check_step(config, run_dir, earlier, is_own=False)


def _check_step(config: Config, run_dir: RunDir, step: Step, *, is_own: bool) -> None:
    """Refuse other settings, and for a step of the command other inputs, than those that the step was made with."""
    if is_own:
        fingerprint = compute_step_fingerprint(config, run_dir, step)
    else:
        recorded = run_dir.read_record(step).get("fingerprint", {})
        settings = compute_fingerprint(config, step, run_dir, skip_missing=True)
        inputs = {key: value for key, value in recorded.items() if not key.startswith("config.")}
        fingerprint = inputs | {key: value for key, value in settings.items() if key.startswith("config.")}
        if step == "data":
            fingerprint |= describe_wanted(config.dataset, recorded)
    remedy = f"--force {step}" if is_own else f"collm-dist run --force {step}"
    if step == "eval":
        is_report_current(run_dir, fingerprint, remedy)
    else:
        is_step_current(run_dir, step, fingerprint, remedy)


def _check_checkpoint(config: Config, run_dir: RunDir, step: Step) -> None:
    """Refuse other settings than those of the newest checkpoint of an interrupted stage, if it is readable."""
    if not (paths := sorted((run_dir.step_dir(step) / "checkpoints").glob(CHECKPOINT_PATTERN))):
        return
    try:
        with safetensors.safe_open(str(paths[-1]), framework="numpy") as file:
            recorded = json.loads(file.metadata()["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
        return  # the stage resumes from the checkpoint before it, or names the damage
    fingerprint = compute_step_fingerprint(config, run_dir, step)
    if find_reusable(step, fingerprint, config.run.reuse) is None:
        check_checkpoint_fingerprint(paths[-1], recorded, fingerprint)
