"""Common parts of all commands: arguments, dry run, error reports, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from collm_dist.config import Config
from collm_dist.config.loader import dump_config, load_config
from collm_dist.errors import CollmError, ConfigError, InternalError, as_collm_error
from collm_dist.phases import show_phases
from collm_dist.runs.atomic_files import explain_disk_errors
from collm_dist.runs.code_trust import FLAG
from collm_dist.runs.error_file import write_error
from collm_dist.runs.run_dir import STEPS, RunDir, Step
from collm_dist.runs.stop_signals import handle_stop_signals, preemptible

_HOW_SETTINGS_WORK = """settings:
  Settings missing from the config file have defaults; configs/README.md lists every setting. section.key=value after
  the config file overrides it, for example: stage1.learning_rate=1e-4 evaluation.splits='[test]'

where results go:
  Everything is written below run.dir: data/ cf/ stage1/ stage2/ eval/. Finished steps are skipped; if their settings or
  inputs have changed, the command stops and names the changes. tensorboard --logdir <run.dir> shows the curves.

exit codes:
  0 done, 2 something to correct (settings, data, artifacts), 3 environment (devices, cluster, disk), 4 loss or gradient
  not finite, 75 stopped by a signal and 76 process lost (run the same command again to resume), 130 interrupted, 1 bug
  of this program. docs/reliability.md explains them.
"""


# Returns the lines of a command's plan for --dry-run.
Describe = Callable[[Config, RunDir, argparse.Namespace], list[str]]


def run_command(
    description: str,
    run: Callable[[Config, argparse.Namespace], int | None],
    examples: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    describe: Describe | None = None,
    steps: Sequence[Step] = (),
) -> int:
    """Parse the command line, load the configuration and run a command.

    Args:
        description: description of the command in ``--help``.
        run: function of the command. It takes the configuration and the arguments (``config_path``, ``overrides``,
            ``force``, and those that ``add_arguments`` added) and returns the exit code, or None for 0.
        examples: examples in ``--help``.
        add_arguments: function that adds the command's own arguments.
        describe: function that returns the plan's lines for ``--dry-run``.
        steps: steps that the command runs, which ``--force`` may name; without any it has no ``--force``.

    Returns:
        The exit code.
    """
    parser = build_parser(description, examples, steps)
    if add_arguments is not None:
        add_arguments(parser)
    try:
        arguments = parser.parse_intermixed_args()
    except SystemExit as stop:  # argparse has printed the help or the error
        return int(stop.code or 0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments.force = tuple(step for forced in arguments.force for step in forced)

    def run_checked() -> int | None:
        config = load_config(arguments.config_path, arguments.overrides)
        with explain_disk_errors(Path(config.run.dir)):
            _check_run_dir(Path(config.run.dir))
            _check_place(arguments.config_path, config, arguments.overrides)
            if arguments.dry_run:
                print_plan(config, arguments, describe)
                return 0
            show_phases(config.monitoring.progress_bar and os.environ.get("RANK", "0") == "0")
            return run(config, arguments)

    return run_reporting(run_checked)


def run_reporting(run: Callable[[], int | None]) -> int:
    """Run a command's work, report its error if it fails, and return the exit code.

    SIGTERM and SIGUSR1 end it as Ctrl-C does, with the exit code of ``Preempted``, unless the work handles them itself.
    """
    # When one process of a job fails, its launcher stops the others. The outer handler keeps that from ending them
    # before they have reported their own errors.
    with handle_stop_signals(lambda *_: None):
        try:
            with preemptible():
                return run() or 0
        except (Exception, KeyboardInterrupt) as error:
            return report_error(error).exit_code


def _check_run_dir(path: Path) -> None:
    """Refuse a run directory that is a file, or below one."""
    for part in (path, *path.absolute().parents):
        if part.exists():
            if not part.is_dir():
                raise ConfigError(f"run.dir: {path}: {part} is a file; set run.dir to a folder, new or of a run")
            return


def _check_place(config_path: Path, config: Config, overrides: Sequence[str]) -> None:
    """Refuse the config.yaml of a run whose ``run.dir`` leads elsewhere: the run was copied, or the folder is another.

    A relative ``run.dir`` is relative to the current folder, so the command would start a new run there.
    """
    folder = Path(config_path).absolute().parent
    is_of_a_run = Path(config_path).name == "config.yaml" and RunDir(folder).record_path("data").exists()
    is_given = any(override.startswith("run.dir=") for override in overrides)
    if is_of_a_run and not is_given and Path(config.run.dir).resolve() != folder.resolve():
        raise ConfigError(
            f"run.dir: {config_path} is the config of the run in {folder}, but its run.dir is '{config.run.dir}', "
            f"which is {Path(config.run.dir).absolute()} from the current folder; add run.dir={folder} to use that run"
        )


def end_process(exit_code: int) -> NoReturn:
    """Flush the output and end this process without shutting the interpreter down.

    For commands that have joined a process group: DeepSpeed keeps the group and its threads alive, and a thread that
    releases a tensor during interpreter shutdown would abort a process whose work is done.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader may have closed the pipe
            stream.flush()
    os._exit(exit_code)


