"""How fast and in how much memory do logs become samples, beside plain pandas, at 1 to 30 million interactions?

    python benchmarks/preprocess_scale.py [--sizes 1e6 3e6 1e7 3e7] [--workers 1 2] [--plain-up-to 3e6]

Logs are generated (benchmarks/synthetic_logs.py: item popularity after Zipf, users' activity a power law). Ours is the
whole data step of launch/preprocess_data.py: reading, checking, id tables, as-of states, histories, shards with
checksums. The peer (benchmarks/plain_preprocess.py) makes the same samples user by user in Python, as the CoLLM authors
do, and writes them to one Parquet file. Both start from the same Parquet files, in turn, each in a fresh process;
seconds are without imports and without Ray's start, which is reported beside. Writes preprocess_scale_cpu.json and
.png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.growth_plot import plot_growth
from benchmarks.machine import describe_hardware
from benchmarks.plain_preprocess import preprocess_plainly
from benchmarks.synthetic_logs import write_synthetic_logs
from collm_dist.artifacts import RunDir, write_json
from collm_dist.config_io import load_config
from collm_dist.monitoring import measure_peak_gib
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.preprocess import run_preprocess

ROOT = Path(__file__).resolve().parent.parent
MAX_HISTORY, MAX_DISLIKES = 25, 10
SAMPLED_SECONDS = 0.05
NOTES = [
    "Ours works on columns: a partition of users is sorted once, and likes so far, histories and as-of counts are "
    "cumulative sums and slices of that order, computed by numpy over Arrow tables. No row is touched by Python, and a "
    "history is a pair of offsets until it is written.",
    "Memory of a worker is bounded by its partition (preprocessing.num_user_buckets: of users; item states come in "
    "parts of a fixed number of rows), so it grows with the number of rows only if the number of partitions stays.",
    "The peer writes rows alone. Ours also writes WebDataset shards, id tables, interactions by bucket, checksums and "
    "a manifest, and checks every value that it reads; that is in its seconds.",
]


def write_config(folder: Path, num_interactions: int, buckets: int) -> Path:
    """Generate logs and return a configuration for them."""
    logs = write_synthetic_logs(folder / "logs", num_interactions)
    config = {
        "run": {"dir": str(folder / "run")},
        "dataset": {
            "path": str(logs.interactions),
            "items_path": str(logs.items),
            "columns": {"rating": "rating"},
            "like_threshold": 4,
        },
        "preprocessing": {
            "max_history_length": MAX_HISTORY,
            "max_dislikes": MAX_DISLIKES,
            "num_user_buckets": buckets,
        },
        "monitoring": {"progress_bar": False, "tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


class WorkerMemory:
    """The largest private memory of any Ray worker below a process, sampled in a thread."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._done, self.peak_bytes = process, threading.Event(), 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Stop and return the peak in bytes."""
        self._done.set()
        self._thread.join()
        return self.peak_bytes

    def _sample(self) -> None:
        while not self._done.wait(SAMPLED_SECONDS):
            for one in self._process.children(recursive=True):
                try:
                    if one.cmdline() and one.cmdline()[0].startswith("ray::"):
                        status = Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8")
                        private = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
                        self.peak_bytes = max(self.peak_bytes, int(private.split()[1]) * 1024)
                except (psutil.Error, OSError, StopIteration):
                    continue  # it has just ended


def run_ours(config_path: Path, workers: int) -> dict[str, float]:
    """Run the data step on a Ray of so many CPUs; in a process of its own."""
    config = load_config(config_path, [f"cluster.ray_num_cpus={workers}"])
    started = time.perf_counter()
    with connect_ray(config.cluster):
        ray_seconds = time.perf_counter() - started
        memory = WorkerMemory(psutil.Process())
        started = time.perf_counter()
        run_preprocess(config, RunDir(Path(config.run.dir)))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "ray_seconds": ray_seconds, "peak_worker_gib": memory.close() / 2**30,
            "peak_driver_gib": measure_peak_gib_of_cpu()}  # fmt: skip


