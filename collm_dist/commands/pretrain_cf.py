"""Train the collaborative model: ``python launch/pretrain_cf.py --config C``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collm_dist.cli import run_command
from collm_dist.config import Config
from collm_dist.runs.run_dir import RunDir

EXAMPLES = """examples:
  python launch/pretrain_cf.py --config configs/ml100k_demo.yaml
  python launch/pretrain_cf.py --config configs/ml1m_official.yaml cf.embedding_dim=32 --force cf
"""


def _run(config: Config, arguments: argparse.Namespace) -> None:
    from collm_dist.data.accepted_config import accept_config
    from collm_dist.monitoring import track_run
    from collm_dist.orchestration.pretrain import run_pretrain
    from collm_dist.runs.forced_redo import track_redo
    from collm_dist.runs.lock import hold_run_lock
    from collm_dist.runs.promotion import pin_previous

    run_dir = RunDir(Path(config.run.dir))
    with hold_run_lock(run_dir.path) as is_owner:
        config = pin_previous(config)
        accept_config(config, run_dir, arguments.force, own=["cf"])
        with (
            track_redo(run_dir, arguments.force, is_owner=is_owner) as begun,
            track_run(config, run_dir, arguments.force, begun, is_owner=is_owner),
        ):
            run_pretrain(config, run_dir, force="cf" in arguments.force)


def main() -> int:
    """Run the command and return its exit code."""
    description = "Step 'cf', after 'data': train the collaborative-filtering model, on Ray Train."
    return run_command(description, _run, EXAMPLES, steps=["cf"])


if __name__ == "__main__":
    sys.exit(main())
