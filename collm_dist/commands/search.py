"""Search for settings of a step: ``python launch/search.py --config C --step cf|stage1|stage2``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collm_dist.cli import run_command
from collm_dist.config import Config
from collm_dist.runs.promotion import pin_previous
from collm_dist.runs.run_dir import RunDir

EXAMPLES = """examples:
  python launch/search.py --config configs/own_ratings.yaml --step stage1 stage_search.num_trials=12 --dry-run
  python launch/search.py --config configs/own_ratings.yaml --step stage2 \\
      stage_search.space='{stage2.learning_rate: {log_uniform: [1e-4, 1e-2]}, stage2.warmup_steps: {choice: [0, 50]}}'
  python launch/search.py --config configs/own_ratings.yaml --step cf cf_search.num_trials=60

Run the earlier steps first; trials share them. Trial 0 has the config's own settings if the space holds them; Optuna's
sampler draws the others from stage_search.space (for --step cf, Ray Tune draws them at random from cf_search.space),
and ASHA stops the worse trials early.
Trials are compared by select_metric of the step on valid; test is not scored. A trial uses one GPU, and trials run
side by side on all GPUs of the Ray cluster. After an interruption, the same command resumes.
<run.dir>/<step>_search has leaderboard.parquet, leaderboard.png, trials/ (curves and output), status.json and
best.yaml, the config with the best settings. The last lines show the command that uses it.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", choices=("cf", "stage1", "stage2"), required=True, help="step to search settings for")


def _run(config: Config, arguments: argparse.Namespace) -> None:
    config, run_dir = pin_previous(config), RunDir(Path(config.run.dir))
    from collm_dist.orchestration.cf_search import run_search  # late: --help needs no Ray
    from collm_dist.orchestration.stage_search import run_stage_search

    if arguments.step == "cf":
        run_search(config, run_dir)
    else:
        run_stage_search(config, run_dir, arguments.step)


def _describe(config: Config, run_dir: RunDir, arguments: argparse.Namespace) -> list[str]:
    from collm_dist.orchestration.cf_search import describe_search
    from collm_dist.orchestration.stage_search import describe_stage_search

    if arguments.step == "cf":
        return describe_search(config)
    return describe_stage_search(pin_previous(config), run_dir, arguments.step)


def main() -> int:
    """Run the command and return its exit code."""
    title = "Search for settings of a step, with trials side by side on Ray."
    return run_command(title, _run, EXAMPLES, _add_arguments, _describe)


if __name__ == "__main__":
    sys.exit(main())
