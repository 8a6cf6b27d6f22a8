"""How much memory above the weights does a step take, as a share of what others take?

    python benchmarks/memory.py --data DIR [--phases stage1 stage2 ...] [--batches 2] [--overrides key=value ...]

Sides, rows and phases are those of benchmarks/throughput.py; every side has a process of its own for every phase. On a
CPU what is measured is the growth of the process's resident memory from before a step to its peak, on a GPU that of the
allocator; the largest of the batches counts. Writes memory_<device>.json: ``ratios`` are ours over theirs.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.machine import name_device
from benchmarks.tuning_comparison import PEERS, add_arguments, prepare_comparison
from collm_dist.artifacts import write_json


def compute_ratios(peaks: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return ours over theirs by peer and phase."""
    return {
        f"vs_{peer}": {phase: round(sides["ours"] / sides[peer], 3) for phase, sides in peaks.items() if peer in sides}
        for peer in PEERS
    }


def find_peaks(samples: dict[str, dict[str, list[Any]]]) -> dict[str, float]:
    """Return the largest of each side's samples in GiB."""
    peaks: dict[str, float] = {}
    for sides in samples.values():
        for side, found in sides.items():
            peaks[side] = max([peaks.get(side, 0.0), *(one["extra_bytes"] / 2**30 for one in found)])
    return peaks


def main() -> None:
    """Measure phase after phase; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, batches=2)
    arguments = parser.parse_args()
    peaks: dict[str, dict[str, float]] = {}
    phases: dict[str, Any] = {}
    with prepare_comparison(arguments) as comparison:
        for phase in arguments.phases:
            phases[phase] = comparison.measure_phase(phase, arguments.peers)
            peaks[phase] = find_peaks(phases[phase]["samples"])
            record = {
                "question": "How much memory above the weights does a step take, as a share of what others take?",
                "ratios": compute_ratios(peaks),
                "peak_extra_gib": peaks,
                "phases": phases,
                **comparison.describe(arguments.threads),
            }
            write_json(arguments.output / f"memory_{name_device()}{arguments.suffix}.json", record)
            print(f"{phase}: { ({side: round(one, 3) for side, one in peaks[phase].items()}) } GiB", flush=True)


if __name__ == "__main__":
    main()
