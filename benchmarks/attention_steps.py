"""How much faster is a training step on a GPU when attention runs over sequences instead of blocks of rows?

    python -m benchmarks.attention_steps --run-dir RUN [--phases stage1 stage2] [--overrides key=value ...]

RUN is a run of the config whose data and CF steps are done. Whole training steps, both layouts in turn in one process,
on global batches sampled as in benchmarks/throughput.py. On a CPU both layouts are blocks.
Writes attention_steps_<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import RESULTS, ROOT, TUNING_PACKAGES, describe_run, name_device
from benchmarks.lib.step_meter import measure
from benchmarks.lib.tuning_side import build_ours
from benchmarks.lib.tuning_workload import TRAINING, prepare_run, sample_batches
from collm_dist.config import Config
from collm_dist.llm.packed.row_blocks import PaddedBlocks
from collm_dist.runs.atomic_files import write_json

LAYOUTS = {"blocks": PaddedBlocks(), "sequences": None}


def compare(config: Config, phase: str, count: int, rounds: int) -> dict[str, Any]:
    """Return each layout's seconds and memory above the weights, by batch and round, and the ratio of their medians."""
    ours = build_ours(config, phase, sample_batches(config, phase, count).blocks)
    samples: dict[str, list[list[dict[str, float]]]] = {layout: [[] for _ in range(count)] for layout in LAYOUTS}
    for _ in range(rounds):
        for layout, attention in LAYOUTS.items():
            ours.model.decoder.attention = attention
            ours.work(0)  # warms up
            for number in range(count):
                samples[layout][number].append(measure(ours.work, number, ours.device))
    seconds = {
        layout: sum(statistics.median(sample["seconds"] for sample in of_batch) for of_batch in by_batch)
        for layout, by_batch in samples.items()
    }
    return {**ours.ready, "samples": samples, "seconds": seconds, "ratio": seconds["blocks"] / seconds["sequences"]}


def main() -> None:
    """Compare, phase after phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a run whose data and CF steps are done")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--phases", nargs="+", default=["stage1", "stage2"], choices=TRAINING)
    parser.add_argument("--batches", type=int, default=2, help="global batches of each phase")
    parser.add_argument("--rounds", type=int, default=4, help="times each batch is measured")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--suffix", default="", help="added to the name of the result")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings")
    arguments = parser.parse_args()
    config = prepare_run(arguments.config, None, arguments.run_dir, arguments.overrides)
    llm = config.llm
    record: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "config": {"backbone": Path(llm.backbone).name, "compile": llm.compile, "dtype": llm.dtype},
        "phases": {},
        **describe_run(*TUNING_PACKAGES),
    }
    for phase in arguments.phases:
        result = record["phases"][phase] = compare(config, phase, arguments.batches, arguments.rounds)
        print(f"{phase}: {result['ratio']:.2f} times as fast", flush=True)
        write_json(arguments.output / f"attention_steps_{name_device()}{arguments.suffix}.json", record)


if __name__ == "__main__":
    main()
