"""How do time and memory of CF training grow with interactions and workers?

    python -m benchmarks.cf_scale [--sizes 1e6 3e6 10e6 30e6] [--workers 1 2] [--output benchmarks/results]

Matrix factorization on generated logs. Each measurement runs the real commands: logs are generated and preprocessed
once per size, and ``launch/pretrain_cf.py`` trains a few epochs on Ray with each number of workers, one thread each. An
epoch's seconds include its validation; memory is the peak of the first worker's process, which owns an about equal
share of the users.

Writes cf_scale_cpu.json and cf_scale_cpu.png. ``extrapolation`` estimates a billion interactions from a line through
the two largest sizes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib.growth_plot import plot_growth
from benchmarks.lib.machine import RESULTS, ROOT, describe_run
from benchmarks.lib.synthetic_logs import write_synthetic_logs
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.monitoring import EPOCH_SECONDS, PEAK_MEMORY, read_metrics
from collm_dist.runs.atomic_files import write_json

EPOCHS = 3
CF = {"model": "mf", "embedding_dim": 64, "global_batch_size": 16384, "num_epochs": EPOCHS}
FUTURE_INTERACTIONS, FUTURE_USERS, FUTURE_WORKERS = 10**9, 50 * 10**6, (1, 8, 32)


def run_command(name: str, config: Path, *overrides: str) -> float:
    """Run a launch file and return its seconds.

    Raises:
        RuntimeError: the command failed; the message holds the end of its output.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / name), "--config", str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed ({done.returncode}): {done.stderr[-2000:]}")
    return time.perf_counter() - started


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
        "cf": CF,
        "monitoring": {"progress_bar": False, "tensorboard": False},
        "cluster": {"ray_num_cpus": os.cpu_count()},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def measure(config: Path, workers: int) -> dict[str, Any]:
    """Train, and return seconds, memory and sizes."""
    folder = config.parent / "run" / "cf"
    shutil.rmtree(folder, ignore_errors=True)
    step_seconds = run_command("pretrain_cf.py", config, f"cf.num_workers={workers}")
    lines = read_metrics(folder / "metrics.jsonl")
    manifest = load_manifest(config.parent / "run" / "data")
    return {
        "workers": workers,
        "train_rows": manifest.splits["train"].rows,
        "num_users": manifest.num_users,
        "num_items": manifest.num_items,
        # The first epoch is slower: caches are cold.
        "epoch_seconds": min(line[EPOCH_SECONDS] for line in lines[1:]),
        "first_epoch_seconds": lines[0][EPOCH_SECONDS],
        "peak_worker_gib": max(line[PEAK_MEMORY] for line in lines),
        "step_seconds": step_seconds,
        "valid_auc": [line["valid/auc"] for line in lines],
    }


def extrapolate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return estimates for a billion interactions, from one worker's growth over the two largest sizes."""
    largest = sorted((run for run in runs if run["workers"] == 1), key=lambda run: int(run["interactions"]))[-2:]
    if len(largest) < 2:
        return []
    small, large = largest
    rows = large["interactions"] - small["interactions"]
    seconds = (large["epoch_seconds"] - small["epoch_seconds"]) / rows
    gib = (large["peak_worker_gib"] - small["peak_worker_gib"]) / rows
    fixed = large["peak_worker_gib"] - gib * large["interactions"]
    return [
        {
            "interactions": FUTURE_INTERACTIONS,
            "users": FUTURE_USERS,
            "workers": workers,
            "epoch_minutes_without_communication": seconds * FUTURE_INTERACTIONS / workers / 60,
            "gib_per_worker": fixed + gib * FUTURE_INTERACTIONS / workers,
            "user_rows_gib_per_worker": FUTURE_USERS * (CF["embedding_dim"] + 1) * 4 * 3 / workers / 2**30,
        }
        for workers in FUTURE_WORKERS
    ]


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against size."""

    def list_points(key: str) -> dict[str, list[tuple[float, float]]]:
        return {
            f"{workers} worker{'s'[: workers > 1]}": [
                (run["interactions"], run[key]) for run in runs if run["workers"] == workers
            ]
            for workers in sorted({run["workers"] for run in runs})
        }

    panels = {"seconds per epoch": "epoch_seconds", "peak GiB of a worker": "peak_worker_gib"}
    plot_growth({label: list_points(key) for label, key in panels.items()}, "interactions", path)


def main() -> None:
    """Measure each size with each number of workers; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 3e6, 1e7, 3e7], help="interactions")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="Ray Train workers")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            config = write_config(Path(folder), int(size))
            preprocess_seconds = run_command("preprocess_data.py", config)
            for workers in arguments.workers:
                measured = {"interactions": int(size), **measure(config, workers)}
                runs.append(measured | {"preprocess_seconds": preprocess_seconds, "load_average": os.getloadavg()[0]})
                print(f"{size:>12,.0f} interactions, {workers} workers: {measured['epoch_seconds']:.1f} s an epoch, "
                      f"{measured['peak_worker_gib']:.2f} GiB a worker", flush=True)  # fmt: skip
                write_json(
                    arguments.output / "cf_scale_cpu.json",
                    {
                        "question": __doc__.splitlines()[0],
                        **describe_run("torch", "ray", "numpy", "pyarrow"),
                        "config": CF,
                        "runs": runs,
                        "extrapolation": extrapolate(runs),
                    },
                )
    plot(runs, arguments.output / "cf_scale_cpu.png")


if __name__ == "__main__":
    main()
