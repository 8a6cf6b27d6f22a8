"""Search for the collaborative model's settings: ``python launch/search_cf.py --config C``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collm_dist.cli import run_command
from collm_dist.config import Config
from collm_dist.orchestration.search import describe_search, run_search
from collm_dist.runs.run_dir import RunDir

EXAMPLES = """examples:
  python launch/search_cf.py --config configs/ml100k_demo.yaml
  python launch/search_cf.py --config configs/ml1m_official.yaml cf.model=sasrec cf_search.num_trials=60 --dry-run
  python launch/search_cf.py --config configs/ml1m_official.yaml \\
      cf_search.space='{learning_rate: {log_uniform: [1e-4, 1e-2]}, num_layers: {choice: [1, 2, 3]}}'

Run the data step first. Trial 0 has the settings of the cf section, the others are drawn from cf_search.space; ASHA
stops the worse trials early. Trials are compared by cf.select_metric on valid; test is not scored. After an
interruption, the same command resumes. <run.dir>/cf_search has leaderboard.parquet, leaderboard.png, trials/ (curves),
status.json and best.yaml, the config with the best settings: python launch/pretrain_cf.py --config .../best.yaml
"""


def _run(config: Config, arguments: argparse.Namespace) -> None:
    run_search(config, RunDir(Path(config.run.dir)))


def main() -> int:
    """Run the command and return its exit code."""
    description = "Search for settings of the collaborative-filtering model, on Ray Tune."
    return run_command(description, _run, EXAMPLES, describe=describe_search)


if __name__ == "__main__":
    sys.exit(main())
