"""How fast are small tensor operations beside another process, with and without our limit on spinning?

    python -m benchmarks.busy_threads

Each side is a process of its own with a thread per core, and the sides take turns. One competitor
per core keeps the machine busy in the second half.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import RESULTS, describe_run
from collm_dist.runs.atomic_files import write_json

ROUNDS = 5
SIDES: dict[str, dict[str, str]] = {"ours": {"GOMP_SPINCOUNT": "1000"}, "default": {}}
# A feed-forward layer, a softmax and an addition of a small language model's size, 200 times.
_WORK = """
import time, torch
left, right = torch.randn(256, 576), torch.randn(576, 576)
started = time.perf_counter()
for _ in range(200):
    result = torch.relu(left @ right).softmax(-1) + 1
print(time.perf_counter() - started)
"""
_COMPETITOR = "while True: pass"


def time_side(settings: dict[str, str]) -> float:
    """Return the seconds of the work in a new process."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment |= {"OMP_NUM_THREADS": str(os.cpu_count()), **settings}
    done = subprocess.run([sys.executable, "-c", _WORK], env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure() -> dict[str, Any]:
    """Return samples, medians and the ratio of default to ours."""
    samples: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(ROUNDS):
        for name, settings in SIDES.items():
            samples[name].append(time_side(settings))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {"seconds": samples, "medians": medians, "ratio": medians["default"] / medians["ours"]}


def main() -> int:
    """Measure on the quiet and on the busy machine, and write the result."""
    result: dict[str, Any] = {**describe_run("torch"), "command": "python -m benchmarks.busy_threads"}
    result["quiet"] = measure()
    competitors = [subprocess.Popen([sys.executable, "-c", _COMPETITOR]) for _ in range(os.cpu_count() or 1)]
    try:
        result["busy"] = measure()
    finally:
        for competitor in competitors:
            competitor.kill()
    for name in ("quiet", "busy"):
        print(f"{name}: {json.dumps(result[name]['medians'])}, default takes {result[name]['ratio']:.2f} times as long")
    write_json(Path(RESULTS) / "busy_threads_cpu.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
