"""How much memory above the weights does a step take, as a share of what others take?

    python -m benchmarks.memory --data DIR [--phases stage1 stage2 ...] [--batches 2] [--overrides key=value ...]
    python -m benchmarks.memory --samples benchmarks/results/throughput_cpu.json      # what a throughput run has seen

Sides, rows and phases are those of benchmarks/throughput.py; every side has a process of its own for every phase. On a
CPU what is measured is how far the process's resident memory rises, at its peak, above where it stood with the weights
loaded; on a GPU it is the allocator's. The largest of the batches counts. Writes memory_<device>.json: ``ratios`` are
ours over theirs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib.machine import name_device
from benchmarks.lib.tuning_comparison import PEERS, add_arguments, prepare_comparison
from collm_dist.runs.atomic_files import write_json


def find_peaks(samples: dict[str, dict[str, list[Any]]]) -> dict[str, float]:
    """Return the largest of each side's samples in GiB."""
    peaks: dict[str, float] = {}
    for sides in samples.values():
        for side, found in sides.items():
            peaks[side] = max([peaks.get(side, 0.0), *(one["extra_bytes"] / 2**30 for one in found)])
    return peaks


def write_record(path: Path, phases: dict[str, Any], described: dict[str, Any]) -> None:
    """Write the result of the phases measured so far, and print it."""
    peaks = {phase: find_peaks(one["samples"]) for phase, one in phases.items()}
    ratios = {
        f"vs_{peer}": {phase: round(one["ours"] / one[peer], 3) for phase, one in peaks.items() if peer in one}
        for peer in PEERS
    }
    record = {"question": __doc__.splitlines()[0], "ratios": ratios, "peak_extra_gib": peaks, "phases": phases}
    write_json(path, record | described)
    print(yaml.safe_dump({"peak_extra_gib": peaks, "ratios": ratios}))


def main() -> None:
    """Measure phase after phase; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, batches=2)
    parser.add_argument("--samples", type=Path, help="result of a throughput run, whose samples hold memory too")
    arguments = parser.parse_args()
    path = arguments.output / f"memory_{name_device()}{arguments.suffix}.json"
    if arguments.samples is not None:
        path = arguments.output / arguments.samples.name.replace("throughput", "memory")
        made = json.loads(arguments.samples.read_text(encoding="utf-8"))
        seen = {phase: {key: one[key] for key in ("samples", "ready")} for phase, one in made["phases"].items()}
        write_record(path, seen, {key: made[key] for key in ("config", "hardware", "versions")})
        return
    phases: dict[str, Any] = {}
    with prepare_comparison(arguments) as comparison:
        for phase in arguments.phases:
            phases[phase] = comparison.measure_phase(phase, arguments.peers)
            write_record(path, phases, comparison.describe(arguments.threads))


if __name__ == "__main__":
    main()
