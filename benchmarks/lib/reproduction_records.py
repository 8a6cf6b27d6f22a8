"""Records of the cells of benchmarks/reproduce_ml1m.py: a file each, which outlives the cell's run directory."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.lib.machine import TUNING_PACKAGES, describe_run
from collm_dist.config.loader import load_config
from collm_dist.evaluation.comparison import TableSettings, compute_table
from collm_dist.evaluation.evaluated_rows import EvaluatedRows, ScoredModel
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir

# The variant that each variant is compared with; the two differ in one part of the recipe.
BASES = {
    "train_cf": "stage2",
    "scratch": "stage2",
    "ui_tokens": "stage2",
    "item_ids": "stage2",
    "pair": "stage2",
    "pair_cross_fit": "pair",
    "pair_all": "pair_cross_fit",
    "pair_ask_first": "pair",
}


@dataclass(frozen=True)
class Cell:
    """A run of the grid: CF model, variant and seed."""

    cf: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """The value for --cells."""
        return f"{self.cf}/{self.variant}/{self.seed}"

    @property
    def base(self) -> Cell | None:
        """The cell that lacks one part of this cell."""
        if self.variant not in BASES:
            return None
        return Cell("mf" if self.cf == "none" else self.cf, BASES[self.variant], self.seed)

    def find_run(self, folder: Path) -> Path:
        """Return the cell's run directory."""
        return folder / self.name.replace("/", "-")

    def find_record(self, folder: Path) -> Path:
        """Return the path of the cell's record."""
        return folder / f"{self.name.replace('/', '-')}.json"


def read_record(cell: Cell, folder: Path, settings: Sequence[str]) -> dict[str, Any] | None:
    """Return a cell's record, or None if it has other settings or does not exist."""
    path = cell.find_record(folder)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record if record["settings"] == list(settings) else None


def write_record(cell: Cell, folder: Path, settings: Sequence[str], run: Path) -> None:
    """Write the record of a cell from the report of its finished run."""
    report, provenance = RunDir(run).read_record("eval"), describe_run(*TUNING_PACKAGES)
    dtype, seconds = load_config(run / "config.yaml").llm.dtype, run / "seconds.json"
    if dtype == "auto":
        dtype = "bfloat16" if "gpu" in provenance["hardware"] else "float32"
    write_json(
        cell.find_record(folder),
        {
            "cf": cell.cf,
            "variant": cell.variant,
            "seed": cell.seed,
            "settings": list(settings),
            "precision": dtype,
            **provenance,
            "seconds": json.loads(seconds.read_text(encoding="utf-8")) if seconds.exists() else 0.0,
            **{key: report[key] for key in ("rows", "differences", "warnings")},
            "against": None,
        },
    )


def compare_cells(cell: Cell, records: Path, runs: Path) -> None:
    """Add the paired difference between stage 2 of a cell and of its base to the record, if both have scores."""
    base = cell.base
    if base is None or not cell.find_record(records).exists():
        return
    paths = [member.find_run(runs) / "eval" / "scores" / "stage2-test.parquet" for member in (cell, base)]
    if not all(path.exists() for path in paths):
        return
    ours, theirs = (pq.read_table(path) for path in paths)
    if not ours.column("row_id").equals(theirs.column("row_id")):
        return
    columns = {
        name: ours.column(name).to_numpy().astype(np.int64) for name in ("row_id", "user_idx", "item_idx", "label")
    }
    rows = EvaluatedRows(
        "test",
        **columns,
        sampled=np.zeros_like(columns["label"]),
        group_id=columns["row_id"],
        slices={"all": np.ones(len(ours), dtype=bool)},
    )
    models = [
        ScoredModel(name, "", "", table.column("score").to_numpy())
        for name, table in (("ours", ours), ("theirs", theirs))
    ]
    _, (difference,) = compute_table(rows, models, [("ours", "theirs")], TableSettings(1000, 0.95, cell.seed))
    record = json.loads(cell.find_record(records).read_text(encoding="utf-8"))
    record["against"] = {**difference, "model": "stage2", "versus": f"{base.cf}/{base.variant}"}
    write_json(cell.find_record(records), record)


def summarize_seeds(
    pairs: Iterable[tuple[dict[str, Any], dict[str, Any]]], keys: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return a row for each CF model, variant and value of ``keys``, with means over seeds.

    The ends of intervals are means too. ``auc_std`` and ``uauc_std`` are added if there are several seeds.

    Args:
        pairs: (record of a cell, row of its report).
        keys: columns that identify a row of a report.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for record, row in pairs:
        groups[record["cf"], record["variant"], *(row[key] for key in keys)].append((record["seed"], row))
    merged = []
    for (cf, variant, *_), members in groups.items():
        first = members[0][1]
        row: dict[str, Any] = {"cf": cf, "variant": variant, "seeds": [seed for seed, _ in members]}
        for key, value in first.items():
            numbers = [member[key] for _, member in members]
            averaged = isinstance(value, float) and None not in numbers
            row[key] = fmean(numbers) if averaged else value
            if averaged and len(numbers) > 1 and key in ("auc", "uauc"):
                row[f"{key}_std"] = stdev(numbers)
        merged.append(row)
    return merged
