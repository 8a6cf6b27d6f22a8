"""What does the language model add to simple scores, and what does each part of the recipe add?

    python -m benchmarks.reproduce --data-set ml1m --data DIR [--minutes 25] [--variants full ...] [--list]
    python -m benchmarks.reproduce --data-set amazon_industrial --data DIR --overrides llm.dtype=bfloat16

DIR holds interactions.parquet and items.parquet with the columns of the data set's settings below; for MovieLens-1M
also items_genres.parquet, the same with a column of genres. A variant is a whole run of launch/run_pipeline.py, which
reuses steps of earlier variants. They run in the order of the list, the most valuable first. After --minutes the
running variant writes a checkpoint and stops, and the same command resumes it. Each finished variant leaves a record in
benchmarks/results/reproduce_<data set>/, which is valid while the settings are the same, even without the run
directory. The records make reproduce_<data set>.json (rows and paired differences of eval/report.json with ``variant``
and ``seed``; ``against``: stage 2 minus that of the variant that has, or lacks, one part) and docs/results.md.

All settings were chosen on validation rows. A variant trains on all training rows; on CPUs, --overrides with
llm.dtype=bfloat16, stage1.max_train_contexts, stage2.max_train_contexts and evaluation.max_contexts takes a part of
them, which the page says. A variant is compared with another of the same overrides only, so an ablation of a smaller
size has a base of its own: --part NAME keeps records, result and section apart from those without it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import RESULTS, ROOT
from benchmarks.lib.reproduction_page import write_page
from benchmarks.lib.reproduction_records import Cell, compare_cells, list_recorded, read_record, write_record
from collm_dist.errors import Preempted
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.stop_signals import preemptible

_LINEAR_LAYERS = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
_STAGES = ("stage1", "stage2")
# Settings of all variants of a data set. The recorded runs fitted their anchors to all earlier rows.
_COMMON = {
    "ml1m": [
        "cf.cross_fit=8",
        "preprocessing.max_dislikes=25",
        "anchor.kind=blend",
        "anchor.recent_share=1",
        "prompt.stage1=configs/prompts/stage1_title.txt",
        "prompt.stage2=configs/prompts/stage2_title.txt",
        "lora.rank=16",
        "lora.alpha=32",
        f"lora.target_modules={_LINEAR_LAYERS}",
        "stage1.learning_rate=2e-4",
        "stage2.learning_rate=5e-4",
        *(f"{stage}.num_epochs=1" for stage in _STAGES),
        *(f"{stage}.pairwise_weight=0.5" for stage in _STAGES),
        *(f"{stage}.llm_loss_weight=1.0" for stage in _STAGES),
    ],
    "amazon_industrial": [
        "dataset.row_filter=null",
        "dataset.split={method: column}",
        "dataset.columns={split: split}",
        "preprocessing.num_user_buckets=8",
        "preprocessing.num_shards=2",
        "cf.item_text=64",
        "anchor.recent_share=1",
        "prompt.score=title",
        "prompt.stage1=configs/prompts/stage1_next.txt",
        "prompt.stage2=configs/prompts/stage2_next.txt",
        "lora.rank=16",
        "lora.alpha=32",
        f"lora.target_modules={_LINEAR_LAYERS}",
        *(f"{stage}.learning_rate=5e-4" for stage in _STAGES),
        *(f"{stage}.listwise_weight=1.0" for stage in _STAGES),
        *(f"{stage}.llm_loss_weight=1.0" for stage in _STAGES),
    ],
}
CONFIGS = {"ml1m": "ml1m_official", "amazon_industrial": "own_clicks"}
_GENRES = ["dataset.items_path={data}/items_genres.parquet", "dataset.item_text={title}: {genres}"]
_LIKES = ["preprocessing.max_dislikes=1", "anchor.kind=cf"]
_FEEDBACK = [f"prompt.{stage}=configs/prompts/{stage}_feedback.txt" for stage in _STAGES]
_NO_PAIRS = [f"{stage}.pairwise_weight=null" for stage in _STAGES]
_NO_LISTS = [f"{stage}.listwise_weight=null" for stage in _STAGES]
_YES_NO = ["prompt.score=yes_minus_no", *(f"prompt.{stage}=configs/prompts/{stage}.txt" for stage in _STAGES)]
_NO_LLM_LOSS = [f"{stage}.llm_loss_weight=null" for stage in _STAGES]
_NO_ANCHOR = ["anchor.kind=none", *_NO_LLM_LOSS]
# Settings of each variant beyond those of its data set, and the variant that it is compared with.
VARIANTS: dict[str, dict[str, tuple[list[str], str | None]]] = {
    "ml1m": {
        "full": (_GENRES, None),
        "titles": ([], "full"),
        "likes": (_LIKES, "titles"),
        "text": ([_LIKES[0], *_NO_ANCHOR, *_NO_PAIRS, "stage1.num_epochs=2"], None),
        "no_anchor": ([*_GENRES, *_NO_ANCHOR], "full"),
        "no_pairs": ([*_GENRES, *_NO_PAIRS], "full"),
        "no_llm_loss": ([*_GENRES, *_NO_LLM_LOSS], "full"),
        "feedback": ([*_GENRES, *_FEEDBACK], "full"),
    },
    "amazon_industrial": {
        "full": ([], None),
        "yes_no": (_YES_NO, "full"),
        "no_anchor": (_NO_ANCHOR, "full"),
        # In short runs the stages keep the checkpoint of step 0, the anchor itself, whatever their loss and score.
        "no_anchor_no_lists": ([*_NO_ANCHOR, *_NO_LISTS], "no_anchor"),
        "no_anchor_yes_no": ([*_NO_ANCHOR, *_YES_NO], "no_anchor"),
        "no_llm_loss": (_NO_LLM_LOSS, "full"),
        "no_lists": (_NO_LISTS, "full"),
        "no_cf_text": (["cf.item_text=null"], "full"),
    },
}


def build_settings(cell: Cell, arguments: argparse.Namespace) -> list[str]:
    """Return the settings of a variant's run."""
    runs = [other.find_run(arguments.work) for other in list_cells(arguments) if other != cell]
    return [
        f"run.dir={cell.find_run(arguments.work)}",
        f"run.seed={cell.seed}",
        f"run.reuse=[{','.join(str(run) for run in runs if run.exists())}]",
        f"dataset.path={arguments.data / 'interactions.parquet'}",
        f"dataset.items_path={arguments.data / 'items.parquet'}",
        *(setting.replace("{data}", str(arguments.data)) for setting in list_settings(cell, arguments)),
    ]


