"""How much does each part of CoLLM add on its own MovieLens-1M split, compared with simple baselines?

    python -m benchmarks.reproduce_ml1m --data DIR --profile cpu|slots|gpu [--minutes 25] [--cells mf/pair ...] [--list]

DIR holds interactions.parquet and items.parquet as configs/ml1m_official.yaml expects them. A cell is a CF model with a
variant of the recipe and a seed: a whole run of launch/run_pipeline.py, which reuses steps of earlier cells. Cells run
in the order of the list, the most valuable first. After --minutes the running cell writes a checkpoint and stops, and
the same command resumes it. Each finished cell leaves a record in benchmarks/results/reproduce_ml1m_<profile>/, which
is valid while the settings are the same, even without the run directory. The records make
reproduce_ml1m_<profile>.json (rows and paired differences of eval/report.json with ``cf``, ``variant`` and ``seeds``;
``against``: stage 2 minus that of the cell without one part) and, with benchmarks/lib/reproduction_page.py,
docs/results.md with its plots.

The profile cpu trains each stage once on about 2,000 rows and tests on some of the users: it shows how the parts affect
each other, not how good they can be; on CPUs with bfloat16 instructions, --overrides llm.dtype=bfloat16 takes a
fraction of the time. The profile slots does the same on prompts without titles in an eighth of the time, so that the
language model reads only slots. The profile gpu trains on all rows.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import RESULTS, ROOT
from benchmarks.lib.reproduction_page import write_page
from benchmarks.lib.reproduction_records import Cell, compare_cells, read_record, summarize_seeds, write_record
from collm_dist.errors import Preempted
from collm_dist.runs.atomic_files import write_json

_PRECISION = "llm.dtype="
CONFIGS = {
    "mf": "ml1m_official",
    "none": "ml1m_official",
    "lightgcn": "ml1m_lightgcn",
    "sasrec": "ml1m_sasrec",
    "din": "ml1m_din",
}
_PROMPTS = "configs/prompts"


def _list_prompts(stage2: str, folder: str = f"{_PROMPTS}/question_last") -> list[str]:
    """Return the settings of the prompts; by default the question is last, as in the paper."""
    return [f"prompt.stage1={folder}/stage1.txt", f"prompt.stage2={folder}/{stage2}.txt"]


# Settings of each variant. The paper's recipe has two slots and a CF model fitted to all training rows.
VARIANTS = {
    "stage2": _list_prompts("stage2"),
    "train_cf": [*_list_prompts("stage2"), "stage2.train_cf=true"],
    "scratch": [*_list_prompts("stage2"), "stage2.train_cf=scratch"],
    "ui_tokens": [*_list_prompts("stage2"), "cf.model=none", "stage2.train_cf=scratch"],
    "item_ids": _list_prompts("stage2_ids"),
    "pair": _list_prompts("stage2_pair"),
    "pair_cross_fit": [*_list_prompts("stage2_pair"), "cf.cross_fit=8"],
    "pair_all": [*_list_prompts("stage2_pair"), "cf.cross_fit=8", "cf.feedback=all"],
    "pair_ask_first": _list_prompts("stage2_pair", _PROMPTS),
}
# Short runs: 2,000 rows per stage, some of the users.
_SHORT = ("max_train_contexts=1100", "num_epochs=1", "warmup_steps=6", "eval_every_steps=20", "max_valid_contexts=120",
          "checkpoint_every_steps=20")  # fmt: skip
_SOME_USERS = ["evaluation.splits=[test]", "evaluation.max_users=100", "evaluation.train_contexts=100"]
PROFILES: dict[str, tuple[list[tuple[str, str, int]], list[str]]] = {
    "cpu": (
        [("mf", "stage2", 0), ("mf", "pair", 0), ("mf", "pair_cross_fit", 0), ("mf", "train_cf", 0),
         ("din", "stage2", 0), ("din", "pair", 0), ("mf", "scratch", 0), ("none", "ui_tokens", 0),
         ("mf", "item_ids", 0), ("mf", "pair_all", 0), ("mf", "pair_ask_first", 0)],
        [f"{stage}.{setting}" for stage in ("stage1", "stage2") for setting in _SHORT] + _SOME_USERS,
    ),
    "slots": (
        [("mf", "stage2", 0), ("mf", "pair", 0), ("mf", "pair_cross_fit", 0), ("mf", "train_cf", 0),
         ("mf", "scratch", 0), ("none", "ui_tokens", 0), ("mf", "pair_all", 0)],
        ["stage1.enabled=false", *(f"stage2.{setting}" for setting in _SHORT), *_SOME_USERS],
    ),
    "gpu": (
        [("din", "pair_all", 0), ("mf", "stage2", 0), ("din", "stage2", 0), ("din", "pair", 0),
         ("din", "pair_cross_fit", 0), ("mf", "train_cf", 0), ("mf", "scratch", 0), ("none", "ui_tokens", 0),
         ("mf", "item_ids", 0), ("sasrec", "pair_all", 0), ("din", "pair_all", 1), ("din", "pair_all", 2)],
        ["evaluation.splits=[valid,test]"],
    ),
}  # fmt: skip
# Prompts of the profile slots, by the prompts with titles that they replace.
_WITHOUT_TITLES = {
    f"prompt.stage2={_PROMPTS}/question_last/stage2.txt": "prompt.stage2=User <UserID>. Film <TargetItemID>. Liked?",
    f"prompt.stage2={_PROMPTS}/question_last/stage2_pair.txt": "prompt.stage2=User <UserID>. Film <TargetItemID>. "
    "Both <MatchID>. Liked?",
}


def build_settings(cell: Cell, arguments: argparse.Namespace) -> list[str]:
    """Return the settings of a cell's run."""
    runs = [other.find_run(arguments.work) for other in list_cells(arguments) if other != cell]
    return [
        f"run.dir={cell.find_run(arguments.work)}",
        f"run.seed={cell.seed}",
        f"run.reuse=[{','.join(str(run) for run in runs if run.exists())}]",
        f"dataset.path={arguments.data / 'interactions.parquet'}",
        f"dataset.items_path={arguments.data / 'items.parquet'}",
        *list_settings(cell, arguments),
        *(setting for setting in arguments.overrides if setting.startswith(_PRECISION)),
    ]


