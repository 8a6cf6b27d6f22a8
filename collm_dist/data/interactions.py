"""Reading the tables of a data folder: interactions by user bucket, users and items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.errors import ArtifactError

COLUMNS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("group_id", pa.int64()),
        ("user_idx", pa.int64()),
        ("item_idx", pa.int64()),
        ("timestamp", pa.int64()),
        ("label", pa.int8()),
        ("split", pa.string()),
        ("sampled", pa.int8()),
        ("num_likes", pa.int64()),
        ("user_likes", pa.int64()),
        ("user_rows", pa.int64()),
        ("item_likes", pa.int64()),
        ("item_rows", pa.int64()),
        ("user_in_train", pa.int8()),
        ("item_in_train", pa.int8()),
    ]
)


def load_interactions(
    data_dir: Path, columns: Sequence[str], split: str | None = None, *, include_sampled: bool = True
) -> dict[str, Any]:
    """Load columns of all interactions into memory, sorted by user, timestamp and row id.

    Args:
        data_dir: a run's data folder.
        columns: names of ``COLUMNS``.
        split: train, valid or test; None = all.
        include_sampled: whether sampled negatives are among them.

    Returns:
        One array a column; split is an array of strings.

    Raises:
        ArtifactError: the folder has no interactions.
    """
    paths = sorted((data_dir / "interactions").glob("bucket-*.parquet"))
    if not paths:
        raise ArtifactError(f"{data_dir}/interactions is empty: run launch/preprocess_data.py first")
    needed = list(dict.fromkeys([*columns, "split", "sampled", "user_idx", "timestamp", "row_id"]))
    table = pa.concat_tables([pq.read_table(path, columns=needed) for path in paths])
    if split is not None:
        table = table.filter(pa.compute.field("split") == split)
    if not include_sampled:
        table = table.filter(pa.compute.field("sampled") == 0)
    order = np.lexsort([table.column(name).to_numpy() for name in ("row_id", "timestamp", "user_idx")])
    return {name: table.column(name).to_numpy()[order] for name in columns}


def load_item_table(data_dir: Path) -> dict[str, list[str]]:
    """Return ``item_id``, ``title`` and ``text`` of all items, in the order of ``item_idx``."""
    return _load_table(data_dir / "items.parquet")


def load_user_ids(data_dir: Path) -> list[str]:
    """Return the raw ids of all users, in the order of ``user_idx``."""
    return _load_table(data_dir / "users.parquet")["user_id"]


def _load_table(path: Path) -> dict[str, list[str]]:
    if not path.exists():
        raise ArtifactError(f"{path} is missing: run launch/preprocess_data.py first")
    table = pq.read_table(path)
    return {name: table.column(name).to_pylist() for name in table.column_names if not name.endswith("_idx")}
