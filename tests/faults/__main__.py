"""Fault injection that checks that nothing is lost: ``make faults``, or

    python -m tests.faults [--kills 180] [--others 10] [--pipeline-kills 20] [--minutes 25] [--seed 0]

Resumes where it stopped: tests/faults/results.json holds the progress of this seed and is written after each chain.
Exit code 0: all requested faults are done and nothing was lost; 1: something was lost; 75: the time limit was reached.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

RESULTS = Path(__file__).with_name("results.json")
KINDS = ("kill", "damage", "pause", "disk_full", "read_only", "pipeline")
KILLS = ("kill", "pipeline")


def load_results(path: Path, seed: int) -> dict[str, Any]:
    """Return the progress of a seed; another seed starts from zero."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["seed"] == seed:
            return found
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "ray")}
    return {"seed": seed, "versions": versions, "kinds": {}}


def add_chain(results: dict[str, Any], kind: str, chain: dict[str, Any] | None) -> None:
    """Count a chain: its hits are faults, all recovered or all lost."""
    found = results["kinds"].setdefault(
        kind, {"chains": 0, "kill_points": 0, "recovered": 0, "lost": 0, "phases": {}, "failures": []}
    )
    found["chains"] += 1
    if chain is None:
        found["skipped"] = "mounting is not allowed here"
        return
    count = len(chain["hits"])
    found["kill_points"] += count
    found["recovered" if chain["recovered"] else "lost"] += count
    found["phases"] = dict(Counter(found["phases"]) + Counter(chain["hits"]))
    if not chain["recovered"]:
        found["failures"].append({"chain": found["chains"] - 1, **chain})


def sum_kills(results: dict[str, Any]) -> dict[str, int]:
    """Return the kills of a stage and of the pipeline together."""
    found = [results["kinds"].get(kind, {}) for kind in KILLS]
    return {name: sum(counts.get(name, 0) for counts in found) for name in ("kill_points", "recovered", "lost")}


def count_faults(results: dict[str, Any], kind: str, wanted: int) -> int:
    """Return how many faults of a kind were injected; where they cannot be, as many as are wanted."""
    found = results["kinds"].get(kind, {})
    return wanted if "skipped" in found else int(found.get("kill_points", 0))


def run_kind(
    kind: str, wanted: int, bench: Any, results: dict[str, Any], path: Path, folder: Path, deadline: float
) -> bool:
    """Run chains of a kind until so many faults were injected; returns whether that came to pass in time."""
    from collm_dist.runs.atomic_files import write_json
    from tests.faults import kinds

    with tqdm(total=wanted, initial=count_faults(results, kind, wanted), desc=kind, unit="fault") as bar:
        while count_faults(results, kind, wanted) < wanted:
            if time.monotonic() > deadline:
                return False
            number = results["kinds"].get(kind, {}).get("chains", 0)
            dice = random.Random(f"{results['seed']} {kind} {number}")
            chain = folder / f"{kind}-{number}"
            add_chain(results, kind, getattr(kinds, kind)(bench, chain, dice))
            write_json(path, results | sum_kills(results))
            bar.update(count_faults(results, kind, wanted) - bar.n)
            if not results["kinds"][kind]["failures"]:
                shutil.rmtree(chain, ignore_errors=True)
    return True


def prepare(folder: Path) -> tuple[Path, list[str], float]:
    """Make data, CF model and a whole undisturbed pipeline; returns its folder, settings and seconds."""
    import subprocess

    from tests.conftest import write_items, write_ratings
    from tests.faults.stage_runs import REPOSITORY
    from tests.tiny import save_backbone

    write_ratings(folder / "ratings.csv")
    write_items(folder / "items.csv")
    overrides = [f"dataset.path={folder / 'ratings.csv'}", f"dataset.items_path={folder / 'items.csv'}"]
    overrides += [f"llm.backbone={save_backbone(folder / 'backbone')}", "evaluation.bootstrap_samples=20"]
    command = [sys.executable, "launch/run_pipeline.py", "--config", "configs/tiny_cpu.yaml", *overrides]
    started = time.monotonic()
    subprocess.run(
        [*command, "lora.dropout=0.3", f"run.dir={folder / 'pipeline'}"],
        cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = time.monotonic() - started
    prepared = folder / "prepared"
    for step in ("data", "cf"):
        shutil.copytree(folder / "pipeline" / step, prepared / step)
    return prepared, overrides, seconds


def run_missing(
    missing: dict[str, int], arguments: argparse.Namespace, results: dict[str, Any], deadline: float
) -> bool:
    """Prepare, and run chains of each kind; returns whether all was done in time."""
    from tests.faults.kinds import Bench, describe_pipeline_end, make_bench

    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder, seconds = Path(name), 0.0
        prepared, overrides = arguments.prepared, arguments.overrides
        if prepared is None or "pipeline" in missing:
            prepared, overrides, seconds = prepare(folder)
        bench = make_bench(prepared, overrides, folder / "whole")
        for kind, count in missing.items():
            if kind == "pipeline":
                bench = Bench(prepared, overrides, describe_pipeline_end(folder / "pipeline"), seconds)
            if not run_kind(kind, count, bench, results, arguments.results, folder, deadline):
                return False
    return True


def main() -> int:
    """Run what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=180, help="kills of a stage, each after a step")
    parser.add_argument("--others", type=int, default=10, help="faults of each other kind")
    parser.add_argument("--pipeline-kills", type=int, default=20, help="kills of a whole pipeline")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="only these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, to go on later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prepared", type=Path, help="a run whose data and CF steps are done; default: made here")
    parser.add_argument("--overrides", nargs="*", default=[], help="its settings")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    results = load_results(arguments.results, arguments.seed)
    counts = {"kill": arguments.kills, "pipeline": arguments.pipeline_kills}
    expected = {kind: counts.get(kind, arguments.others) for kind in KINDS if kind in arguments.kinds}
    missing = {kind: count for kind, count in expected.items() if count_faults(results, kind, count) < count}
    in_time = not missing or run_missing(missing, arguments, results, deadline)
    for kind, found in sorted(results["kinds"].items()):
        print(f"{kind}: {found['kill_points']} faults, {found['recovered']} recovered, {found['lost']} lost")
    if any(found["lost"] for found in results["kinds"].values()):
        return 1
    return 0 if in_time else 75


if __name__ == "__main__":
    sys.exit(main())
