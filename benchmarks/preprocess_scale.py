"""How do time and memory of preprocessing grow from 1 to 30 million interactions, compared with plain pandas?

    python -m benchmarks.preprocess_scale [--sizes 1e6 3e6 1e7 3e7] [--workers 1 2] [--plain-up-to 3e6]

Logs are generated (``lib/synthetic_logs.py``: Zipf item popularity, power-law user activity). Ours is the whole data
step of launch/preprocess_data.py: reading, checks, id tables, as-of states, histories, shards with checksums. The peer
(``lib/plain_preprocess.py``) builds the same samples user by user in Python, as the CoLLM authors do, and writes them
to one Parquet file. Both read the same Parquet files and take turns, each in a fresh process.

Seconds exclude imports: ours first runs a data step of a few rows, in which Ray starts its workers and these import
their libraries (``start_seconds``). CPU seconds are those of the driver and of all workers, without Ray's daemons. They
measure the work, since other processes on the machine lengthen wall time. Writes preprocess_scale_cpu.json and .png.
"""

from __future__ import annotations

import argparse
import json
import math
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

from benchmarks.lib.growth_plot import plot_growth
from benchmarks.lib.machine import RESULTS, ROOT, describe_run
from benchmarks.lib.plain_preprocess import preprocess_plainly
from benchmarks.lib.synthetic_logs import write_synthetic_logs
from collm_dist.config.loader import load_config
from collm_dist.monitoring import measure_peak_gib
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir

MAX_HISTORY, MAX_DISLIKES = 25, 10
# The rows of a partition do not grow with the log, so neither does a worker's memory.
ROWS_PER_BUCKET, ROWS_PER_SHARD = 125_000, 500_000
WARM_UP_ROWS = 20_000
SAMPLED_SECONDS = 0.05
NOTES = [
    "Speed: a partition of users is sorted once, and likes so far, histories and as-of counts are cumulative sums and "
    "slices of that order, computed by numpy over Arrow tables. No Python code runs per row, and a history is a pair "
    "of offsets until it is written.",
    "Memory: a task holds one partition of users, items or contexts. The number of partitions grows with the log "
    "(preprocessing.num_user_buckets, preprocessing.num_shards), so their rows do not. peak_worker_gib is the largest "
    "anonymous resident memory of any worker (plain: all resident memory of the process).",
    "Both sides produce the same rows, splits, labels, histories, dislikes and as-of counts. The peer writes them to "
    "one Parquet file. Ours also moves every row through three shuffles on disk, so that it runs on any number of "
    "workers in bounded memory and resumes after a kill; it checks every value, and writes WebDataset shards, "
    "interactions by bucket, id tables, checksums and a manifest, each file synced to disk.",
    "The peer is lean: its sets, lists and slices take about 15 microseconds of CPU per row. A ratio of 20 would leave "
    "ours less than one microsecond per row for everything above.",
]


