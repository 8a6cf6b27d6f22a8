"""Tune the language model: ``deepspeed launch/train.py --config C [--stage 1|2]``; torchrun and python work too."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from collm_dist.cli import end_process, run_command
from collm_dist.config import Config
from collm_dist.errors import ConfigError
from collm_dist.runs.forced_redo import track_redo
from collm_dist.runs.lock import hold_run_lock
from collm_dist.runs.promotion import pin_previous
from collm_dist.runs.run_dir import RunDir

DESCRIPTION = "Steps 'stage1' and 'stage2', after 'data' and 'cf': tune the language model with DeepSpeed."
EXAMPLES = """examples:
  deepspeed launch/train.py --config configs/ml100k_demo.yaml             both stages, on all GPUs
  torchrun --nproc_per_node 2 launch/train.py --config configs/ml1m_official.yaml --stage 2 cluster.zero_stage=3
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=int, choices=(1, 2), help="1: LoRA on text, 2: the mapping; default: both")
    parser.add_argument("--deepspeed_config", type=Path, metavar="JSON", help="file for cluster.deepspeed_extra")


def _run(config: Config, arguments: argparse.Namespace) -> None:
    # late: --help needs neither torch nor DeepSpeed
    from collm_dist.data.accepted_config import accept_config
    from collm_dist.distributed import explain_lost_workers, get_rank, leave_process_group
    from collm_dist.monitoring import track_run
    from collm_dist.tuning.deepspeed_config import check_extra
    from collm_dist.tuning.preflight import check_backbone
    from collm_dist.tuning.run_stage import run_stage

    if arguments.deepspeed_config is not None:
        extra = read_deepspeed_config(arguments.deepspeed_config)
        merged = {**config.cluster.deepspeed_extra, **extra}
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"deepspeed_extra": merged})})
    run_dir = RunDir(Path(config.run.dir))
    check_extra(config.cluster.deepspeed_extra, config.cluster.zero_stage)
    check_backbone(config)
    config = pin_previous(config)
    with hold_run_lock(run_dir.path) as is_owner:
        if get_rank() == 0:
            accept_config(config, run_dir, arguments.force, own=_choose_stages(config, arguments.stage))
        with (
            track_redo(run_dir, arguments.force, is_owner=is_owner) as begun,
            track_run(config, run_dir, arguments.force, begun, is_owner=is_owner),
        ):
            for stage in _choose_stages(config, arguments.stage):
                with explain_lost_workers(lambda stage=stage: stage):  # type: ignore[misc]
                    run_stage(config, run_dir, stage, force=stage in arguments.force)
    leave_process_group()


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Return the settings in the file of ``--deepspeed_config``.

    Raises:
        ConfigError: the file cannot be read, or is not a JSON object.
    """
    try:
        extra = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed_config {path}: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError(
            f"--deepspeed_config {path}: the file holds {json.dumps(extra):.40}, not a JSON object; write DeepSpeed's "
            'settings by name, such as {"gradient_clipping": 1.0}'
        )
    return extra


def _choose_stages(config: Config, number: int | None) -> Sequence[Literal["stage1", "stage2"]]:
    if number is not None:
        return ["stage1"] if number == 1 else ["stage2"]
    return ["stage1", "stage2"] if config.stage1.enabled else ["stage2"]


def main(*, starts_processes: bool = False) -> int:
    """Run the command and return its exit code.

    Args:
        starts_processes: whether to start one process per GPU, as ``collm-dist train`` does.
    """

    def run(config: Config, arguments: argparse.Namespace) -> None:
        if not starts_processes:
            return _run(config, arguments)
        from collm_dist.commands.process_launch import run_distributed

        return run_distributed(Path(__file__), config, lambda: _run(config, arguments))

    def describe(config: Config, run_dir: RunDir, _: argparse.Namespace) -> list[str]:
        from collm_dist.tuning.dry_run import describe_stage_plan

        return describe_stage_plan(config, run_dir)

    return run_command(DESCRIPTION, run, EXAMPLES, _add_arguments, describe, steps=["stage1", "stage2"])


if __name__ == "__main__":
    end_process(main())
