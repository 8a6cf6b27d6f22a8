"""Records of the cells of benchmarks/reproduce.py: a file each, which outlives the cell's run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.lib.machine import TUNING_PACKAGES, describe_run
from collm_dist.config.loader import load_config
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.evaluation.comparison import TableSettings, compute_table
from collm_dist.evaluation.evaluated_rows import ScoredModel, load_splits
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir


@dataclass(frozen=True)
class Cell:
    """A run of the benchmark: a variant of the recipe with a seed."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run and its record."""
        return f"{self.variant}-{self.seed}"

    def find_run(self, folder: Path) -> Path:
        """Return the cell's run directory."""
        return folder / self.name

    def find_record(self, folder: Path) -> Path:
        """Return the path of the cell's record."""
        return folder / f"{self.name}.json"


def read_record(cell: Cell, folder: Path, settings: Sequence[str]) -> dict[str, Any] | None:
    """Return a cell's record, or None if it has other settings or does not exist."""
    path = cell.find_record(folder)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record if record["settings"] == list(settings) else None


def list_recorded(folder: Path) -> list[Cell]:
    """Return the cells that have a record in a folder, whatever its settings."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [Cell(record["variant"], record["seed"]) for record in records]


def write_record(cell: Cell, folder: Path, settings: Sequence[str], run: Path) -> None:
    """Write the record of a cell from the report of its finished run."""
    report, provenance = RunDir(run).read_record("eval"), describe_run(*TUNING_PACKAGES)
    dtype, seconds = load_config(run / "config.yaml").llm.dtype, run / "seconds.json"
    if dtype == "auto":
        dtype = "bfloat16" if "gpu" in provenance["hardware"] else "float32"
    write_json(
        cell.find_record(folder),
        {
            "variant": cell.variant,
            "seed": cell.seed,
            "settings": list(settings),
            "precision": dtype,
            **provenance,
            "seconds": json.loads(seconds.read_text(encoding="utf-8")) if seconds.exists() else 0.0,
            **{key: report[key] for key in ("rows", "differences", "warnings", "data")},
            "against": [],
        },
    )


def compare_cells(cell: Cell, base: Cell, records: Path, runs: Path) -> None:
    """Add the paired difference between stage 2 of two cells to the first one's record, if both have scores.

    Both cells must have records of the settings that are compared; scores do not tell by which settings they were made.
    """
    paths = [member.find_run(runs) / "eval" / "scores" / "stage2-test.parquet" for member in (cell, base)]
    if not all(path.exists() for path in paths):
        return
    ours, theirs = (pq.read_table(path) for path in paths)
    if not ours.column("row_id").equals(theirs.column("row_id")):
        return
    run_dir = RunDir(cell.find_run(runs))
    config = load_config(run_dir.path / "config.yaml")
    rows = load_splits(config, run_dir, load_manifest(run_dir.step_dir("data")))["test"].rows
    order = np.searchsorted(ours.column("row_id").to_numpy(), rows.row_id)  # score files are sorted by row id
    models = [
        ScoredModel(name, "", "", table.column("score").to_numpy()[order])
        for name, table in (("ours", ours), ("theirs", theirs))
    ]
    cutoffs = tuple(config.evaluation.cutoffs) if config.dataset.feedback == "implicit" else ()
    settings = TableSettings(1000, 0.95, cell.seed, cutoffs)
    differences = compute_table(rows, models, [("ours", "theirs")], settings)[1]
    record = json.loads(cell.find_record(records).read_text(encoding="utf-8"))
    record["against"] = [{**difference, "model": "stage2", "versus": base.variant} for difference in differences]
    write_json(cell.find_record(records), record)
