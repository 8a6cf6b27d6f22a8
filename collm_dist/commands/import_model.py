"""Make a run directory from an export: ``python launch/import_model.py --input DIR --run-dir R``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collm_dist.cli import add_trust_argument, run_reporting
from collm_dist.runs.run_dir import RunDir

DESCRIPTION = """Make a run directory from an export of launch/export_model.py. collm_dist.load_recommender and
launch/score_candidates.py --config R/config.yaml then give the scores of the exported run."""
EPILOG = """example:
  python launch/import_model.py --input exported --run-dir runs/imported

Every file is checked against its checksum first. Exit codes: 0 done, 2 the export is damaged or names code, or the
folder exists, 3 the disk is full or read-only."""


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="the export")
    parser.add_argument("--run-dir", type=Path, required=True, metavar="R", help="new folder")
    add_trust_argument(parser)
    try:
        arguments = parser.parse_args()
    except SystemExit as stop:  # argparse has printed the help or the error
        return int(stop.code or 0)

    def run() -> None:
        from collm_dist.serving.export import import_model

        print(import_model(arguments.input, RunDir(arguments.run_dir), trust_code=arguments.trust_code).path)

    return run_reporting(run)


if __name__ == "__main__":
    sys.exit(main())