def write_config(folder: Path, num_interactions: int) -> Path:
    """Generate logs and return a config for them."""
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
            "num_user_buckets": math.ceil(num_interactions / ROWS_PER_BUCKET),
            "num_shards": math.ceil(num_interactions / ROWS_PER_SHARD),
        },
        "monitoring": {"progress_bar": False, "tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


class WorkerWatch:
    """Thread that samples the memory and CPU time of the Ray workers under this process.

    Attributes:
        peak_bytes: largest anonymous memory of any worker.
    """

    def __init__(self) -> None:
        """Start sampling."""
        self.peak_bytes, self._cpu = 0, dict[int, float]()
        self._sample()
        self._before, self.peak_bytes = sum(self._cpu.values()), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> float:
        """Stop, and return the CPU seconds of all workers since the start."""
        self._done.set()
        self._thread.join()
        self._sample()
        return sum(self._cpu.values()) - self._before

    def _run(self) -> None:
        while not self._done.wait(SAMPLED_SECONDS):
            self._sample()

    def _sample(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline() and process.cmdline()[0].startswith("ray::"):
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
                    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
                    private = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
                    self.peak_bytes = max(self.peak_bytes, int(private.split()[1]) * 1024)
            except (psutil.Error, OSError, StopIteration):
                continue  # the process has ended


def run_ours(config_path: Path, workers: int) -> dict[str, float]:
    """Run the data step on a Ray with this number of CPUs, in a process of its own."""
    config = load_config(config_path, [f"cluster.ray_num_cpus={workers}"])
    warm_up = load_config(config_path.parent / "warm" / "config.yaml", [f"cluster.ray_num_cpus={workers}"])
    started = time.perf_counter()
    with connect_ray(config.cluster):
        ray_seconds = time.perf_counter() - started
        run_preprocess(warm_up, RunDir(Path(warm_up.run.dir)))
        start_seconds = time.perf_counter() - started
        watch = WorkerWatch()
        started, cpu = time.perf_counter(), time.thread_time()
        run_preprocess(config, RunDir(Path(config.run.dir)))
        seconds, cpu = time.perf_counter() - started, time.thread_time() - cpu
        worker_cpu = watch.close()
    return {"seconds": seconds, "cpu_seconds": cpu + worker_cpu, "driver_cpu_seconds": cpu, "ray_seconds": ray_seconds,
            "start_seconds": start_seconds, "peak_worker_gib": watch.peak_bytes / 2**30,
            "peak_driver_gib": measure_peak_gib_of_cpu()}  # fmt: skip


def run_plain(config_path: Path) -> dict[str, float]:
    """Run the peer, in a process of its own."""
    started, cpu = time.perf_counter(), time.process_time()
    preprocess_plainly(config_path.parent / "logs" / "interactions", config_path.parent / "plain.parquet", MAX_HISTORY,
                       MAX_DISLIKES)  # fmt: skip
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu,
            "peak_worker_gib": measure_peak_gib_of_cpu()}  # fmt: skip


def measure_peak_gib_of_cpu() -> float:
    """Return this process's peak resident memory."""
    import torch

    return measure_peak_gib(torch.device("cpu"))


def run_alone(config: Path, side: str) -> dict[str, Any]:
    """Run a side in a fresh process and return its measurement."""
    for folder in (config.parent, config.parent / "warm"):
        shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.preprocess_scale", "--side", side, "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed ({done.returncode}): {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def measure_size(size: int, workers: list[int], rounds: int, plain: bool) -> list[dict[str, Any]]:
    """Return an entry for each side, with its samples; the sides take turns."""
    sides = [*(f"ours-{count}" for count in workers), *(["plain"] * plain)]
    samples: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), size)
        write_config(Path(folder) / "warm", WARM_UP_ROWS)
        for _ in range(rounds):
            for side in sides:
                samples[side].append(run_alone(config, side) | {"load_average": os.getloadavg()[0]})
                sample = samples[side][-1]
                cpu_and_memory = f"{sample['cpu_seconds']:.1f} s of CPU, {sample['peak_worker_gib']:.2f} GiB"
                print(f"{size:>12,} interactions, {side}: {sample['seconds']:.1f} s, {cpu_and_memory}", flush=True)
    entries = []
    for side, taken in samples.items():
        seconds, cpu = (statistics.median(sample[key] for sample in taken) for key in ("seconds", "cpu_seconds"))
        entries.append(
            {
                "interactions": size,
                "side": side.partition("-")[0],
                "workers": int(side.partition("-")[2] or 1),
                "seconds": seconds,
                "cpu_seconds": cpu,
                "rows_per_second": size / seconds,
                "rows_per_cpu_second": size / cpu,
                "peak_worker_gib": max(sample["peak_worker_gib"] for sample in taken),
                "samples": taken,
            }
        )
    return entries


def compute_ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the peer's seconds over ours on one worker by size: CPU seconds (per core) and wall time."""

    def list_seconds(side: str, key: str) -> dict[int, float]:
        return {run["interactions"]: run[key] for run in runs if (run["side"], run["workers"]) == (side, 1)}

    ratios = {}
    for name, key in (("per_core", "cpu_seconds"), ("wall", "seconds")):
        ours, plain = list_seconds("ours", key), list_seconds("plain", key)
        for size in plain.keys() & ours.keys():
            ratios[f"{name}_{size // 10**6}m"] = round(plain[size] / ours[size], 2)
    return ratios


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against size."""

    def list_points(key: str) -> dict[str, list[tuple[float, float]]]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            ours = f"ours, {run['workers']} worker{'s'[: run['workers'] > 1]}"
            name = "plain pandas" if run["side"] == "plain" else ours
            lines.setdefault(name, []).append((run["interactions"], run[key]))
        return lines

    panels = {
        "seconds": "seconds",
        "CPU seconds": "cpu_seconds",
        "peak GiB of a worker (plain: process)": "peak_worker_gib",
    }
    plot_growth({label: list_points(key) for label, key in panels.items()}, "interactions", path)


def main() -> None:
    """Measure each size; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 3e6, 1e7, 3e7], help="interactions")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="CPUs of Ray")
    parser.add_argument("--plain-up-to", type=float, default=3e6, help="largest size for plain pandas")
    parser.add_argument("--rounds", type=int, default=3, help="samples up to 3 million interactions; one above")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        side, _, workers = arguments.side.partition("-")
        print(json.dumps(run_plain(arguments.config) if side == "plain" else run_ours(arguments.config, int(workers))))
        return
    runs: list[dict[str, Any]] = []
    for size in map(int, arguments.sizes):
        rounds = arguments.rounds if size <= 3_000_000 else 1
        runs += measure_size(size, arguments.workers, rounds, size <= arguments.plain_up_to)
        write_json(
            arguments.output / "preprocess_scale_cpu.json",
            {
                "question": __doc__.splitlines()[0],
                "ratios": compute_ratios(runs),
                "notes": NOTES,
                "runs": runs,
                **describe_run("pandas", "pyarrow", "numpy", "ray"),
            },
        )
        print(f"ratios of plain to ours: {compute_ratios(runs)}", flush=True)
    plot(runs, arguments.output / "preprocess_scale_cpu.png")


if __name__ == "__main__":
    main()
