"""How much training time do checkpoints and the checks of each step take?

    python -m benchmarks.checkpoint_cost --run RUN [--rounds 20] [--rows 4] [--overrides key=value ...]

RUN is a run of configs/ml1m_official.yaml whose data and CF steps are done. Each round makes an update twice: with
the product's watchdog, its checks of every loss and gradient and its reduction, and bare, with forward pass, backward
pass and DeepSpeed's step only. Both draw dropout from counters; benchmarks/dropout_cost.py measures that. The round
then writes a checkpoint of weights, moments and best weights, as training does. Few rows make a short step and thus a
large share. Writes checkpoint_cost_<device>.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.lib.machine import RESULTS, TUNING_PACKAGES, describe_run, name_device
from benchmarks.lib.tuning_workload import prepare_run, sample_batches
from collm_dist.config import Config
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.engine import TuningEngine, init_distributed
from collm_dist.tuning.loop import TuningLoop
from collm_dist.tuning.run_stage import build_loop
from collm_dist.tuning.stage import get_stage
from collm_dist.tuning.step_batches import StepBatch, iter_step_batches
from collm_dist.tuning.watchdog import Watchdog

NUM_BLOCKS, WARM_UP = 4, 2


@contextmanager
def without_checks(engine: TuningEngine) -> Iterator[None]:
    """Remove the hooks that check gradients from the trainable parameters within the block."""
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    hooks = [parameter._backward_hooks for parameter in trained if parameter._backward_hooks]
    copies = [dict(entries) for entries in hooks]
    for entries in hooks:
        entries.clear()
    try:
        yield
    finally:
        for entries, copy in zip(hooks, copies, strict=True):
            entries.update(copy)


def make_bare_step(loop: TuningLoop, prepared: StepBatch) -> None:
    """Make an update without watchdog and checks."""
    engine, batches = loop.engine.module, prepared.micro_batches
    loop.engine.set_training(True)
    for index, on_host in enumerate(batches):
        batch = on_host.to(loop.engine.device)
        losses = binary_cross_entropy_with_logits(engine(batch, index), batch.labels, reduction="none")
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)  # type: ignore[operator]
        engine.backward((losses * batch.weights).sum() / prepared.block.num_targets)  # type: ignore[operator]
    engine.step()  # type: ignore[operator]


def time_call(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """Return the seconds of all steps and checkpoints, and the bytes of a checkpoint."""
    run_dir = RunDir(Path(config.run.dir))
    device = init_distributed(5)
    stage = get_stage(config, "stage1")
    loaded = stage.build(run_dir, device)
    loop = build_loop(config, run_dir, stage, loaded, {})
    loop.folder.mkdir(parents=True, exist_ok=True)
    blocks = sample_batches(config, "stage1", NUM_BLOCKS).blocks
    work = list(iter_step_batches(iter(blocks), loaded.collator, loop.max_tokens, device))

    def step_on(prepared: StepBatch) -> None:
        with Watchdog(loop.folder, 60.0, str) as watchdog:
            loop.train_step(prepared)
            watchdog.beat()

    def step_off(prepared: StepBatch) -> None:
        make_bare_step(loop, prepared)

    seconds: dict[str, list[float]] = {"on": [], "off": [], "checkpoint": []}
    loads = []
    for number in range(rounds + WARM_UP):
        prepared = work[number % NUM_BLOCKS]
        sides = [("on", step_on), ("off", step_off)]
        taken = {}
        for side, step in sides if number % 2 else reversed(sides):
            if side == "on":
                taken[side] = time_call(lambda step=step, prepared=prepared: step(prepared))
            else:
                with without_checks(loop.engine):
                    taken[side] = time_call(lambda step=step, prepared=prepared: step(prepared))
        loop.best_weights = loop.engine.export_state(with_moments=False).weights
        taken["checkpoint"] = time_call(loop._save)
        if number >= WARM_UP:
            loads.append(round(os.getloadavg()[0], 2))
            for name, value in taken.items():
                seconds[name].append(value)
        print("  ".join(f"{name} {value:.3f} s" for name, value in taken.items()), flush=True)
    size = max(path.stat().st_size for path in loop.folder.glob("*.safetensors"))
    trainable = sum(weight.numel() for weight in loop.best_weights.values())
    return {"seconds": seconds, "load_average": loads, "checkpoint_bytes": size, "trainable_parameters": trainable}


def summarize(seconds: dict[str, list[float]], every_steps: int) -> dict[str, Any]:
    """Return the stall of a checkpoint and the shares of step time.

    Args:
        seconds: by round, of the steps with checks (``on``) and without (``off``), and of ``checkpoint``.
        every_steps: steps between checkpoints.
    """
    bare = statistics.median(seconds["off"])
    shares = [on / off - 1 for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    draws = np.random.default_rng(0).choice(shares, (10_000, len(shares)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    stall = statistics.median(seconds["checkpoint"])
    checks, saves = statistics.median(shares), stall / (every_steps * bare)
    return {
        "median_stall_seconds": stall,
        "longest_stall_seconds": max(seconds["checkpoint"]),
        "median_step_seconds": {side: statistics.median(seconds[side]) for side in ("on", "off")},
        "checks_share_of_step": checks,
        "checks_share_of_step_95": [float(low), float(high)],
        "checkpoints_share_of_step": saves,
        "share_of_step": checks + saves,
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/ml1m_official.yaml"))
    parser.add_argument("--run", type=Path, required=True, help="a run whose data and CF steps are done")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.run.parent) as name:  # on the disk of runs
        folder = Path(name)
        for step in ("data", "cf", "item_tokens"):
            if (arguments.run / step).exists():
                (folder / step).symlink_to((arguments.run / step).resolve(), target_is_directory=True)
        settings = [f"stage1.global_batch_size={arguments.rows}", *arguments.overrides]
        config = prepare_run(arguments.config, None, folder, settings)
        measured = measure(config, arguments.rounds)
    stage, lora = config.stage1, config.lora
    record = {
        "question": __doc__.splitlines()[0],
        **summarize(measured["seconds"], stage.checkpoint_every_steps),
        **measured,
        "config": {
            "backbone": config.llm.backbone,
            "dtype": config.llm.dtype,
            "lora": lora.model_dump(mode="json"),
            "rows_per_step": arguments.rows,
            "checkpoint_every_steps": stage.checkpoint_every_steps,
            "zero_stage": config.cluster.zero_stage,
            "threads": torch.get_num_threads(),
        },
        **describe_run(*TUNING_PACKAGES),
    }
    path = arguments.output / f"checkpoint_cost_{name_device()}.json"
    write_json(path, record)
    shown = ("median_stall_seconds", "longest_stall_seconds", "checks_share_of_step", "share_of_step")
    print("\n".join(f"{key}: {record[key]:.4f}" for key in shown))


if __name__ == "__main__":
    main()
