"""What the heap's settings (collm_dist/heap.py) are worth on a CPU: the product with and without them, in turn.

    python -m benchmarks.heap_settings --data DIR [--phases stage1 stage2 ...] [--batches 2] [--overrides key=value ...]

Both sides work through the same global batches. Their micro-batches have as many tokens: by ``auto`` each side would
take what is fast for it. Writes heap_settings_cpu.json: by phase how many times as fast the settings make it, and what
share of the memory above the weights it takes with them.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.lib.tuning_comparison import PLAIN_HEAP, add_arguments, prepare_comparison
from collm_dist.runs.atomic_files import write_json

TOKENS = ("stage1.max_tokens_per_micro_batch=512", "stage2.max_tokens_per_micro_batch=1024")


def main() -> None:
    """Measure phase after phase; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, batches=2, peers=())
    parser.set_defaults(rounds=3)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("these are settings for a CPU; hide the GPU: CUDA_VISIBLE_DEVICES= python -m ...")
    arguments.overrides = [*TOKENS, *arguments.overrides]
    phases: dict[str, Any] = {}
    with prepare_comparison(arguments) as comparison:
        for phase in arguments.phases:
            samples = comparison.measure_phase(phase, [PLAIN_HEAP])["samples"][PLAIN_HEAP]
            seconds = {side: sum(one["seconds"] for one in taken) for side, taken in samples.items()}
            peaks = {side: max(one["extra_bytes"] for one in taken) for side, taken in samples.items()}
            phases[phase] = {
                "times_as_fast": seconds[PLAIN_HEAP] / seconds["ours"],
                "share_of_memory": peaks["ours"] / peaks[PLAIN_HEAP],
                "samples": samples,
            }
            record = {"question": __doc__.splitlines()[0], "phases": phases, **comparison.describe(arguments.threads)}
            write_json(arguments.output / f"heap_settings_cpu{arguments.suffix}.json", record)
            found = (phases[phase][key] for key in ("times_as_fast", "share_of_memory"))
            print("{}: {:.2f} times as fast, {:.2f} of the memory".format(phase, *found), flush=True)


if __name__ == "__main__":
    main()
