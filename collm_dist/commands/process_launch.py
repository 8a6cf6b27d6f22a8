"""Distributed subcommands of ``collm-dist``: one process per GPU, without a launcher in the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from collm_dist.config import Config


def run_distributed(script: Path, config: Config, run: Callable[[], None]) -> None:
    """Run a script as one process per GPU with the deepspeed launcher, as the pipeline does.

    Where one process is enough, or a launcher has started this process already, the work is done in this process.

    Args:
        script: file whose ``main`` takes this command line.
        config: loaded from this command line.
        run: does the work in this process.

    Raises:
        StepError: the processes failed. Its message is worth printing again, after those of the launcher: the launcher
            may have killed rank 0 before it printed it.
        WorkerLostError, LaunchError, Preempted: see ``run_child``.
    """
    import torch

    from collm_dist.runs.step_processes import build_command, build_environment, run_child

    num_processes, num_gpus = config.cluster.num_processes, torch.cuda.device_count()
    if "RANK" in os.environ or (num_processes or max(1, num_gpus)) == 1:
        return run()
    command = build_command(script, sys.argv[1:], num_processes, num_gpus)
    run_child(command, build_environment(num_processes, num_gpus))