def list_settings(cell: Cell, arguments: argparse.Namespace) -> list[str]:
    """Return a variant's settings except paths; a record is valid while these are the same."""
    data_set = arguments.data_set
    return [*_COMMON[data_set], *VARIANTS[data_set][cell.variant][0], *arguments.overrides]


def run_cell(cell: Cell, arguments: argparse.Namespace, deadline: float) -> int:
    """Run a variant until it is done or the deadline has passed, and return the exit code; its seconds add up."""
    config = ROOT / "configs" / f"{CONFIGS[arguments.data_set]}.yaml"
    command = [sys.executable, "launch/run_pipeline.py", "--config", str(config), *build_settings(cell, arguments)]
    spent = cell.find_run(arguments.work) / "seconds.json"
    before = json.loads(spent.read_text(encoding="utf-8")) if spent.exists() else 0.0
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        with preemptible():
            code = process.wait(timeout=max(0.0, deadline - started))
    except (subprocess.TimeoutExpired, Preempted):
        process.send_signal(signal.SIGTERM)  # a checkpoint at the next step's end, then exit code 75
        code = process.wait()
        if code == -signal.SIGTERM:  # no handler was installed yet, so nothing is lost
            code = Preempted.exit_code
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        write_json(spent, round(before + time.monotonic() - started, 1))
    return code


def find_records(arguments: argparse.Namespace) -> Path:
    """Return the folder of the records."""
    folder: Path = arguments.output / find_result(arguments).stem
    return folder


def find_result(arguments: argparse.Namespace) -> Path:
    """Return the path of the result that is made from the records."""
    names = filter(None, ("reproduce", arguments.data_set, arguments.part))
    path: Path = arguments.output / f"{'_'.join(names)}.json"
    return path


def list_cells(arguments: argparse.Namespace, seeds: Sequence[int] | None = None) -> list[Cell]:
    """Return all variants of the data set with some seeds, by default the chosen seeds."""
    return [Cell(name, seed) for seed in seeds or arguments.seeds for name in VARIANTS[arguments.data_set]]


