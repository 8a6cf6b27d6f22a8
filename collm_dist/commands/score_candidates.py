"""Rank candidates: ``python launch/score_candidates.py --config C --input X.parquet --output DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collm_dist.cli import add_stage1_argument, add_trust_argument, run_command
from collm_dist.config import Config
from collm_dist.runs.lock import hold_run_lock
from collm_dist.runs.run_dir import RunDir

EXAMPLES = """examples:
  python launch/score_candidates.py --config C --input users.parquet --output ranked
  python launch/score_candidates.py --config C --input users.parquet --output ranked --candidates cf:200

input: Parquet with user_id, candidates and optionally history, history_labels, disliked, labels, as_of. A
user_id outside the log is valid. With --candidates cf:N the collaborative model retrieves N items that are new to each
user; the column allowed limits them to a list of ids, blocked leaves ids out.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=Path, required=True, metavar="X", help="Parquet file, or folder of Parquet files"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for scores/ and summary.json")
    parser.add_argument(
        "--candidates", metavar="cf:N", help="retrieve N candidates per user by the collaborative model"
    )
    parser.add_argument("--num-actors", type=int, metavar="N", help="models to load; default: one per GPU or node")
    parser.add_argument("--rows-per-part", type=int, default=128, metavar="N", help="users per output file")
    add_trust_argument(parser)
    add_stage1_argument(parser)


def _run(config: Config, arguments: argparse.Namespace) -> None:
    from collm_dist.orchestration.batch_ranking import parse_candidates, score_candidates

    sizes = {"num_actors": arguments.num_actors, "rows_per_part": arguments.rows_per_part}
    options = {"trust_code": arguments.trust_code, "accept_stage1": arguments.accept_stage_1, **sizes}
    run_dir, num_retrieved = RunDir(Path(config.run.dir)), parse_candidates(arguments.candidates)
    with hold_run_lock(arguments.output, setting="--output"):
        score_candidates(config, run_dir, arguments.input, arguments.output, num_retrieved=num_retrieved, **options)


def main() -> int:
    """Run the command and return its exit code."""
    description = "Rank users' candidates with a finished run, on Ray."
    return run_command(description, _run, EXAMPLES, _add_arguments)


if __name__ == "__main__":
    sys.exit(main())
