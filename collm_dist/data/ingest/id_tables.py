"""Id tables: raw ids to dense indices. Append-only: an assigned index never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.forgotten_users import write_tombstone
from collm_dist.data.ingest.id_forms import drop_fractions
from collm_dist.data.shards.availability import WINDOW_COLUMNS
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.data.shards.manifest import BucketInfo, load_manifest
from collm_dist.errors import ArtifactError, ConfigError
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.run_dir import RunDir


def compute_ids_hash(ids: Iterable[str]) -> str:
    """Return the SHA-256 of ids in the order of their indices; equal hashes mean equal tables."""
    digest = hashlib.sha256()
    for raw_id in ids:
        digest.update(raw_id.encode() + b"\x00")
    return digest.hexdigest()


def sort_naturally(ids: Sequence[str]) -> list[str]:
    """Sort ids by length, then alphabetically, so that whole numbers are in numeric order."""
    return sorted(ids, key=lambda raw_id: (len(raw_id), raw_id))


@dataclass(frozen=True)
class PreviousTables:
    """Id tables of the run that this one extends; empty if there is none.

    Attributes:
        user_ids, item_ids: raw ids in the order of their indices, with tombstones for forgotten users.
        buckets: the tables of interactions.
        rows: number of raw rows that the run was made from.
        num_forgotten: number of ids that were replaced by tombstones here.
    """

    user_ids: tuple[str, ...] = ()
    item_ids: tuple[str, ...] = ()
    buckets: tuple[BucketInfo, ...] = ()
    rows: int = 0
    num_forgotten: int = 0


def describe_previous(run: str | None) -> dict[str, Any]:
    """Return the sizes and hashes of the id tables of ``dataset.extend_from``, on which the data step depends.

    An extended table starts with the table that it extends; size and hash allow to check that.

    Raises:
        ArtifactError: that run has no data.
    """
    if run is None:
        return {}
    manifest = load_manifest(Path(run) / "data")
    names = ("num_users", "num_items", "users_hash", "items_hash")
    return {"dataset.extend_from": {name: getattr(manifest, name) for name in names}}


def load_previous_tables(dataset: DatasetConfig, num_buckets: int, forgotten: Any) -> PreviousTables:
    """Load the id tables of ``dataset.extend_from``, with tombstones in place of forgotten users.

    Raises:
        ArtifactError: that run has no data, damaged data, or another number of user buckets.
        ConfigError: that run has forgotten users, but ``dataset.forget`` is not set.
    """
    run = dataset.extend_from
    if run is None:
        return PreviousTables()
    data_dir = Path(run) / "data"
    manifest = load_manifest(data_dir)
    if len(manifest.buckets) != num_buckets:
        raise ArtifactError(
            f"dataset.extend_from: {run} has {len(manifest.buckets)} user buckets, this run {num_buckets}; set "
            f"preprocessing.num_user_buckets={len(manifest.buckets)}"
        )
    record, ids = RunDir(Path(run)).read_record("data"), load_user_ids(data_dir)
    if "forgotten" in record and dataset.forget is None:
        raise ConfigError(
            f"dataset.forget: {run} was made without the users of a list; their rows that are still in the log would "
            "come back. Set dataset.forget again (once the log is clean, an empty list will do)"
        )
    indices = np.flatnonzero(
        pc.is_in(drop_fractions(pa.array(ids, pa.string())), forgotten).to_numpy(zero_copy_only=False)
    )
    for index in indices.tolist():
        ids[index] = write_tombstone(index)
    return PreviousTables(
        user_ids=tuple(ids),
        item_ids=tuple(load_item_table(data_dir)["item_id"]),
        buckets=manifest.buckets,
        rows=record["input"]["rows"],
        num_forgotten=len(indices),
    )


def assign_users(previous: PreviousTables, bucket_ids: Sequence[Any]) -> tuple[list[Any], list[list[tuple[int, int]]]]:
    """Assign an index to every user: known users keep theirs, new users follow bucket by bucket.

    Args:
        previous: tables that are extended.
        bucket_ids: for each bucket the sorted Arrow array of its user ids.

    Returns:
        For each bucket its table ``id, idx`` (known users first) and its (first user, number of users) slices.
    """
    tables, ranges, next_index = [], [], len(previous.user_ids)
    for bucket, ids in enumerate(bucket_ids):
        slices = list(previous.buckets[bucket].user_ranges) if previous.buckets else []
        old = [index for first, count in slices for index in range(first, first + count)]
        old_ids = pa.array([previous.user_ids[index] for index in old], pa.string())
        new_ids = ids.filter(pc.invert(pc.is_in(ids, old_ids)))
        new = range(next_index, next_index + len(new_ids))
        next_index += len(new_ids)
        if len(new_ids):
            slices.append((new.start, len(new_ids)))
        tables.append(pa.table({"id": pa.concat_arrays([old_ids, new_ids]), "idx": pa.array([*old, *new], pa.int64())}))
        ranges.append(slices)
    return tables, ranges


def assign_items(previous: PreviousTables, bucket_ids: Sequence[Any]) -> list[str]:
    """Return the item ids in the order of their indices: known ones keep theirs, new ones follow in natural order.

    Args:
        previous: tables that are extended.
        bucket_ids: for each bucket the Arrow array of its item ids.
    """
    # Nearly every bucket has nearly every item, so duplicates are removed before the ids become Python strings.
    distinct = pa.chunked_array(bucket_ids, pa.string()).unique()
    new_ids = set(distinct.to_pylist()).difference(previous.item_ids)
    return [*previous.item_ids, *sort_naturally(list(new_ids))]


@dataclass(frozen=True)
class IdTables:
    """The id tables of a data folder.

    Attributes:
        user_ids, item_ids: raw ids in the order of their indices.
        user_ranges: for each bucket its (first user, number of users) slices.
        texts_hash: hash of all item texts.
        num_items_without_text: number of items missing from the item file.
    """

    user_ids: list[str]
    item_ids: list[str]
    user_ranges: list[list[tuple[int, int]]]
    texts_hash: str
    num_items_without_text: int


def write_id_tables(
    data_dir: Path,
    user_tables: Sequence[Any],
    user_ranges: list[list[tuple[int, int]]],
    item_ids: list[str],
    items: Any,
) -> IdTables:
    """Write ``users.parquet`` and ``items.parquet``.

    Args:
        data_dir: the data folder.
        user_tables, user_ranges: from ``assign_users``.
        item_ids: from ``assign_items``.
        items: table ``item_id, title, text`` of the item file.
    """
    user_ids = write_user_table(data_dir / "users.parquet", user_tables)
    num_without_text, texts_hash = write_item_table(data_dir / "items.parquet", item_ids, items)
    return IdTables(user_ids, item_ids, user_ranges, texts_hash, num_without_text)


def write_user_table(path: Path, tables: Sequence[Any]) -> list[str]:
    """Write ``users.parquet`` in the order of the indices and return the ids."""
    table = pa.concat_tables(tables).sort_by("idx")
    with open_atomic(path, "wb") as file:
        pq.write_table(pa.table({"user_idx": table.column("idx"), "user_id": table.column("id")}), file)
    return [str(user_id) for user_id in table.column("id").to_pylist()]


def write_item_table(path: Path, item_ids: Sequence[str], items: Any) -> tuple[int, str]:
    """Write ``items.parquet`` in the order of the indices; the id is the text of an item that ``items`` lacks.

    Windows of items are written if ``items`` has them.

    Returns:
        Number of items that ``items`` lacks, and the hash of all texts.
    """
    ids = pa.array(item_ids, pa.string())
    rows = pc.index_in(ids, items.column("item_id").combine_chunks())
    columns = {"item_idx": pa.array(range(len(item_ids)), pa.int64()), "item_id": ids}
    for name in ("title", "text"):
        columns[name] = pc.coalesce(items.column(name).combine_chunks().take(rows), ids)
    for name in (name for name in WINDOW_COLUMNS if name in items.column_names):
        columns[name] = items.column(name).combine_chunks().take(rows)
    with open_atomic(path, "wb") as file:
        pq.write_table(pa.table(columns), file)
    texts = (text for name in ("title", "text") for text in columns[name].to_pylist())
    return int(rows.null_count), compute_ids_hash(texts)
