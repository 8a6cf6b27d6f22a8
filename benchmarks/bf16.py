"""How much time and memory does bfloat16 save on a CPU that computes in it, and how far does the loss move?

    python -m benchmarks.bf16 --data DIR [--phases stage1 stage2] [--batches 10] [--overrides key=value ...]

Our training steps in bfloat16 and in float32 take turns batch by batch, each in a fresh process, on the batches of
benchmarks/throughput.py. ``speedup`` is float32's seconds over bfloat16's; memory is the peak above the weights, next
to the memory of the process with weights loaded (``loaded_bytes`` of ``ready``); ``loss_difference`` is bfloat16's loss
minus float32's, step by step. Needs a CPU with avx512_bf16 or amx_bf16; --any-cpu measures elsewhere, where bfloat16 is
emulated. Writes bf16_<device>.json.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.lib.machine import TUNING_PACKAGES, describe_run, list_cpu_flags, name_device
from benchmarks.lib.tuning_comparison import Side, add_arguments, prepare_comparison
from benchmarks.lib.tuning_workload import TRAINING
from collm_dist.runs.atomic_files import write_json

CPU_FLAGS = {"avx512_bf16", "amx_bf16"}
SIDES = tuple(Side(dtype, "ours", config=dtype) for dtype in ("bfloat16", "float32"))


def compare_losses(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return both losses and their difference by step, and the largest difference."""
    losses = {name: [sample["loss"] for sample in taken] for name, taken in samples.items()}
    differences = [low - full for low, full in zip(losses["bfloat16"], losses["float32"], strict=True)]
    return {
        "loss": losses,
        "loss_difference": differences,
        "largest_loss_difference": max(map(abs, differences)),
    }


def main() -> None:
    """Compare phase after phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, TRAINING)
    parser.add_argument("--any-cpu", action="store_true", help="measure on a CPU without bfloat16 instructions too")
    arguments = parser.parse_args()
    flags = sorted(CPU_FLAGS & list_cpu_flags())
    if not flags and not arguments.any_cpu:
        sys.exit(f"this CPU has none of {', '.join(sorted(CPU_FLAGS))}; measure it all the same with --any-cpu")
    path = arguments.output / f"bf16_{name_device()}{arguments.suffix}.json"
    phases: dict[str, Any] = {}
    with prepare_comparison(arguments, {side.name: {"dtype": side.name} for side in SIDES}) as comparison:
        for phase in arguments.phases:
            pair = comparison.measure_pair(phase, *SIDES)
            phases[phase] = pair | compare_losses(pair["samples"])
            low, high = pair["speedup_95"]
            memory = ", ".join(f"{name} {value:.2f} GiB" for name, value in pair["peak_extra_gib"].items())
            loss = f"loss differs by up to {phases[phase]['largest_loss_difference']:.2e}"
            print(f"{phase}: {pair['speedup']:.2f} [{low:.2f}, {high:.2f}] times as fast; {memory}; {loss}", flush=True)
            record = {"question": __doc__.splitlines()[0], "cpu_flags": flags, "config": comparison.describe()}
            write_json(path, record | {"phases": phases} | describe_run(*TUNING_PACKAGES))


if __name__ == "__main__":
    main()
