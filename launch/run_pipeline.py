"""Raw logs to report, all steps: ``python launch/run_pipeline.py --config C``; also under ``ray job submit``."""

from __future__ import annotations

import argparse
import sys

from collm_dist.cli import run_command
from collm_dist.config import Config
from collm_dist.orchestration.pipeline import run_pipeline

EXAMPLES = """examples:
  python launch/run_pipeline.py --config configs/ml100k_demo.yaml
  python launch/run_pipeline.py --config configs/own_clicks.yaml dataset.path=clicks.csv run.dir=runs/clicks
  ray job submit --working-dir . -- python launch/run_pipeline.py --config configs/own_ratings.yaml run.dir=/shared/run
Done steps are skipped; an interrupted run goes on where it was.
"""


def _run(config: Config, arguments: argparse.Namespace) -> None:
    run_pipeline(config, arguments.config_path, arguments.overrides, arguments.force)


def main() -> int:
    """Run the command; returns its exit code."""
    return run_command("Run all steps, from raw logs to the report.", _run, EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
