"""User shards: the users and rows that each worker owns, in whole buckets, so a worker reads only its own files.

A worker numbers its U users 0..U-1 in the order of their dense indices; no other worker holds data of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from collm_dist.cf.batches import Rows, build_rows
from collm_dist.data.shards.interactions import read_bucket
from collm_dist.data.shards.manifest import BucketInfo, Manifest
from collm_dist.distributed import gather_counts, gather_objects

SPLITS = ("train", "valid", "test")
_TYPES: dict[str, type[np.generic]] = {
    "user_idx": np.int32,
    "item_idx": np.int32,
    "label": np.int8,
    "split": np.int8,
    "sampled": np.int8,
    "num_likes": np.int32,
    "timestamp": np.int64,
}
# Read in addition with cf.feedback "all".
_COUNTS = ("user_likes", "user_rows", "item_likes", "item_rows")


@dataclass(frozen=True)
class UserRanges:
    """Slices of dense user indices, ascending.

    Attributes:
        slices: (first user, number of users) of each slice.
    """

    slices: tuple[tuple[int, int], ...]

    @classmethod
    def from_buckets(cls, buckets: Sequence[BucketInfo]) -> UserRanges:
        """Return the users of buckets; adjacent slices are merged."""
        joined: list[tuple[int, int]] = []
        for first, count in sorted(users for bucket in buckets for users in bucket.user_ranges):
            if joined and sum(joined[-1]) == first:
                first, count = joined[-1][0], joined.pop()[1] + count
            joined.append((first, count))
        return cls(tuple(joined))

    @property
    def num_users(self) -> int:
        """Number of users: U."""
        return sum(count for _, count in self.slices)

    def to_local(self, user_idx: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the local indices of owned users, given their dense ones."""
        firsts = np.array([first for first, _ in self.slices], dtype=np.int64)
        offsets = np.cumsum([0, *(count for _, count in self.slices)])[:-1]
        place = np.searchsorted(firsts, user_idx, side="right") - 1
        local: NDArray[np.int64] = offsets[place] + user_idx - firsts[place]
        return local

    def to_dense(self) -> torch.Tensor:
        """Return the (U,) dense index of each owned user."""
        parts = [torch.arange(first, first + count) for first, count in self.slices]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


def assign_buckets(buckets: Sequence[BucketInfo], rank: int, world_size: int) -> tuple[BucketInfo, ...]:
    """Return a worker's buckets: a contiguous run with about an even share of the rows."""
    middles = np.cumsum([bucket.rows for bucket in buckets]) - np.array([bucket.rows for bucket in buckets]) / 2
    owners = middles * world_size // max(sum(bucket.rows for bucket in buckets), 1)
    return tuple(bucket for bucket, owner in zip(buckets, owners, strict=True) if owner == rank)


@dataclass(frozen=True)
class WorkerData:
    """Data of a worker.

    Attributes:
        users: users that the worker owns.
        splits: rows of each split.
    """

    users: UserRanges
    splits: dict[str, Rows]


def load_worker_data(
    data_dir: Path,
    manifest: Manifest,
    rank: int = 0,
    world_size: int = 1,
    splits: Sequence[str] = SPLITS,
    *,
    with_counts: bool = False,
) -> WorkerData:
    """Load the interactions of the users that a worker owns.

    Args:
        data_dir: of the data step.
        manifest: of the data step.
        rank, world_size: of the worker.
        splits: splits to load. Likes of other splits stay in the histories of later rows.
        with_counts: also load the as-of counts of user and item.
    """
    buckets = assign_buckets(manifest.buckets, rank, world_size)
    users = UserRanges.from_buckets(buckets)
    types = _TYPES | dict.fromkeys(_COUNTS if with_counts else (), np.int32)
    parts = [_read_bucket(data_dir, bucket, users, types) for bucket in buckets]
    columns = {
        # Popped from the parts column by column, so that memory never holds all columns twice.
        name: np.concatenate([np.zeros(0, kind), *(part.pop(name) for part in parts)])
        for name, kind in types.items()
    }
    order = np.argsort(columns["user_idx"], kind="stable")  # in an extended run, early buckets hold later users
    if (order[1:] < order[:-1]).any():
        columns = {name: values[order] for name, values in columns.items()}
    is_like = (columns["label"] == 1) & (columns["sampled"] == 0)
    counts = np.bincount(columns["user_idx"][is_like], minlength=users.num_users)
    likes = (np.concatenate([[0], np.cumsum(counts)]), columns["item_idx"][is_like])
    rows = {}
    for split in splits:
        is_chosen = columns["split"] == SPLITS.index(split)
        names = ("user_idx", "item_idx", "label", "num_likes", "timestamp")
        as_of_counts = np.stack([columns[name][is_chosen] for name in _COUNTS], axis=1) if with_counts else None
        rows[split] = build_rows(**{name: columns[name][is_chosen] for name in names}, likes=likes, counts=as_of_counts)
    return WorkerData(users, rows)


def _read_bucket(
    data_dir: Path, bucket: BucketInfo, users: UserRanges, types: dict[str, type[np.generic]]
) -> dict[str, NDArray[Any]]:
    """Return a bucket's columns in narrow types, sorted by user, time and row, with local users and numbered splits."""
    table = read_bucket(data_dir, bucket, [*types, "row_id"])
    split = table.column("split")
    numbers = sum(number * pc.equal(split, name).to_numpy().astype(np.int8) for number, name in enumerate(SPLITS))
    columns = {name: table.column(name).to_numpy() for name in (*types, "row_id") if name != "split"}
    columns |= {"split": numbers, "user_idx": users.to_local(columns["user_idx"])}
    order = np.lexsort([columns["row_id"], columns["timestamp"], columns["user_idx"]])
    return {name: columns[name][order].astype(kind) for name, kind in types.items()}


def number_globally(rows: Rows, users: UserRanges) -> Rows:
    """Return a worker's rows with contexts numbered over all workers. All workers call this together."""
    workers = gather_objects(count_contexts(rows, users))
    total_rows = sum(gather_counts(len(rows.label), rows.label.device))
    return replace(number_contexts(rows, users, workers), total_rows=total_rows)


def count_contexts(rows: Rows, users: UserRanges) -> list[tuple[int, int]]:
    """Return (first dense user, number of contexts) of each slice of a worker's users."""
    ends = np.searchsorted(rows.user_idx.cpu().numpy(), np.cumsum([count for _, count in users.slices]))
    counts = np.diff(ends, prepend=0).tolist()
    return [(first, count) for (first, _), count in zip(users.slices, counts, strict=True)]


def number_contexts(rows: Rows, users: UserRanges, workers: Sequence[Sequence[tuple[int, int]]]) -> Rows:
    """Return a worker's rows with contexts numbered by the dense users of all workers, given their counts."""
    numbers, total = {}, 0
    for counted in sorted(counted for worker in workers for counted in worker):
        numbers[counted] = total
        total += counted[1]
    slices, first = [], 0
    for counted in count_contexts(rows, users):
        slices.append((first, numbers[counted]))
        first += counted[1]
    return replace(rows, slices=tuple(slices), total_contexts=total)
