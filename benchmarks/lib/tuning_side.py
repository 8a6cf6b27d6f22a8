"""One side of a tuning comparison, in a process of its own.

    ours              the product: TuningLoop.train_step, score_split
    hf_trainer        transformers.Trainer with peft: dynamic padding, rows of a global batch sorted by length
    hf_trainer_trial  the same, timed with several row counts of a micro-batch; prints the times and ends
    reference         the authors' recipe: rows in their order, 16 at a time, padded to the longest, logits everywhere
    reference_last    the same with logits at the last position only

The first line of the output is JSON and means that the side is ready. Each line ``N`` of the input works through batch
N and is answered with its seconds, and with the peak memory above the level at which the weights were loaded. Batches
are requested in the order of --order.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.lib.padded_model import REFERENCE_ROWS, ReferenceStep, build_padded_model, touch_weights
from benchmarks.lib.step_meter import Work, answer_requests, send, start_meter
from benchmarks.lib.tuning_workload import TRAINING, GivenBlocks, sample_batches
from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.llm.collm import CollmModel
from collm_dist.monitoring import PeakMeter
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.engine import init_distributed
from collm_dist.tuning.run_stage import build_loop
from collm_dist.tuning.scoring import AUTO_TOKENS, score_split
from collm_dist.tuning.stage import get_stage
from collm_dist.tuning.step_batches import iter_step_batches

KINDS = ("ours", "hf_trainer", "hf_trainer_trial", "reference", "reference_last")


@dataclass(frozen=True)
class OurSide:
    """The product, ready to work through batches.

    Attributes:
        model: the stage's.
        work: works through the batch of a number.
        device: of the model.
        meter: started when the weights were loaded.
        ready: tokens of a micro-batch at most, and memory.
    """

    model: CollmModel
    work: Work
    device: torch.device
    meter: PeakMeter
    ready: dict[str, Any]


def build_ours(config: Config, phase: str, blocks: Sequence[ContextBlock]) -> OurSide:
    """Build the product's side of a phase, for these batches."""
    run_dir, name = RunDir(Path(config.run.dir)), "stage1" if phase == "stage1" else "stage2"
    device = init_distributed(5)
    stage = get_stage(config, name)  # type: ignore[arg-type]
    loaded = stage.build(run_dir, device)
    touch_weights(loaded.model)
    meter, loaded_bytes = start_meter(device), _read_memory(device)
    if phase not in TRAINING:
        loaded.model.eval().requires_grad_(False)
        setting = config.evaluation.max_tokens_per_micro_batch
        max_tokens = AUTO_TOKENS[device.type] if setting == "auto" else setting

        def score(number: int) -> None:
            score_split(loaded, GivenBlocks((blocks[number],)), setting)  # type: ignore[arg-type]

        return OurSide(loaded.model, score, device, meter, {"max_tokens": max_tokens, "loaded_bytes": loaded_bytes})
    with meter:
        loop = build_loop(config, run_dir, stage, loaded, {})
    # Training lays out the next batch while the model computes; the peers' rows are laid out too.
    batches = list(iter_step_batches(iter(blocks), loaded.collator, loop.max_tokens, device))

    def train(number: int) -> float:
        return float(loop.train_step(batches[number]).loss)

    ready = {"max_tokens": loop.max_tokens, "loaded_bytes": loaded_bytes, "startup_extra_bytes": meter.extra_bytes}
    if phase == "stage2_cached":
        for number in range(len(blocks)):
            train(number)
    return OurSide(loaded.model, train, device, meter, ready)


def _read_memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def serve_peer(arguments: argparse.Namespace, config: Config, channel: Any) -> None:
    """Build a peer and answer its requests."""
    from benchmarks.lib.hf_trainer import serve_hf_trainer, try_row_counts

    rows = json.loads(arguments.rows.read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_padded_model(config, rows, arguments.phase, device)
    if arguments.side == "hf_trainer_trial":
        send(channel, {"seconds_by_rows": try_row_counts(model, rows, device)})
        return
    meter = start_meter(device)
    if arguments.side == "hf_trainer":
        serve_hf_trainer(model, rows, arguments.rows_per_micro_batch, arguments.order, meter, device, channel)
        return
    step = ReferenceStep(model, rows, device, last=arguments.side == "reference_last")
    send(channel, {"rows_per_micro_batch": REFERENCE_ROWS})
    answer_requests(step.work, device, meter, channel)


def main() -> None:
    """Build the side and answer its requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", required=True, choices=KINDS)
    parser.add_argument("--phase", required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="the batches, as write_rows wrote them")
    parser.add_argument("--rows-per-micro-batch", type=int, help="of hf_trainer")
    parser.add_argument("--batches", type=int, required=True, help="size of the sample")
    parser.add_argument("--order", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    # Only answers go to the real standard output; whatever libraries print goes to standard error.
    channel, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    cached = ["stage2.context_cache=memory"] if arguments.phase == "stage2_cached" else []
    config = load_config(arguments.config, cached)
    if arguments.side != "ours":
        serve_peer(arguments, config, channel)
        return
    ours = build_ours(config, arguments.phase, sample_batches(config, arguments.phase, arguments.batches).blocks)
    send(channel, ours.ready)
    answer_requests(ours.work, ours.device, ours.meter, channel)


if __name__ == "__main__":
    main()