def build_parser(description: str, examples: str, steps: Sequence[Step]) -> argparse.ArgumentParser:
    """Return the parser of the arguments that all commands take, with ``--force`` if the command runs steps."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"{examples.rstrip()}\n\n{_HOW_SETTINGS_WORK}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", dest="config_path", metavar="FILE", required=True, help="the experiment, as YAML")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file")
    parser.add_argument("--dry-run", action="store_true", help="print settings, plan and finished steps; needs no GPU")
    if steps:
        several = "; separate several with commas" if len(steps) > 1 else ""
        parser.add_argument(
            "--force",
            type=partial(_parse_steps, steps),
            action="append",
            metavar="STEP",
            help=f"redo a finished step: {', '.join(steps)}{several}",
        )
    parser.set_defaults(force=[])
    # Launchers add this argument; the environment has the same value.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag with which the caller allows the code of a received run, as ``trust_code``."""
    parser.add_argument(
        FLAG,
        dest="trust_code",
        action="store_true",
        help="run Python code that the run's files name (llm.trust_remote_code, a cf.model of its own); read it first. "
        "Runs that you trained need no flag",
    )


def add_stage1_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag with which the caller accepts stage 1 in place of stage 2, as ``accept_stage_1``."""
    parser.add_argument(
        "--accept-stage-1", action="store_true", help="rank with stage 1, without slots, if stage 2 is not done"
    )


def _parse_steps(own: Sequence[Step], text: str) -> tuple[str, ...]:
    steps = tuple(text.split(","))
    for step in steps:
        if step not in STEPS:
            raise argparse.ArgumentTypeError(f"unknown step '{step}'; this command runs {', '.join(own)}")
        if step not in own:
            raise argparse.ArgumentTypeError(
                f"this command does not run step '{step}'; it runs {', '.join(own)}, and collm-dist run every step"
            )
    return steps


def print_plan(config: Config, arguments: argparse.Namespace, describe: Describe | None) -> None:
    """Print the whole configuration, the state of each step, and the command's plan."""
    run_dir = RunDir(Path(config.run.dir))
    print(dump_config(config))
    if describe is None:
        lines = [f"{step:7} {'done' if run_dir.is_done(step) else 'not done'}" for step in STEPS]
    else:
        lines = describe(config, run_dir, arguments)
    print("\n".join([f"# {run_dir.path}", *(f"# {line}" for line in lines)]))


def report_error(error: BaseException) -> CollmError:
    """Print why a command fails, write it to the parent's error file, and return it with its exit code.

    Only an unexpected exception is printed with its traceback.
    """
    known = as_collm_error(error)
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if isinstance(known, InternalError):
        traceback.print_exception(error)
    if rank == "0" or not known.is_common:
        prefix = f"[process {rank}] " if world_size != "1" else ""
        prefix += f"{known.name}: " if known is error else ""
        print(f"{prefix}{known}", file=sys.stderr, flush=True)
    write_error(known)
    return known