def run_cell(cell: Cell, arguments: argparse.Namespace, deadline: float) -> int:
    """Run a cell until it is done or the deadline has passed, and return the exit code; its seconds add up."""
    config = ROOT / "configs" / f"{CONFIGS[cell.cf]}.yaml"
    command = [sys.executable, "launch/run_pipeline.py", "--config", str(config), *build_settings(cell, arguments)]
    spent = cell.find_run(arguments.work) / "seconds.json"
    before = json.loads(spent.read_text(encoding="utf-8")) if spent.exists() else 0.0
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(timeout=max(0.0, deadline - started))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # a checkpoint at the next step's end, then exit code 75
        code = process.wait()
        if code == -signal.SIGTERM:  # no handler was installed yet, so nothing is lost
            code = Preempted.exit_code
    except KeyboardInterrupt:
        process.wait()
        raise
    write_json(spent, round(before + time.monotonic() - started, 1))
    return code


def list_settings(cell: Cell, arguments: argparse.Namespace) -> list[str]:
    """Return a cell's settings except paths; a record is valid while these are the same.

    The precision is not among them: the record states it.
    """
    variant = VARIANTS[cell.variant]
    if arguments.profile == "slots":
        variant = [_WITHOUT_TITLES.get(setting, setting) for setting in variant]
    settings = [*variant, *PROFILES[arguments.profile][1], *arguments.overrides]
    return [setting for setting in settings if not setting.startswith(_PRECISION)]


def find_records(arguments: argparse.Namespace) -> Path:
    """Return the folder of the records."""
    folder: Path = arguments.output / f"reproduce_ml1m_{arguments.profile}"
    return folder


def list_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return all cells of the profile."""
    return [Cell(*key) for key in PROFILES[arguments.profile][0]]


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result of all cells of the profile that have a record, chosen or not."""
    cells, folder = list_cells(arguments), find_records(arguments)
    by_cell = {cell: read_record(cell, folder, list_settings(cell, arguments)) for cell in cells}
    records = [record for record in by_cell.values() if record]
    rows = [(record, row) for record in records for row in record["rows"]]
    differences = [(record, row) for record in records for row in record["differences"]]
    against = [(record, record["against"]) for record in records if record["against"]]
    reported = ("cf", "variant", "seed", "seconds", "precision", "warnings", "hardware", "versions")
    return {
        "question": __doc__.splitlines()[0],
        "profile": arguments.profile,
        "hardware": records[-1]["hardware"],
        "versions": records[-1]["versions"],
        "settings": [*PROFILES[arguments.profile][1], *arguments.overrides],
        "variants": VARIANTS,
        "cells": [{key: record[key] for key in reported} for record in records],
        "not_run": [cell.name for cell, record in by_cell.items() if not record],
        "rows": summarize_seeds(rows, ("model", "split", "slice")),
        "differences": summarize_seeds(differences, ("model", "versus", "split", "slice")),
        "against": summarize_seeds(against, ("versus", "split", "slice")),
    }


def save_cell(cell: Cell, arguments: argparse.Namespace) -> None:
    """Write a finished cell's record and its comparisons with other cells, then result and page."""
    folder = find_records(arguments)
    write_record(cell, folder, list_settings(cell, arguments), cell.find_run(arguments.work))
    for other in list_cells(arguments):
        if cell in (other, other.base):
            compare_cells(other, folder, arguments.work)
    result = collect(arguments)
    write_json(arguments.output / f"reproduce_ml1m_{arguments.profile}.json", result)
    write_page(arguments.page, arguments.output)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; ``chosen`` are the cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the released split as two Parquet files")
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("--work", type=Path, help="folder of the runs; default runs/reproduce_ml1m_<profile>")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after this time; the same command resumes"
    )
    parser.add_argument("--cells", nargs="+", metavar="CF/VARIANT", help="only cells that begin with this")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all cells")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="rendered page")
    parser.add_argument("--list", action="store_true", help="print the cells and whether they are done")
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    arguments.work = (arguments.work or ROOT / "runs" / f"reproduce_ml1m_{arguments.profile}").resolve()
    cells = list_cells(arguments)
    prefixes = tuple(arguments.cells or [""])
    arguments.chosen = [cell for cell in cells if cell.name.startswith(prefixes)]
    if not arguments.chosen:
        parser.error(f"--cells: none of {', '.join(cell.name for cell in cells)}")
    return arguments


def main() -> int:
    """Run the cells that are not done, and return the exit code: 75 when the time is up."""
    arguments = parse_arguments()
    deadline = time.monotonic() + 60 * arguments.minutes
    for cell in arguments.chosen:
        done = read_record(cell, find_records(arguments), list_settings(cell, arguments)) is not None
        if arguments.list or done:
            print(f"{cell.name}: {'done' if done else 'to do'}")
            continue
        print(f"=== {cell.name}", flush=True)
        code = run_cell(cell, arguments, deadline)
        if code == Preempted.exit_code and time.monotonic() > deadline:
            print("the time is up; the same command resumes")
            return code
        if code:
            return code
        save_cell(cell, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