def run_plain(config_path: Path) -> dict[str, float]:
    """Run the peer; in a process of its own."""
    started = time.perf_counter()
    preprocess_plainly(config_path.parent / "logs" / "interactions", config_path.parent / "plain.parquet", MAX_HISTORY,
                       MAX_DISLIKES)  # fmt: skip
    return {"seconds": time.perf_counter() - started, "peak_worker_gib": measure_peak_gib_of_cpu()}


def measure_peak_gib_of_cpu() -> float:
    """Return this process's peak resident memory."""
    import torch

    return measure_peak_gib(torch.device("cpu"))


def run_alone(config: Path, side: str) -> dict[str, Any]:
    """Run a side in a fresh process and return its figures."""
    shutil.rmtree(config.parent / "run", ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.preprocess_scale", "--side", side, "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed ({done.returncode}): {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure_size(size: int, workers: list[int], buckets: int, rounds: int, plain: bool) -> list[dict[str, Any]]:
    """Return one entry for each side, with its samples; the sides take turns."""
    sides = [*(f"ours-{count}" for count in workers), *(["plain"] * plain)]
    samples: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), size, buckets)
        for _ in range(rounds):
            for side in sides:
                samples[side].append(run_alone(config, side) | {"load_average": os.getloadavg()[0]})
                print(f"{size:>12,} interactions, {side}: {samples[side][-1]['seconds']:.1f} s", flush=True)
    entries = []
    for side, found in samples.items():
        seconds = statistics.median(one["seconds"] for one in found)
        entries.append(
            {
                "interactions": size,
                "side": side.partition("-")[0],
                "workers": int(side.partition("-")[2] or 1),
                "seconds": seconds,
                "rows_per_second": size / seconds,
                "peak_worker_gib": max(one["peak_worker_gib"] for one in found),
                "samples": found,
            }
        )
    return entries


def compute_ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the peer's seconds over ours on one worker, by size."""
    ours = {one["interactions"]: one["seconds"] for one in runs if one["side"] == "ours" and one["workers"] == 1}
    plain = {one["interactions"]: one["seconds"] for one in runs if one["side"] == "plain"}
    return {f"{size}": round(plain[size] / ours[size], 2) for size in plain if size in ours}


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against size."""

    def list_points(key: str) -> dict[str, list[tuple[float, float]]]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for one in runs:
            ours = f"ours, {one['workers']} worker{'s'[: one['workers'] > 1]}"
            name = "plain pandas" if one["side"] == "plain" else ours
            lines.setdefault(name, []).append((one["interactions"], one[key]))
        return lines

    panels = {"seconds": "seconds", "peak GiB of a worker (plain: process)": "peak_worker_gib"}
    plot_growth({label: list_points(key) for label, key in panels.items()}, "interactions", path)


def main() -> None:
    """Measure every size; results are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 3e6, 1e7, 3e7], help="interactions")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="CPUs of Ray")
    parser.add_argument("--plain-up-to", type=float, default=3e6, help="largest size for plain pandas")
    parser.add_argument("--rounds", type=int, default=3, help="samples up to 3 million interactions; above: one")
    parser.add_argument("--rows-per-bucket", type=float, default=125e3, help="mean rows of a partition of users")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        side, _, workers = arguments.side.partition("-")
        print(json.dumps(run_plain(arguments.config) if side == "plain" else run_ours(arguments.config, int(workers))))
        return
    runs: list[dict[str, Any]] = []
    for size in map(int, arguments.sizes):
        buckets = max(8, round(size / arguments.rows_per_bucket))
        rounds = arguments.rounds if size <= 3_000_000 else 1
        runs += measure_size(size, arguments.workers, buckets, rounds, size <= arguments.plain_up_to)
        write_json(
            arguments.output / "preprocess_scale_cpu.json",
            {
                "question": "How do time and memory of preprocessing grow, and what does plain pandas take?",
                "ratios": compute_ratios(runs),
                "notes": NOTES,
                "runs": runs,
                "hardware": describe_hardware(),
                "versions": {one: importlib.metadata.version(one) for one in ("pandas", "pyarrow", "numpy", "ray")},
            },
        )
        print(f"ratios of plain to ours on one worker: {compute_ratios(runs)}", flush=True)
    plot(runs, arguments.output / "preprocess_scale_cpu.png")


if __name__ == "__main__":
    main()
