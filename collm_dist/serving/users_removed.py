"""Removal of everything about single users from the files of an export: ids, events, texts, vectors.

The counts of each item's likes and events stay, since prompts, slots and anchors of new users read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch

from collm_dist.cf.models.interface import is_local
from collm_dist.config import Config
from collm_dist.data.shards.manifest import ITEM_COUNTS, USER_TEXTS, load_manifest
from collm_dist.runs.atomic_files import compute_file_hash
from collm_dist.runs.run_dir import RunDir, Step
from collm_dist.serving.event_log import EventLog
from collm_dist.tuning.stage2 import load_slot_vectors

_CF_PREFIX = "cf_model."
_SETTING = "config.dataset.row_filter"
# What the data step says about its input: examples of bad rows, ids of earlier tables.
_ABOUT_INPUT = ("input", "forgotten", "user_texts")


def is_of_users(name: str) -> bool:
    """Return whether a file of an export, by its name in it, holds ids, events or texts of users."""
    return name.startswith("data/interactions/") or name in ("data/users.parquet", f"data/{USER_TEXTS}")


def remove_users(part: Path, config: Config, run_dir: RunDir) -> dict[Step, dict[str, Any]]:
    """Finish an export without the files of ``is_of_users``, and return the records of the steps that differ.

    Args:
        part: folder of the export, with its other files.
        config, run_dir: the run, which has events.
    """
    manifest, data_dir = load_manifest(run_dir.step_dir("data")), run_dir.step_dir("data")
    changed: tuple[Step, ...] = ("data", "cf", "stage2")
    records = {step: run_dir.read_record(step) for step in changed if run_dir.is_done(step)}
    log = EventLog.load(data_dir, manifest)
    likes, rows = log.count_item_events(np.arange(manifest.num_items), log.end)
    pq.write_table(pa.table({"likes": likes, "rows": rows}), part / "data" / ITEM_COUNTS)
    tables = ["items.parquet", ITEM_COUNTS]
    for name in ("users.parquet", USER_TEXTS):
        if name in manifest.tables or name == "users.parquet":
            pq.write_table(pq.read_schema(data_dir / name).remove_metadata().empty_table(), part / "data" / name)
            tables.append(name)
    data = {key: value for key, value in records["data"].items() if key not in _ABOUT_INPUT}
    fingerprint = {key: value for key, value in data.get("fingerprint", {}).items() if key != _SETTING}
    hashes = {name: compute_file_hash(part / "data" / name) for name in tables}
    records["data"] = data | {"events_end": log.end, "tables": hashes, "fingerprint": fingerprint}
    for path in sorted((part / "cf").glob("*.safetensors")):
        _rewrite(path, {})
        _record_file(records["cf"], path)
    path = part / "mapping.safetensors"
    if path.exists() and config.stage2.train_cf:
        scales: dict[str, Any] = {}
        if config.stage2.train_cf == "scratch":  # which a loader would compute from the users' rows
            state = load_slot_vectors(config, run_dir, manifest).state_dict()
            scales = {_CF_PREFIX + name: tensor for name, tensor in state.items() if name.endswith("_scale")}
        _rewrite(path, scales)
        _record_file(records["stage2"], path)
    return records


def _rewrite(path: Path, more: Mapping[str, Any]) -> None:
    """Write a file of tensors again, with no rows of users and with more tensors."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    kept = {name: tensor[:0].clone() if _is_of_users(name) else tensor for name, tensor in tensors.items()}
    data = safetensors.torch.save({**kept, **{name: tensor.contiguous() for name, tensor in more.items()}}, metadata)
    path.unlink()
    path.write_bytes(data)


def _is_of_users(name: str) -> bool:
    return is_local(name) or (name.startswith(_CF_PREFIX) and ".users." in name)


def _record_file(record: dict[str, Any], path: Path) -> None:
    record["files"] = {**record.get("files", {}), path.name: compute_file_hash(path)}
