"""Console command ``collm-dist``: one subcommand for each step and for each use of a finished run."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass

from collm_dist import __version__

# Imports are late throughout: --help and --version take a fraction of a second.


@dataclass(frozen=True)
class Subcommand:
    """Subcommand of ``collm-dist``.

    Attributes:
        module: name in this package, or a full name; its ``main`` runs the command and returns the exit code.
        help: one-line description.
        is_distributed: whether it runs as one process per GPU; ``main`` then takes ``starts_processes``.
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
    "search": Subcommand("search", "search for settings of the collaborative model or of a stage"),
    "export": Subcommand("export_model", "export a finished run as a folder"),
    "import": Subcommand("import_model", "make a run directory from an export"),
    "forget": Subcommand("forget_users", "list or remove runs that hold users who must be forgotten"),
    "convert": Subcommand("collm_dist.data.convert_collm_release", "convert the CoLLM authors' pickles to Parquet"),
    "assets": Subcommand("collm_dist.assets", "list named backbones and datasets, or fetch one"),
    "settings": Subcommand("collm_dist.config.reference", "print the reference of all settings"),
}


def main() -> int:
    """Run the subcommand named on the command line and return its exit code."""
    width = max(map(len, SUBCOMMANDS))
    listed = "\n".join(f"  {name:{width}}  {subcommand.help}" for name, subcommand in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="collm-dist",
        usage="collm-dist [--version] SUBCOMMAND ...",
        description="From raw interaction logs to a tuned CoLLM recommender.",
        epilog=f"subcommands:\n{listed}\n\nRun `collm-dist SUBCOMMAND --help` for the arguments of a subcommand.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"collm-dist {__version__}")
    parser.add_argument("subcommand", metavar="SUBCOMMAND", choices=SUBCOMMANDS, help=argparse.SUPPRESS)
    try:
        name = parser.parse_args(sys.argv[1:2] or ["--help"]).subcommand
    except SystemExit as stop:  # argparse has printed the help or the error
        return int(stop.code or 0)
    subcommand = SUBCOMMANDS[name]
    # The subcommand parses its own arguments and shows this name in its help.
    sys.argv = [f"collm-dist {name}", *sys.argv[2:]]
    package = "" if "." in subcommand.module else f"{__package__}."
    module = importlib.import_module(package + subcommand.module)
    code: int | None = module.main(starts_processes=True) if subcommand.is_distributed else module.main()
    return code or 0


def run_console() -> None:
    """Run the console command and end the process; the entry point that the wheel installs."""
    code = main()
    from collm_dist.cli import end_process

    end_process(code)
