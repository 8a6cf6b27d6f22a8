"""What all commands share: their arguments, the dry run, and how they end."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from collm_dist.config import Config
from collm_dist.config.loader import dump_config, load_config
from collm_dist.errors import CollmError, WorkerLostError
from collm_dist.runs.atomic_files import explain_disk_errors, write_json
from collm_dist.runs.run_dir import STEPS, RunDir

INTERRUPTED_EXIT_CODE = 130
# A parent process names a file here in which it wants to find why this one failed.
ERROR_FILE_VARIABLE = "COLLM_ERROR_FILE"

_HOW_SETTINGS_WORK = """settings:
  What the config file does not say has a default; configs/README.md lists every setting. section.key=value after the
  config file wins over it, for example: stage1.learning_rate=1e-4 evaluation.splits='[test]'

where results go:
  Everything is written below run.dir: data/ cf/ stage1/ stage2/ eval/. A step that is done is not done again; when its
  settings or inputs have changed, the command stops and names them. tensorboard --logdir <run.dir> shows the curves.

exit codes:
  0 done, 2 something to correct (settings, data, artifacts), 3 surroundings (devices, cluster, disk), 4 numbers that
  are not finite, 75 asked to stop and 76 a process lost, both ready to go on, 130 interrupted, 1 a fault of this
  program. docs/reliability.md has them in full.
"""


def run_command(
    description: str,
    run: Callable[[Config, argparse.Namespace], int | None],
    examples: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    describe: Callable[[Config, RunDir], list[str]] | None = None,
) -> int:
    """Parse the command line, load the configuration and run a command.

    Args:
        description: what the command does, for ``--help``.
        run: does it and returns the exit code, None for 0. It gets the configuration and the arguments:
            ``config_path``, ``overrides``, ``force`` (steps) and what ``add_arguments`` added.
        examples: for ``--help``.
        add_arguments: adds the command's own arguments.
        describe: lines about what the command would do, for ``--dry-run``.

    Returns:
        The exit code.
    """
    parser = build_parser(description, examples)
    if add_arguments is not None:
        add_arguments(parser)
    try:
        arguments = parser.parse_intermixed_args()
    except SystemExit as stop:  # argparse has printed its help or what is wrong
        return int(stop.code or 0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments.force = tuple(step for steps in arguments.force for step in steps)
    try:
        config = load_config(arguments.config_path, arguments.overrides)
        if arguments.dry_run:
            print_plan(config, describe)
            return 0
        with explain_disk_errors(Path(config.run.dir)):
            return run(config, arguments) or 0
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error).exit_code


def end_process(exit_code: int) -> NoReturn:
    """End this process once what it has printed is out, without taking the interpreter down.

    For commands that have been in a process group: DeepSpeed keeps the group, and so its threads, for good, and one
    that lets go of a tensor while the interpreter ends would abort a process whose work is done.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it may be gone
            stream.flush()
    os._exit(exit_code)


def build_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Return the parser of the arguments that all commands take."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"{examples.rstrip()}\n\n{_HOW_SETTINGS_WORK}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", dest="config_path", metavar="FILE", required=True, help="the experiment, as YAML")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--dry-run", action="store_true", help="show settings, plan and what is there; needs no GPU")
    parser.add_argument(
        "--force",
        type=_parse_steps,
        action="append",
        default=[],
        metavar="STEP",
        help=f"redo a step that is done: {', '.join(STEPS)}; several with commas",
    )
    # Launchers add this one; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def _parse_steps(text: str) -> tuple[str, ...]:
    steps = tuple(text.split(","))
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no step '{unknown[0]}'; the steps are {', '.join(STEPS)}")
    return steps


def print_plan(config: Config, describe: Callable[[Config, RunDir], list[str]] | None) -> None:
    """Print the whole configuration, which steps are done, and what the command would do."""
    run_dir = RunDir(Path(config.run.dir))
    print(dump_config(config))
    if describe is None:
        lines = [f"{step:7} {'done' if run_dir.is_done(step) else 'not done'}" for step in STEPS]
    else:
        lines = describe(config, run_dir)
    print("\n".join([f"# {run_dir.path}", *(f"# {line}" for line in lines)]))


@dataclass(frozen=True)
class ErrorReport:
    """How a command failed.

    Attributes:
        error: class of the error.
        message: what it says.
        exit_code: of the command.
        retryable: whether the same command can succeed without a change.
    """

    error: str
    message: str
    exit_code: int
    retryable: bool


def describe_error(error: BaseException) -> ErrorReport:
    """Return what an error means for a command."""
    if isinstance(error, CollmError):
        return ErrorReport(error.name, str(error), error.exit_code, error.retryable)
    name = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return ErrorReport(name, "interrupted; the same command goes on from here", INTERRUPTED_EXIT_CODE, True)
    return ErrorReport(name, f"internal error, please report it: {name}: {error}", 1, False)


def report_error(error: BaseException) -> ErrorReport:
    """Print why a command ends, without a traceback where a user can act, and tell a parent process that asked."""
    report = describe_error(error)
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if report.exit_code == 1:
        traceback.print_exception(error)
    if rank == "0" or not (isinstance(error, CollmError) and error.is_common):
        place = f"[process {rank}] " if size != "1" else ""
        shown = f"{report.error}: {report.message}" if isinstance(error, CollmError) else report.message
        print(f"{place}{shown}", file=sys.stderr, flush=True)
    if ERROR_FILE_VARIABLE in os.environ:
        _tell_parent(Path(os.environ[ERROR_FILE_VARIABLE]), report)
    return report


def _tell_parent(path: Path, report: ErrorReport) -> None:
    """Write the report, unless another process of the job has told a cause before; losing a process is none."""
    told = json.loads(path.read_text(encoding="utf-8"))["error"] if path.exists() else None
    if told is None or (told == WorkerLostError.__name__ and report.error != told):
        write_json(path, asdict(report))
