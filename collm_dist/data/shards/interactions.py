"""Tables of a data folder: interactions by user bucket, users and items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.data.shards.availability import WINDOW_COLUMNS
from collm_dist.data.shards.manifest import ITEM_COUNTS, USER_TEXTS, BucketInfo, load_manifest
from collm_dist.errors import ArtifactError
from collm_dist.runs.file_hashes import hash_once

REMEDY = "restore it from the copy that it came from, or redo the data step with --force data"

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
        columns: names in ``COLUMNS``.
        split: train, valid or test; None = all.
        include_sampled: whether to include sampled negatives.

    Returns:
        One (N,) array per column; split is an array of strings.

    Raises:
        ArtifactError: the data step is not done, or a table is missing or damaged.
    """
    needed = list(dict.fromkeys([*columns, "split", "sampled", "user_idx", "timestamp", "row_id"]))
    table = pa.concat_tables([read_bucket(data_dir, bucket, needed) for bucket in load_manifest(data_dir).buckets])
    if split is not None:
        table = table.filter(pa.compute.field("split") == split)
    if not include_sampled:
        table = table.filter(pa.compute.field("sampled") == 0)
    order = np.lexsort([table.column(name).to_numpy() for name in ("row_id", "timestamp", "user_idx")])
    return {name: table.column(name).to_numpy()[order] for name in columns}


def read_bucket(data_dir: Path, bucket: BucketInfo, columns: Iterable[str]) -> Any:
    """Return columns of a bucket's interactions as an Arrow table.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    return _read_verified(data_dir / bucket.path, bucket.sha256, list(columns))


def _read_verified(path: Path, sha256: str | None, columns: list[str] | None = None) -> Any:
    """Read a Parquet file. Its checksum is verified once per process, and again if the file changes."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing or no file; {REMEDY}")
    try:
        if sha256 is not None and (actual := hash_once(path)) != sha256:
            raise ArtifactError(
                f"{path} is damaged (SHA-256 {actual[:16]}..., the manifest says {sha256[:16]}...; "
                f"{path.stat().st_size} bytes); {REMEDY}"
            )
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); {REMEDY}") from error


def load_item_table(data_dir: Path) -> dict[str, list[str]]:
    """Return ``item_id``, ``title``, ``text`` and ``WINDOW_COLUMNS`` of all items in the order of ``item_idx``."""
    table = _load_table(data_dir, "items.parquet")
    for name in set(WINDOW_COLUMNS) & set(table):
        if not all(time is None or isinstance(time, int) for time in table[name]):
            raise ArtifactError(f"{data_dir / 'items.parquet'}: {name} holds other values than integers; {REMEDY}")
    return table


def load_user_ids(data_dir: Path) -> list[str]:
    """Return the raw ids of all users in the order of ``user_idx``."""
    return _load_table(data_dir, "users.parquet")["user_id"]


def load_item_counts(data_dir: Path) -> tuple[Any, Any]:
    """Return the (I,) likes and (I,) events of all items, of a data folder that has no events."""
    counts = _load_table(data_dir, ITEM_COUNTS)
    return tuple(np.array(counts[name], dtype=np.int64) for name in ("likes", "rows"))  # type: ignore[return-value]


def load_user_texts(data_dir: Path) -> dict[str, list[str]] | None:
    """Return ``user_id`` and ``text`` of the users in the order of ``user_idx``, and of users without rows after them.

    A user without a text has None. The result is None if the data step has read no file of users.
    """
    return _load_table(data_dir, USER_TEXTS) if USER_TEXTS in load_manifest(data_dir).tables else None


def load_known_users(data_dir: Path) -> list[str]:
    """Return the raw ids of all users of whom a data folder has rows or a text."""
    texts = load_user_texts(data_dir)
    return load_user_ids(data_dir) if texts is None else texts["user_id"]


def _load_table(data_dir: Path, name: str) -> dict[str, list[str]]:
    table = _read_verified(data_dir / name, load_manifest(data_dir).tables.get(name))
    return {name: table.column(name).to_pylist() for name in table.column_names if not name.endswith("_idx")}
