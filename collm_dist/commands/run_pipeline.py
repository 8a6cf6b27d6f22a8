"""Run every step of an experiment: ``python launch/run_pipeline.py --config C``, also under ``ray job submit``."""

from __future__ import annotations

import argparse
import sys

from collm_dist.cli import run_command
from collm_dist.config import Config
from collm_dist.orchestration.pipeline import describe_plan, run_pipeline
from collm_dist.runs.run_dir import STEPS

EXAMPLES = """examples:
  python launch/run_pipeline.py --config configs/ml100k_demo.yaml
  python launch/run_pipeline.py --config configs/own_ratings.yaml dataset.path=ratings.csv \\
      dataset.items_path=items.csv run.dir=runs/mine --dry-run
  python launch/run_pipeline.py --config configs/ml100k_demo.yaml stage2.learning_rate=3e-3 --force stage2
  ray job submit --working-dir . -- python launch/run_pipeline.py --config configs/ml1m_official.yaml run.dir=/shared/a

`ray job submit` needs the same RAY_AUTH_MODE (token or disabled) as the cluster's `ray start`: docs/cluster.md.
The last line of the output is <run.dir>/status.json: state, step, error, exit code, remedy.
"""


def _run(config: Config, arguments: argparse.Namespace) -> int:
    return run_pipeline(config, arguments.force)


def main() -> int:
    """Run the command and return its exit code."""
    description = (
        "Run every step of an experiment in order: data, cf, stage1, stage2, eval. Finished steps are skipped."
    )
    return run_command(
        description, _run, EXAMPLES, describe=lambda config, run_dir, _: describe_plan(config, run_dir), steps=STEPS
    )


if __name__ == "__main__":
    sys.exit(main())
