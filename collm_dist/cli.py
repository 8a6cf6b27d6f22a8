"""What all commands share: arguments, --dry-run, and errors as a message and an exit code instead of a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from collm_dist.artifacts import STEPS, RunDir
from collm_dist.config import Config
from collm_dist.config_io import load_config
from collm_dist.errors import CollmError

Run = Callable[[Config, argparse.Namespace], None]


def run_command(
    description: str,
    run: Run,
    examples: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    *,
    plan: Callable[[Config, RunDir], Sequence[str]] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, load the configuration, run, and return the exit code.

    Args:
        description: first line of ``--help``.
        run: the work, called with the configuration and the arguments.
        examples: last part of ``--help``.
        add_arguments: adds options of this command.
        plan: lines that ``--dry-run`` adds: derived numbers.
        arguments: the command line; default sys.argv.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, dest="config_path", metavar="FILE",
                        help="YAML of the experiment; every setting is described in configs/README.md")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="check and print what would be done; needs no GPU")
    parser.add_argument("--force", action="append", default=[], choices=STEPS, metavar="STEP",
                        help=f"redo this step although it is done ({', '.join(STEPS)}); may be repeated")  # fmt: skip
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    if add_arguments is not None:
        add_arguments(parser)
    known = parser.parse_intermixed_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(known.config_path, known.overrides)
        if known.dry_run:
            _print_dry_run(config, plan)
        else:
            run(config, known)
    except CollmError as error:
        if is_main:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def _print_dry_run(config: Config, plan: Callable[[Config, RunDir], Sequence[str]] | None) -> None:
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    run_dir = RunDir(Path(config.run.dir))
    for step in STEPS:
        print(f"{step:7} {'done' if run_dir.is_done(step) else 'to do'}  {run_dir.record_path(step)}")
    for line in plan(config, run_dir) if plan is not None else ():
        print(line)
