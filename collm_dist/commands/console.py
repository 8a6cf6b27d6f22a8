"""The console command ``collm-dist``: one subcommand for each step and for what is done with a finished run."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from collm_dist import __version__
from collm_dist.cli import build_parser, end_process, report_error
from collm_dist.config.loader import load_config


@dataclass(frozen=True)
class Subcommand:
    """A subcommand.

    Attributes:
        module: in this package, or a full name; its ``main`` runs the command and returns the exit code.
        help: one line.
        is_distributed: whether it runs as one process per GPU.
    """

    module: str
    help: str
    is_distributed: bool = False


# In the order of the data.
SUBCOMMANDS = {
    "run": Subcommand("run_pipeline", "run every step of an experiment; finished steps are skipped"),
    "preprocess": Subcommand("preprocess_data", "step data: raw logs to samples and shards"),
    "pretrain": Subcommand("pretrain_cf", "step cf: train the collaborative model"),
    "train": Subcommand("train", "steps stage1 and stage2: tune the language model", is_distributed=True),
    "evaluate": Subcommand("evaluate_model", "step eval: score all models and write the report", is_distributed=True),
    "rank": Subcommand("score_candidates", "rank the candidates of a file of users with a finished run"),
    "serve": Subcommand("serve", "serve rankings of a finished run over HTTP"),
    "search": Subcommand("search_cf", "search for settings of the collaborative model"),
    "export": Subcommand("export_model", "export a finished run as a folder"),
    "import": Subcommand("import_model", "make a run directory out of an export"),
    "forget": Subcommand("forget_users", "list or remove runs that hold users who are to be forgotten"),
    "convert": Subcommand(
        "collm_dist.data.convert_collm_release", "convert the CoLLM authors' pickled files to Parquet"
    ),
    "assets": Subcommand("collm_dist.assets", "list named backbones and data sets, or fetch one"),
    "settings": Subcommand("collm_dist.config.reference", "print the reference of all settings"),
}


def main() -> int:
    """Run the subcommand that the command line names and return its exit code."""
    width = max(map(len, SUBCOMMANDS))
    listed = "\n".join(f"  {name:{width}}  {command.help}" for name, command in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="collm-dist",
        usage="collm-dist [--version] SUBCOMMAND ...",
        description="From raw interaction logs to a tuned CoLLM recommender.",
        epilog=f"subcommands:\n{listed}\n\ncollm-dist SUBCOMMAND --help explains each one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"collm-dist {__version__}")
    parser.add_argument("subcommand", metavar="SUBCOMMAND", choices=SUBCOMMANDS, help=argparse.SUPPRESS)
    try:
        name = parser.parse_args(sys.argv[1:2] or ["--help"]).subcommand
    except SystemExit as stop:
        return int(stop.code or 0)
    subcommand = SUBCOMMANDS[name]
    package = "" if "." in subcommand.module else f"{__package__}."
    module = importlib.import_module(package + subcommand.module)
    # The command parses its own arguments, and its help shows this name.
    sys.argv = [f"collm-dist {name}", *sys.argv[2:]]
    run: Callable[[], int | None] = module.main
    if subcommand.is_distributed and not {"-h", "--help", "--dry-run"} & set(sys.argv) and "RANK" not in os.environ:
        return _run_distributed(Path(str(module.__file__)), run)
    return run() or 0


def _run_distributed(script: Path, run: Callable[[], int | None]) -> int:
    """Run a script as one process per GPU through the deepspeed launcher, or in this process if one is enough."""
    parser = build_parser("", "")
    given, _ = parser.parse_known_args()
    try:
        overrides = [text for text in given.overrides if "=" in text]
        num_processes = load_config(given.config_path, overrides).cluster.num_processes
        import torch

        from collm_dist.runs.step_processes import build_command, build_environment, run_child

        num_gpus = torch.cuda.device_count()
        if max(num_gpus, num_processes or 1) == 1:
            return run() or 0
        run_child(
            build_command(script, sys.argv[1:], num_processes, num_gpus), build_environment(num_processes, num_gpus)
        )
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error).exit_code
    return 0


def run_console() -> None:
    """Run the console command and end the process: the entry point that packaging installs."""
    end_process(main())
