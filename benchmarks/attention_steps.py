"""How much does a training step gain where attention compares sequences, in the place of blocks of rows? On a GPU.

    python -m benchmarks.attention_steps --run-dir RUN [--phases stage1 stage2] [--overrides key=value ...]

RUN is a run of the configuration whose data and CF steps are done. Whole steps of the product, the two ways in turn in
one process, on the same global batches as benchmarks/throughput.py has. On a CPU both ways are blocks.
Writes attention_steps_<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import describe_hardware, name_device
from benchmarks.lib.side_process import ROOT
from benchmarks.lib.tuning_side import build_ours, measure
from benchmarks.lib.tuning_workload import TRAINING, prepare_run
from collm_dist.config import Config
from collm_dist.llm.packed import passes as shared_context
from collm_dist.runs.atomic_files import write_json

WAYS = {"blocks": lambda *_: False, "sequences": shared_context.takes_sequences}


def compare(config: Config, phase: str, count: int, rounds: int) -> dict[str, Any]:
    """Return each way's seconds and memory above the weights, by batch and round, and the ratio of their medians."""
    work, device, ready = build_ours(config, phase, count)
    samples: dict[str, list[list[dict[str, float]]]] = {way: [[] for _ in range(count)] for way in WAYS}
    for _ in range(rounds):
        for way, takes_sequences in WAYS.items():
            shared_context.takes_sequences = takes_sequences
            work(0)  # warms up
            for number in range(count):
                samples[way][number].append(measure(work, number, device))
    seconds = {
        way: sum(statistics.median(one["seconds"] for one in of_batch) for of_batch in found)
        for way, found in samples.items()
    }
    return {**ready, "samples": samples, "seconds": seconds, "ratio": seconds["blocks"] / seconds["sequences"]}


def main() -> None:
    """Compare, phase after phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a run whose data and CF steps are done")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--phases", nargs="+", default=["stage1", "stage2"], choices=TRAINING)
    parser.add_argument("--batches", type=int, default=2, help="global batches of each phase")
    parser.add_argument("--rounds", type=int, default=4, help="through them")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    parser.add_argument("--suffix", default="", help="added to the name of the result")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings")
    arguments = parser.parse_args()
    config = prepare_run(arguments.config, None, arguments.run_dir, arguments.overrides)
    record: dict[str, Any] = {
        "question": "How much faster is a step with attention over sequences than in blocks?",
        "config": {
            "backbone": Path(config.llm.backbone).name,
            "compile": config.llm.compile,
            "dtype": config.llm.dtype,
        },
        "hardware": describe_hardware(),
        "phases": {},
    }
    for phase in arguments.phases:
        found = record["phases"][phase] = compare(config, phase, arguments.batches, arguments.rounds)
        print(f"{phase}: {found['ratio']:.2f} times as fast", flush=True)
        write_json(arguments.output / f"attention_steps_{name_device()}{arguments.suffix}.json", record)


if __name__ == "__main__":
    main()