def load_record(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return a variant's record, or None if there is none of the settings that the variant has now."""
    return read_record(cell, find_records(arguments), list_settings(cell, arguments))


def find_seeds(arguments: argparse.Namespace) -> list[int]:
    """Return the chosen seeds and all others that have a valid record of a variant."""
    known, recorded = VARIANTS[arguments.data_set], list_recorded(find_records(arguments))
    valid = {cell.seed for cell in recorded if cell.variant in known and load_record(cell, arguments)}
    return sorted({*arguments.seeds, *valid})


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result of all variants that have a record, chosen or not, with any seed."""
    seeds = find_seeds(arguments)
    by_cell = {cell: load_record(cell, arguments) for cell in list_cells(arguments, seeds)}
    records = [record for record in by_cell.values() if record]
    reported = ("variant", "seed", "seconds", "precision", "warnings", "data", "hardware", "versions")

    def name(record: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        return {"data_set": arguments.data_set, "variant": record["variant"], "seed": record["seed"], **row}

    return {
        "question": (__doc__ or "").splitlines()[0],
        "part": arguments.part,
        "command": f"python -m benchmarks.reproduce --data-set {arguments.data_set} --data DIR"
        + (f" --part {arguments.part}" if arguments.part else "")
        + (f" --seeds {' '.join(map(str, seeds))}" if seeds != [0] else "")
        + (f" --overrides {' '.join(arguments.overrides)}" if arguments.overrides else ""),
        "hardware": records[-1]["hardware"],
        "versions": records[-1]["versions"],
        "overrides": arguments.overrides,
        "variants": {
            variant: {"settings": [*_COMMON[arguments.data_set], *settings], "versus": base}
            for variant, (settings, base) in VARIANTS[arguments.data_set].items()
        },
        "cells": [{key: record[key] for key in reported} for record in records],
        "not_run": [cell.name for cell, record in by_cell.items() if not record],
        "rows": [name(record, row) for record in records for row in record["rows"]],
        "differences": [name(record, row) for record in records for row in record["differences"]],
        "against": [name(record, row) for record in records for row in record["against"]],
    }


def compare_variants(cell: Cell, arguments: argparse.Namespace) -> None:
    """Write the comparisons of a cell with its base, and of other variants with the cell, into their records."""
    for other in list_cells(arguments):
        versus = VARIANTS[arguments.data_set][other.variant][1]
        if versus is None:
            continue
        base = Cell(versus, other.seed)
        # A run of other overrides is not comparable, though it has scores of the same rows.
        if cell in (other, base) and load_record(other, arguments) and load_record(base, arguments):
            compare_cells(other, base, find_records(arguments), arguments.work)


def save_cell(cell: Cell, arguments: argparse.Namespace) -> None:
    """Write a finished variant's record and its comparisons with other variants, then result and page."""
    settings = list_settings(cell, arguments)
    write_record(cell, find_records(arguments), settings, cell.find_run(arguments.work))
    compare_variants(cell, arguments)
    write_json(find_result(arguments), collect(arguments))
    write_page(arguments.page, arguments.output)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; ``chosen`` are the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-set", choices=list(CONFIGS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set's Parquet files")
    parser.add_argument("--work", type=Path, help="folder of the runs; default runs/reproduce_<data set>[_<part>]")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after this time; the same command resumes"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all variants")
    parser.add_argument(
        "--part", metavar="NAME", help="records, result and section of their own, for variants of a smaller size"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="rendered page")
    parser.add_argument("--list", action="store_true", help="print the variants and whether they are done")
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    arguments.work = (arguments.work or ROOT / "runs" / find_result(arguments).stem).resolve()
    known = VARIANTS[arguments.data_set]
    for name in arguments.variants or []:
        if name not in known:
            parser.error(f"--variants: {name} is none of {', '.join(known)}")
    arguments.chosen = [cell for cell in list_cells(arguments) if cell.variant in (arguments.variants or known)]
    return arguments


def main() -> int:
    """Run the variants that are not done, and return the exit code: 75 when the time is up."""
    arguments = parse_arguments()
    deadline = time.monotonic() + 60 * arguments.minutes
    for cell in arguments.chosen:
        done = load_record(cell, arguments) is not None
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
