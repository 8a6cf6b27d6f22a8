"""How much faster is the data step of one large CSV when the file is read in parts?

    python -m benchmarks.csv_parts [--rows 5e6] [--workers 2] [--rounds 1]

The log is generated (``lib/synthetic_logs.py``) and written as one CSV. Both sides run the whole data step of
launch/preprocess_data.py on the same file, each in a fresh process with a Ray of its own, and take turns: in parts of
``file_parts.PART_BYTES``, and serial, by one task. The results are compared by their content hash. Seconds exclude
imports and the start of Ray. Writes csv_parts_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import yaml

from benchmarks.lib.machine import RESULTS, ROOT, describe_run
from benchmarks.lib.synthetic_logs import write_synthetic_logs
from benchmarks.preprocess_scale import WARM_UP_ROWS, WorkerWatch, measure_peak_gib_of_cpu
from collm_dist.config.loader import load_config
from collm_dist.data.ingest import file_parts
from collm_dist.orchestration import preprocess
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir

SIDES = ("serial", "parts")


def write_config(folder: Path, rows: int) -> Path:
    """Generate a log as one CSV and return a config for it."""
    logs = write_synthetic_logs(folder / "logs", rows)
    files = sorted(logs.interactions.iterdir())
    with pa_csv.CSVWriter(folder / "log.csv", pq.read_schema(files[0])) as writer:
        for file in files:
            writer.write_table(pq.read_table(file))
            file.unlink()
    config = {
        "run": {"dir": str(folder / "run")},
        "dataset": {"path": str(folder / "log.csv"), "items_path": str(logs.items), "columns": {"rating": "rating"}},
        "monitoring": {"progress_bar": False, "tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def run_side(config_path: Path, side: str, workers: int) -> dict[str, Any]:
    """Run the data step in this process and return its measurement."""
    if side == "serial":
        file_parts.PART_BYTES = 1 << 60
    config, warm_up = (
        load_config(path, [f"cluster.ray_num_cpus={workers}"])
        for path in (config_path, config_path.parent / "warm" / "config.yaml")
    )
    phases: dict[str, float] = {}
    preprocess.run_tasks = _time_phases(preprocess.run_tasks, phases)
    with connect_ray(config.cluster):
        preprocess.run_preprocess(warm_up, RunDir(Path(warm_up.run.dir)))
        phases.clear()
        watch, started, cpu = WorkerWatch(), time.perf_counter(), time.thread_time()
        manifest = preprocess.run_preprocess(config, RunDir(Path(config.run.dir)))
        seconds, cpu = time.perf_counter() - started, time.thread_time() - cpu
        worker_cpu = watch.close()
    return {
        "seconds": seconds,
        "phase_seconds": phases,
        "cpu_seconds": cpu + worker_cpu,
        "driver_cpu_seconds": cpu,
        "peak_worker_gib": watch.peak_bytes / 2**30,
        "peak_driver_gib": measure_peak_gib_of_cpu(),
        "content_hash": manifest["content_hash"],
    }


def _time_phases(run_tasks: Callable[..., Any], phases: dict[str, float]) -> Callable[..., Any]:
    def run(*arguments: Any, description: str, **options: Any) -> Any:
        started = time.perf_counter()
        results = run_tasks(*arguments, description=description, **options)
        phases[description] = time.perf_counter() - started
        return results

    return run


def run_alone(config: Path, side: str, workers: int) -> dict[str, Any]:
    """Run a side in a fresh process and return its measurement."""
    for folder in (config.parent, config.parent / "warm"):
        shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.csv_parts", "--side", side, "--config", str(config), "--workers",
               str(workers)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed ({done.returncode}): {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured | {"load_average": os.getloadavg()[0]}


def main() -> None:
    """Measure both sides in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=5e6, help="rows of the CSV")
    parser.add_argument("--workers", type=int, default=2, help="CPUs of Ray")
    parser.add_argument("--rounds", type=int, default=1, help="samples of each side")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(run_side(arguments.config, arguments.side, arguments.workers)))
        return
    rows = int(arguments.rows)
    samples: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), rows)
        write_config(Path(folder) / "warm", WARM_UP_ROWS)
        size = (Path(folder) / "log.csv").stat().st_size
        for _ in range(arguments.rounds):
            for side in SIDES:
                sample = run_alone(config, side, arguments.workers)
                samples[side].append(sample)
                print(
                    f"{rows:,} rows, {side}: {sample['seconds']:.1f} s, reading "
                    f"{sample['phase_seconds']['reading']:.1f} s, peak {sample['peak_worker_gib']:.2f} GiB (worker), "
                    f"{sample['peak_driver_gib']:.2f} GiB (driver)",
                    flush=True,
                )
    hashes = {sample["content_hash"] for taken in samples.values() for sample in taken}
    assert len(hashes) == 1, "the sides differ"
    medians = {
        side: {
            "seconds": statistics.median(sample["seconds"] for sample in taken),
            "reading_seconds": statistics.median(sample["phase_seconds"]["reading"] for sample in taken),
            "cpu_seconds": statistics.median(sample["cpu_seconds"] for sample in taken),
            "peak_worker_gib": max(sample["peak_worker_gib"] for sample in taken),
            "peak_driver_gib": max(sample["peak_driver_gib"] for sample in taken),
        }
        for side, taken in samples.items()
    }
    write_json(
        arguments.output / "csv_parts_cpu.json",
        {
            "question": __doc__.splitlines()[0],
            "rows": rows,
            "bytes": size,
            "part_bytes": file_parts.PART_BYTES,
            "workers": arguments.workers,
            "same_content": True,
            "serial": medians["serial"],
            "parts": medians["parts"],
            "samples": samples,
            **describe_run("pyarrow", "numpy", "ray"),
        },
    )


if __name__ == "__main__":
    main()
