"""Evaluate a run: ``deepspeed launch/evaluate_model.py --config C``, or plain ``python``."""

from __future__ import annotations

import argparse
from pathlib import Path

from collm_dist.cli import end_process, run_command
from collm_dist.config import Config
from collm_dist.runs.forced_redo import track_redo
from collm_dist.runs.lock import hold_run_lock
from collm_dist.runs.promotion import pin_previous
from collm_dist.runs.run_dir import RunDir

EXAMPLES = """examples:
  python launch/evaluate_model.py --config configs/ml100k_demo.yaml
  deepspeed launch/evaluate_model.py --config configs/ml1m_official.yaml evaluation.splits='[test]' --force eval
"""


def _run(config: Config, arguments: argparse.Namespace) -> None:
    # Late: DeepSpeed takes seconds to import and prints messages; --help and config errors do not need it.
    from collm_dist.data.accepted_config import accept_config
    from collm_dist.distributed import get_rank, leave_process_group
    from collm_dist.evaluation.report import run_evaluation
    from collm_dist.monitoring import track_run

    run_dir = RunDir(Path(config.run.dir))
    config = pin_previous(config)
    with hold_run_lock(run_dir.path) as is_owner:
        if get_rank() == 0:
            accept_config(config, run_dir, arguments.force, own=["eval"])
        with (
            track_redo(run_dir, arguments.force, is_owner=is_owner) as begun,
            track_run(config, run_dir, arguments.force, begun, is_owner=is_owner),
        ):
            run_evaluation(config, run_dir, force="eval" in arguments.force)
    leave_process_group()


def main(*, starts_processes: bool = False) -> int:
    """Run the command and return its exit code.

    Args:
        starts_processes: whether to start one process per GPU, as ``collm-dist evaluate`` does.
    """

    def run(config: Config, arguments: argparse.Namespace) -> None:
        if not starts_processes:
            return _run(config, arguments)
        from collm_dist.commands.process_launch import run_distributed

        return run_distributed(Path(__file__), config, lambda: _run(config, arguments))

    description = "Step 'eval': score every model of the run and the baselines, and write the report."
    return run_command(description, run, EXAMPLES, steps=["eval"])


if __name__ == "__main__":
    end_process(main())
