"""Pipeline: all unfinished steps in order. Imports are late, so that a finished run ends within a second."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm_dist.cli import report_error
from collm_dist.config import Config
from collm_dist.data.accepted_config import CONFIG_FILE, accept_config, list_steps
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import CollmError, ConfigError, Preempted, StepError, WorkerLostError
from collm_dist.monitoring import StateTextfile, check_textfile_dir, track_run
from collm_dist.phases import show_phase
from collm_dist.runs.anchor_inputs import is_anchor_current
from collm_dist.runs.atomic_files import clear_unfinished, explain_disk_errors
from collm_dist.runs.file_hashes import check_files
from collm_dist.runs.fingerprints import find_changes, is_step_current
from collm_dist.runs.forced_redo import has_begun, note_begun, track_redo
from collm_dist.runs.lock import hold_run_lock
from collm_dist.runs.promotion import RECORD, pin_previous, promote
from collm_dist.runs.publish import Publisher, build_publisher
from collm_dist.runs.reuse import find_reusable, link_step
from collm_dist.runs.run_dir import STAGES, STEPS, RunDir, Step
from collm_dist.runs.status import RunStatus
from collm_dist.runs.step_processes import build_command, build_environment, run_child
from collm_dist.runs.stop_signals import preemptible

# Scripts that child processes run: of the installed package, so that no checkout is needed.
COMMANDS = Path(__file__).parents[1] / "commands"
# Ray's job supervisor sets this variable for a job's entry point.
_RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def run_pipeline(config: Config, force: Sequence[Step] = ()) -> int:
    """Run all steps, update ``status.json``, print it as the last line and return the exit code.

    Args:
        config: the experiment.
        force: steps to redo; all later steps are redone too. A redo that was interrupted resumes.
    """
    run_dir = RunDir(Path(config.run.dir))
    status = RunStatus(run_dir.path / "status.json", _build_textfile(config))
    failure: CollmError | None = None
    decision = None
    try:
        _check_run_dir(config)
        check_textfile_dir(config.monitoring.prometheus_dir)
        config = pin_previous(config)
        with hold_run_lock(run_dir.path, status.beat) as is_owner:
            with show_phase("checking the backbone and the collaborative model"):
                _check_names(config, run_dir)
            accept_config(config, run_dir, force, on_step=status.enter)
            status.begin()
            try:
                with (
                    preemptible(),
                    explain_disk_errors(run_dir.path),
                    track_redo(run_dir, _list_redone(config, force), is_owner=is_owner) as begun,
                    track_run(config, run_dir, force, begun, is_owner=is_owner),
                ):
                    publisher = build_publisher(config, run_dir)
                    _run_steps(config, run_dir, force, status, publisher)
                    decision = _promote(config, run_dir)
                    if publisher is not None:
                        publisher.publish_file(RECORD)
            except StepError as error:  # its process has printed it
                failure = error
            except (Exception, KeyboardInterrupt) as error:
                failure = report_error(error)
            status.end(failure, decision)
    except CollmError as error:  # before this process held the lock
        failure = report_error(error)
        status.end(failure)
    print(status.line, flush=True)
    return failure.exit_code if failure else 0


def _check_names(config: Config, run_dir: RunDir) -> None:
    """Check the CF model, DeepSpeed's settings and the backbone, which later steps would refuse.

    Raises:
        ConfigError, DataError: one of them does not exist, or does not fit the settings.
    """
    if not run_dir.is_done("cf"):
        from collm_dist.cf.models.registry import check_arguments

        check_arguments(config.cf)
    if not run_dir.is_done("stage2"):
        from collm_dist.tuning.deepspeed_config import check_extra
        from collm_dist.tuning.preflight import check_backbone

        check_extra(config.cluster.deepspeed_extra, config.cluster.zero_stage)
        check_backbone(config)


def _build_textfile(config: Config) -> StateTextfile | None:
    folder = config.monitoring.prometheus_dir
    return StateTextfile(Path(folder), run=config.run.dir, steps=list_steps(config)) if folder is not None else None


def _promote(config: Config, run_dir: RunDir) -> dict[str, Any] | None:
    """Return the promotion decision if there is a rule, and a proven loss against the anchor, for the status."""
    loss = run_dir.read_record("eval").get("proven_loss")
    if config.promotion.min_paired_difference is None:
        return {"state": "done", "reason": loss} if loss else None
    decision = promote(config, run_dir)
    if loss:  # which the rule, against another baseline or with a tolerance, may allow
        decision |= {"reason": f"{decision['reason']}; {loss}"}
    print(f"{decision['state']}: {decision['reason']}", flush=True)
    return decision


def _check_run_dir(config: Config) -> None:
    if _RAY_JOB_VARIABLE in os.environ and not Path(config.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir: '{config.run.dir}' is relative; inside a Ray job it would lie in the uploaded copy of the "
            "working directory, which is deleted: set an absolute path on a file system that all nodes share"
        )


def _run_steps(
    config: Config,
    run_dir: RunDir,
    force: Sequence[Step],
    status: RunStatus,
    publisher: Publisher | None,
) -> None:
    if publisher is not None:  # first, so that an unwritable destination is found before the work
        publisher.publish_file(CONFIG_FILE)
    forced = False
    # The workers of a Ray session end with it, after the steps' own blocks. The run's status is still being written.
    with clear_unfinished(*map(run_dir.step_dir, STEPS)), ExitStack() as ray_session:
        for step in list_steps(config):
            status.enter(step)
            forced = forced or step in force
            is_done = _is_redone if forced else _is_done_or_linked
            if not is_done(config, run_dir, step):
                print(f"== {step}", flush=True)
                if step in ("data", "cf"):
                    _run_on_ray(config, run_dir, step, forced, ray_session)
                else:
                    if config.cluster.tuning == "launcher":
                        ray_session.close()  # frees its memory
                    _run_child(_Child(config, run_dir, step, forced), status)
                if forced:
                    note_begun(run_dir, step, run_dir.read_record(step).get("fingerprint", {}))
            if step in STAGES:
                _make_anchor(config, run_dir)
            if publisher is not None:
                publisher.publish_step(step)


def _make_anchor(config: Config, run_dir: RunDir) -> None:
    """Make the anchor of a finished stage, unless it is there: a stage that was linked has it in the other run."""
    if not is_anchor_current(config, run_dir):
        from collm_dist.anchor import prepare_anchor

        prepare_anchor(config, run_dir)


def _list_redone(config: Config, force: Sequence[Step]) -> list[Step]:
    """Return the steps that ``force`` redoes: those from the first that it names."""
    return list(itertools.dropwhile(lambda step: step not in force, list_steps(config)))


def _run_child(child: _Child, status: RunStatus) -> None:
    cluster = child.config.cluster
    run_with_restarts(child.run, cluster.max_restarts, cluster.restart_backoff_seconds, status.restart)


def _is_done_or_linked(config: Config, run_dir: RunDir, step: Step) -> bool:
    """Return whether a step is done, here or in a reused run that is then linked.

    Raises:
        ArtifactError: it is done with another fingerprint, or one of its files is missing or damaged.
    """
    fingerprint = compute_step_fingerprint(config, run_dir, step)
    if _is_current(run_dir, step, fingerprint):
        check_files(run_dir, step, keep=True)
        print(f"{step}: done already ({run_dir.step_dir(step)})", flush=True)
        return True
    if run_dir.is_done(step):
        # Evaluation itself handles an outdated report; all other steps raise.
        return step != "eval" and is_step_current(run_dir, step, fingerprint)
    source = find_reusable(step, fingerprint, config.run.reuse)
    if source is not None:
        link_step(step, source, run_dir)
        print(f"{step}: taken from {source.path}", flush=True)
    return source is not None


def _is_redone(config: Config, run_dir: RunDir, step: Step) -> bool:
    """Return whether an interrupted redo has finished a step."""
    if not run_dir.is_done(step) or not has_begun(run_dir, step, compute_step_fingerprint(config, run_dir, step)):
        return False
    print(f"{step}: redone already ({run_dir.step_dir(step)})", flush=True)
    return True


def _is_current(run_dir: RunDir, step: Step, fingerprint: dict[str, Any]) -> bool:
    return run_dir.is_done(step) and not find_changes(run_dir.read_record(step).get("fingerprint", {}), fingerprint)


def _run_on_ray(config: Config, run_dir: RunDir, step: Step, force: bool, session: ExitStack) -> None:
    from collm_dist.orchestration.cluster import connect_ray

    session.enter_context(connect_ray(config.cluster))  # the second step uses the first step's cluster
    if step == "data":
        from collm_dist.orchestration.preprocess import run_preprocess

        run_preprocess(config, run_dir, force)
    else:
        from collm_dist.orchestration.pretrain import run_pretrain

        run_pretrain(config, run_dir, force)


# Exit codes of steps that can resume and did not fail by an error that would recur.
RESTARTED_EXIT_CODES = (Preempted.exit_code, WorkerLostError.exit_code)


def run_with_restarts(
    run: Callable[[], None], max_restarts: int, backoff_seconds: float, on_restart: Callable[[CollmError], None]
) -> None:
    """Run a step, and restart it if its processes are stopped or lost.

    Args:
        run: function that runs the step from its last checkpoint.
        max_restarts: number of restarts before the error is raised.
        backoff_seconds: wait before the first restart, in seconds; it doubles with each restart.
        on_restart: called with the error before a restart.
    """
    for restarts in itertools.count():
        try:
            return run()
        except (StepError, WorkerLostError) as error:
            if error.exit_code not in RESTARTED_EXIT_CODES or restarts == max_restarts:
                raise
            on_restart(error)
            seconds = backoff_seconds * 2**restarts
            print(
                f"{error.name}: {error}\n== again in {seconds:g} s, restart {restarts + 1} of {max_restarts}",
                flush=True,
            )
            time.sleep(seconds)


@dataclass
class _Child:
    """Tuning or evaluation step, which runs in processes of its own."""

    config: Config
    run_dir: RunDir
    step: Step
    force: bool

    def run(self) -> None:
        """Run the step to its end."""
        config, run_dir, step = self.config, self.run_dir, self.step
        if config.cluster.tuning == "ray":
            from collm_dist.orchestration.cluster import connect_ray
            from collm_dist.orchestration.tune import run_on_workers

            with connect_ray(config.cluster):
                run_on_workers(config, run_dir, step, self.force)
        else:
            self._launch()
        # The launcher's exit status does not show processes that were killed by a signal.
        if not _is_current(run_dir, step, compute_step_fingerprint(config, run_dir, step)):
            record = run_dir.record_path(step)
            raise WorkerLostError(f"step '{step}' ended without its record {record}: a process was killed by a signal")

    def _launch(self) -> None:
        config, step = self.config, self.step
        script = "evaluate_model.py" if step == "eval" else "train.py"
        # The run's own copy of the settings; the user's file may change meanwhile.
        arguments = ["--config", str(self.run_dir.path / CONFIG_FILE)]
        if step != "eval":
            arguments += ["--stage", step.removeprefix("stage")]
        if self.force:
            arguments += ["--force", step]
        import torch

        processes, gpus = config.cluster.num_processes, torch.cuda.device_count()
        command = build_command(COMMANDS / script, arguments, processes, gpus)
        run_child(command, build_environment(processes, gpus))


def describe_plan(config: Config, run_dir: RunDir) -> list[str]:
    """Return a line per step with its planned action, and numbers derived from the data."""
    _check_run_dir(config)
    config, lines, ready = pin_previous(config), [], True
    for step in list_steps(config):
        if not ready:
            lines.append(f"{step:7} to do, after the steps before it")
            continue
        try:
            fingerprint = compute_step_fingerprint(config, run_dir, step)
            done = is_step_current(run_dir, step, fingerprint)
            source = None if done else find_reusable(step, fingerprint, config.run.reuse)
        except CollmError as error:
            lines += [f"{step:7} {line}" for line in str(error).splitlines()]
            ready = False
            continue
        lines.append(f"{step:7} " + ("done" if done else f"to be taken from {source.path}" if source else "to do"))
        ready = done
    if run_dir.is_done("data"):
        from collm_dist.tuning.dry_run import describe_stage_plan

        lines += describe_stage_plan(config, run_dir)
    return lines
