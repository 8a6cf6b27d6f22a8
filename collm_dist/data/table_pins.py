"""Versions of lakehouse tables that a run keeps: found once, when its data step begins, and recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.lake_tables import LOCATIONS, LakeTable, get_version, open_tables, set_versions
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir

_FILE = ".tables.json"


def pin_tables(dataset: DatasetConfig, run_dir: RunDir) -> DatasetConfig:
    """Return the settings with the versions that the run has recorded, for tables whose version is not set.

    Args:
        dataset: the settings.
        run_dir: its data step may be done, interrupted, or not begun.
    """
    return set_versions(dataset, _read_pins(dataset, run_dir))


def find_versions(
    dataset: DatasetConfig, run_dir: RunDir, *, force: bool = False
) -> tuple[DatasetConfig, dict[str, LakeTable]]:
    """Return the settings with a version for each table, and the tables in these versions by setting.

    The versions are recorded for the time until the data step is done.

    Args:
        dataset: the settings.
        run_dir: the run.
        force: take the newest versions even if the run has recorded others.

    Raises:
        ConfigError: a library is not installed.
        DataError: a table or version does not exist.
        LaunchError: an object store is unreachable or denies access.
    """
    pinned = dataset if force else pin_tables(dataset, run_dir)
    tables = open_tables(pinned)
    path = run_dir.step_dir("data") / _FILE
    if tables:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {key: {"location": table.location, **table.describe()} for key, table in tables.items()})
    else:
        path.unlink(missing_ok=True)
    return set_versions(pinned, {key: table.describe() for key, table in tables.items()}), tables


def drop_pins(run_dir: RunDir) -> None:
    """Remove the record of versions of a data step that is done: its manifest has them."""
    (run_dir.step_dir("data") / _FILE).unlink(missing_ok=True)


def describe_wanted(dataset: DatasetConfig, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of tables in a recorded fingerprint with the versions that the settings name.

    Args:
        dataset: the settings.
        recorded: fingerprint of a data step.
    """
    wanted = {}
    for key, prefix in LOCATIONS.items():
        if isinstance(entry := recorded.get(f"input.{key}"), dict):
            named = {name: getattr(dataset, prefix + name, None) for name in entry}
            wanted[f"input.{key}"] = entry | {name: value for name, value in named.items() if value is not None}
    return wanted


def list_moved(dataset: DatasetConfig, tables: Mapping[str, LakeTable]) -> list[str]:
    """Return a line for each table that has moved on from the version that a run keeps without being told to.

    Args:
        dataset: the settings, without the recorded versions.
        tables: by setting, as they are read.
    """
    return [
        f"{key}={table.show()} has moved on to {table.newest}; this run keeps the version that it began with. Set "
        f"{table.get_setting(key)}={table.newest} with --force data, or another run.dir, to read the newer one"
        for key, table in tables.items()
        if table.newest != table.version and get_version(dataset, key, table.kind) is None
    ]


def _read_pins(dataset: DatasetConfig, run_dir: RunDir) -> dict[str, dict[str, Any]]:
    """Return the recorded entries by setting, of tables that are still in the place that the settings name."""
    if run_dir.is_done("data"):
        fingerprint = run_dir.read_record("data").get("fingerprint", {})
        entries = {
            key: {**fingerprint[f"input.{key}"], "location": fingerprint.get(f"config.{key}")}
            for key in LOCATIONS
            if isinstance(fingerprint.get(f"input.{key}"), dict)
        }
    else:
        entries = _read_file(run_dir.step_dir("data") / _FILE)
    return {
        key: entry
        for key, entry in entries.items()
        if entry.get("location") == getattr(dataset, key.removeprefix("dataset."))
    }


def _read_file(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not begun, or begun again
        return {}
    known = entries if isinstance(entries, dict) else {}
    return {key: entry for key, entry in known.items() if key in LOCATIONS and isinstance(entry, dict)}
