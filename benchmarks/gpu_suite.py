"""All benchmarks and tests that need a GPU, in one command.

    python -m benchmarks.gpu_suite --run-dir RUN --backbone smollm2=FOLDER [--output DIR] [--pieces tests zero ...]

RUN is a run of the config whose data and CF steps are done; they need Ray, and nothing here does. FOLDER is a backbone
on this machine; random backbones of published shapes take its tokenizer. Pieces:

    tests        tests/gpu
    throughput   benchmarks/throughput.py for each backbone: time and memory
    compiled     the same with llm.compile
    attention    the first backbone with eager attention, to compare with the fused kernels of ``throughput``, and
                 benchmarks/attention_steps.py for each backbone
    zero         a few steps of both stages under ZeRO-0, -2 and -3
    growth       benchmarks/tuning_growth.py over the shapes
    full         both stages and the report of RUN with the first backbone, timed

A piece that fails or takes longer than --limit does not stop the others. Results go to DIR (default: $OUT), with the
output of each piece in NAME.log and its status and seconds in index.json. --dry-run prints the commands.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import ROOT, describe_run
from benchmarks.lib.random_backbone import SHAPES
from benchmarks.lib.side_process import build_environment
from collm_dist.runs.atomic_files import write_json

PIECES = ("tests", "throughput", "compiled", "attention", "zero", "growth", "full")
FEW_STEPS = (
    "stage1.max_steps=6",
    "stage2.max_steps=6",
    "stage1.max_valid_contexts=64",
    "stage2.max_valid_contexts=64",
)


@dataclass(frozen=True)
class Task:
    """A command.

    Attributes:
        name: of its log.
        command: its words.
        run: the run directory that it trains, a copy of the given run at first; None = it trains none.
    """

    name: str
    command: tuple[str, ...]
    run: Path | None = None


def list_tasks(arguments: argparse.Namespace, scratch: Path) -> list[Task]:
    """Return the commands of the chosen pieces, first those that write random backbones."""
    python, output, pieces = sys.executable, str(arguments.output), set(arguments.pieces)
    backbones = dict(pair.split("=", 1) for pair in arguments.backbone)
    first, folder = next(iter(backbones.items()))
    settings = tuple(arguments.overrides)
    common = ("--run-dir", str(arguments.run_dir), "--config", str(arguments.config))
    tasks = []

    def compare(module: str, suffix: str, backbone: str, *more: str) -> tuple[str, ...]:
        options = ("--batches", str(arguments.batches), "--output", output, "--suffix", suffix)
        options += ("--overrides", f"llm.backbone={backbone}", *settings, *more)
        return (python, "-m", f"benchmarks.{module}", *common, *options)

    def train(run: Path, *more: str) -> tuple[str, ...]:
        run_settings = (f"run.dir={run}", f"llm.backbone={folder}", *settings, *more)
        return (python, "launch/train.py", "--config", str(arguments.config), *run_settings)

    if {"throughput", "compiled", "attention"} & pieces:
        for shape in arguments.shapes:
            write = (python, "-m", "benchmarks.lib.random_backbone", str(scratch / shape), "--shape", shape)
            tasks.append(Task(f"make_{shape}", (*write, "--tokenizer", folder)))
            backbones[shape] = str(scratch / shape)
    if "tests" in pieces:
        tasks.append(Task("tests", (python, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu")))
    for piece, more in (("throughput", ()), ("compiled", ("llm.compile=true",))):
        for name, path in backbones.items() if piece in pieces else ():
            suffix = f"_{name}" if piece == "throughput" else f"_{name}_{piece}"
            tasks.append(Task(f"throughput{suffix}", compare("throughput", suffix, path, *more)))
    if "attention" in pieces:
        tasks.append(Task("attention", compare("throughput", f"_{first}_eager", folder, "llm.attention=eager")))
        for name, path in backbones.items():
            tasks.append(Task(f"attention_{name}", compare("attention_steps", f"_{name}", path)))
    for stage in (0, 2, 3) if "zero" in pieces else ():
        run = scratch / f"zero{stage}"
        tasks.append(Task(f"zero{stage}", train(run, f"cluster.zero_stage={stage}", *FEW_STEPS), run))
    if "growth" in pieces:
        growth = (python, "-m", "benchmarks.tuning_growth", *common, "--output", output, "--tokenizer", folder)
        shapes = ("--shapes", *arguments.shapes) if arguments.shapes else ()
        tasks.append(Task("growth", (*growth, *shapes, "--overrides", *settings)))
    if "full" in pieces:
        run = scratch / "full"
        tasks.append(Task("full", train(run), run))
        tasks.append(Task("full_report", (python, "launch/evaluate_model.py", *train(run)[2:]), run))
    return tasks


def run_task(task: Task, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run a command and return its status; summaries and reports of its run are copied to the output."""
    if task.run is not None and not task.run.exists():
        for step in ("data", "cf"):
            shutil.copytree(arguments.run_dir / step, task.run / step)
    log = arguments.output / f"{task.name}.log"
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.run(
                task.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=arguments.limit, check=False,
                env=build_environment(),
            )  # fmt: skip
            status = "done" if process.returncode == 0 else f"failed with code {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {arguments.limit:.0f} s"
    for path in [*scratch.glob("*/stage*/summary.json"), *scratch.glob("*/eval/report.json")]:
        shutil.copyfile(path, arguments.output / "_".join(path.relative_to(scratch).parts))
    return {"status": status, "seconds": round(time.perf_counter() - started, 1), "command": shlex.join(task.command)}


def main() -> None:
    """Run piece after piece; the index is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a run whose data and CF steps are done")
    parser.add_argument("--backbone", nargs="+", required=True, metavar="NAME=FOLDER", help="backbones on this machine")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--pieces", nargs="+", default=list(PIECES), choices=PIECES)
    parser.add_argument(
        "--shapes", nargs="*", default=["qwen2-1.5b", "llama-7b"], choices=SHAPES, help="of random backbones"
    )
    parser.add_argument("--batches", type=int, default=10, help="global batches of each comparison")
    parser.add_argument("--limit", type=float, default=550, help="seconds that a command may take")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu_results")))
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all pieces")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    arguments = parser.parse_args()
    arguments.run_dir, arguments.output = arguments.run_dir.resolve(), arguments.output.resolve()
    arguments.output.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {**describe_run(), "tasks": {}}
    with tempfile.TemporaryDirectory() as name:
        for task in list_tasks(arguments, Path(name)):
            if arguments.dry_run:
                print(shlex.join(task.command))
                continue
            outcome = index["tasks"][task.name] = run_task(task, arguments, Path(name))
            print(f"{task.name}: {outcome['status']}, {outcome['seconds']} s", flush=True)
            write_json(arguments.output / "index.json", index)
    failed = [name for name, outcome in index["tasks"].items() if outcome["status"] != "done"]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
