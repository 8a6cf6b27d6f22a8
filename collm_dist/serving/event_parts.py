"""Parquet parts of received events, in the columns of a run's log, and the parts that a run has read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.config import DatasetConfig
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.run_dir import RunDir
from collm_dist.storage import split_query

_NAME = re.compile(r"part-\d{6,}-[0-9a-f]{12}\.parquet")
_INPUT = "input."


def describe_columns(dataset: DatasetConfig) -> dict[str, Any]:
    """Return the names of a part's columns, so that a run with these settings reads it together with its log.

    In a log with ratings, a like gets the lowest rating of a like and a dislike one less. Where every row is a like,
    parts have no label.
    """
    columns = dataset.columns
    is_explicit = dataset.feedback == "explicit"
    rating = columns.rating if is_explicit and columns.label is None else None
    return {
        "user_id": columns.user_id,
        "item_id": columns.item_id,
        "timestamp": columns.timestamp,
        "rating": rating,
        "label": (columns.label or "label") if is_explicit and rating is None else None,
        "like_threshold": dataset.like_threshold,
    }


def write_part_file(path: Path, rows: Sequence[tuple[str, str, int, int]], columns: Mapping[str, Any]) -> None:
    """Write (user, item, time, label) rows, in their order, atomically. Times are timestamps of one second in UTC.

    Raises:
        DiskError: the file cannot be written.
    """
    users, items, times, labels = zip(*rows, strict=True) if rows else ((), (), (), ())
    table = {
        columns["user_id"]: pa.array(users, pa.string()),
        columns["item_id"]: pa.array(items, pa.string()),
    }
    if columns["timestamp"] is not None:
        table[columns["timestamp"]] = pa.array(times, pa.int64()).cast(pa.timestamp("s", tz="UTC"))
    if columns["rating"] is not None:
        threshold = float(columns["like_threshold"])
        table[columns["rating"]] = pa.array([threshold - 1 + label for label in labels], pa.float64())
    if columns["label"] is not None:
        table[columns["label"]] = pa.array(labels, pa.int8())
    with open_atomic(path, "wb") as file:
        pq.write_table(pa.table(table), file)


def list_read_parts(run_dir: RunDir) -> list[str]:
    """Return the file names of the parts that a run's data step has read, from its record.

    Raises:
        ArtifactError: the step is not done, or its record is damaged.
    """
    inputs = [
        key[len(_INPUT) :] for key in run_dir.read_record("data").get("fingerprint", {}) if key.startswith(_INPUT)
    ]
    names = [PurePosixPath(split_query(uri)[0]).name for uri in inputs]
    return [name for name in names if _NAME.fullmatch(name)]


def list_missing_parts(folder: Path, names: Iterable[str]) -> set[str]:
    """Return the names of parts that are not in the folder."""
    return {name for name in names if not (folder / name).exists()}
