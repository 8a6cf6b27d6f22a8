"""How fast is an epoch of matrix factorization on a CPU, compared with compiled code (LightFM)?

    python -m benchmarks.cf_lightfm [--data data/ml-1m-collm] [--interactions 1e6 1e7] [--threads 2 1]

Install LightFM once, in an environment of its own. It is compiled from source, which takes a C compiler:

    python3.11 -m venv ~/.cache/collm-dist/lightfm-env && cd ~/.cache/collm-dist/lightfm-env && \
        bin/pip install "setuptools<81" wheel numpy==1.26.4 scipy==1.11.4 && \
        bin/pip install --no-build-isolation lightfm==1.17

Both sides minimize the binary cross-entropy of user · item + user's bias + item's bias on the same rows, with vectors
of 64 numbers. They differ in the optimizer: LightFM takes a step of AdaGrad after each row, its threads write to the
same tables without locks, and its result depends on their timing. Ours takes a step of Adam after each batch of 2,048
rows, and its result is the same with any number of workers. So a second of LightFM's epoch is not a second of ours;
``loss`` (of the training rows, after the last epoch) shows how far each has come.

A sample is an epoch. The sides take turns, each in a process of its own and after a warm-up epoch. ``ratios`` are
LightFM's median over ours: above 1, ours is faster. LightFM has no graphs, sequences or attention, so the other models
have no counterpart. Nor has ``implicit``: none of its losses (BPR, ALS, logistic on sampled negatives) reads dislikes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cf_throughput import PAIRS, prepare_data, start_ours, write_rows
from benchmarks.lib.machine import RESULTS, ROOT, describe_run
from benchmarks.lib.side_process import SideProcess
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.runs.atomic_files import write_json

WIDTH = 64


def measure(data_dir: Path, rows: Path, arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Measure both sides in turn and return the seconds of each epoch, their medians and the last losses."""
    command = [str(arguments.lightfm_python), "-W", "ignore", str(ROOT / "benchmarks" / "lib" / "lightfm_epoch.py")]
    command += ["--rows", str(rows), "--width", str(WIDTH), "--threads", str(threads)]
    sides = {"ours": start_ours(PAIRS["mf"], "mf", data_dir, threads, None), "lightfm": SideProcess(command)}
    if sides["ours"].ready["rows"] != sides["lightfm"].ready["rows"]:
        raise ValueError(f"LightFM has {sides['lightfm'].ready['rows']} rows, we have {sides['ours'].ready['rows']}")
    for process in sides.values():
        process.ask("epoch")
    samples: dict[str, list[Any]] = {side: [] for side in sides}
    for _ in range(arguments.repeats):
        for side, process in sides.items():
            samples[side].append(process.ask("epoch"))
    result: dict[str, Any] = {}
    for side, process in sides.items():
        seconds = [sample["seconds"] for sample in samples[side]]
        loss = process.ask("loss") if side == "lightfm" else samples[side][-1]["mean_loss"]
        cpu_seconds = statistics.median(sample["cpu_seconds"] for sample in samples[side])
        result[side] = {"median": statistics.median(seconds), "median_cpu": cpu_seconds, "loss": loss,
                        "seconds": seconds, **process.ready}  # fmt: skip
        process.close()
    return result | {"ratio": round(result["lightfm"]["median"] / result["ours"]["median"], 2)}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m-collm"), help="folder of the two tables")
    parser.add_argument(
        "--interactions", nargs="*", type=float, default=[1e6, 1e7], help="generated logs of so many interactions"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--repeats", type=int, default=7, help="epochs of each side")
    parser.add_argument(
        "--lightfm-python", type=Path, default=Path("~/.cache/collm-dist/lightfm-env/bin/python").expanduser()
    )
    parser.add_argument("--keep", type=Path, help="keep the preprocessed data in this folder, or use those in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "cf_lightfm_cpu.json")
    arguments = parser.parse_args()
    if not arguments.lightfm_python.exists():
        parser.error(f"{arguments.lightfm_python} is missing: install LightFM as described in --help")
    return arguments


def compare(interactions: int | None, arguments: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the name of a log and its measurements by number of threads."""
    data_dir, name = prepare_data(arguments.data, interactions, folder / "run")
    name = name if interactions is None else f"{interactions:,} generated"
    manifest = load_manifest(data_dir)
    result: dict[str, Any] = {"users": manifest.num_users, "items": manifest.num_items}
    write_rows(data_dir, folder / "rows.npz", None, with_histories=False)
    for threads in arguments.threads:
        result[str(threads)] = measure(data_dir, folder / "rows.npz", arguments, threads)
        shown = {side: round(result[str(threads)][side]["median"], 3) for side in ("ours", "lightfm")}
        print(f"{name}, {threads} threads: seconds {shown}", flush=True)
    return name, result


def main() -> int:
    """Run the benchmark and write its JSON."""
    arguments = parse_arguments()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for interactions in [None, *map(int, arguments.interactions)]:
            folder = (arguments.keep or Path(temporary)) / str(interactions or "given")
            folder.mkdir(parents=True, exist_ok=True)
            name, result = compare(interactions, arguments, folder)
            results[name] = result
    ratios = {
        name: {str(threads): result[str(threads)]["ratio"] for threads in arguments.threads}
        for name, result in results.items()
    }
    record = {"question": (__doc__ or "").splitlines()[0], "ratios": ratios, "width": WIDTH,
              "threads": arguments.threads, **describe_run("numpy", "torch"), "results": results}  # fmt: skip
    write_json(arguments.out, record)
    print(json.dumps(ratios, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
