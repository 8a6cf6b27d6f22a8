"""Later tasks of preprocessing: build samples, count item events, join, pack shards.

    build_bucket       a bucket       -> samples, negatives; events partitioned by item
    count_items        an item part   -> the item's state before each row, partitioned by bucket
    join_bucket        a bucket       -> its table of interactions; its contexts, partitioned by shard
    write_split_shard  all buckets    -> one shard

A task is skipped if its outputs exist. Memory is bounded by a bucket, an item part, or a shard.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collm_dist.data.ingest.shuffle_files import (
    PartitionWriter,
    find_finished,
    finish_task,
    read_partition,
    read_table,
    write_table,
)
from collm_dist.data.preprocess_plan import PreprocessPlan
from collm_dist.data.samples.event_pool import EventPool
from collm_dist.data.samples.negatives import LikedItems, sample_negatives
from collm_dist.data.samples.splits import OUTSIDE, SPLITS, SplitRule
from collm_dist.data.samples.user_samples import (
    UserState,
    compute_user_state,
    count_before,
    find_group_starts,
    gather_last,
)
from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock, IntArray
from collm_dist.data.shards.context_table import from_table, to_table
from collm_dist.data.shards.interactions import COLUMNS
from collm_dist.data.shards.shard_writer import write_shard
from collm_dist.random_keys import hash_integers
from collm_dist.runs.atomic_files import compute_file_hash, open_atomic

EVENTS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("item_idx", pa.int64()),
        ("timestamp", pa.int64()),
        ("label", pa.int8()),
        ("sampled", pa.int8()),
        ("in_train", pa.int8()),
        ("bucket", pa.int64()),
    ]
)


def build_bucket(
    plan: PreprocessPlan,
    bucket: int,
    rule: SplitRule | None,
    users: Any,
    items: Any,
    pool: EventPool,
    num_rows: int,
    parts: int,
) -> dict[str, Any]:
    """Build a bucket's samples, draw negatives, and partition the events by item.

    Args:
        plan: settings and folders.
        bucket: number of the user bucket.
        rule: the split rule, or None if a column names the split.
        users: table ``id, idx`` of the bucket's users.
        items: Arrow array of item ids in the order of their indices.
        pool: events to draw negatives from by popularity.
        num_rows: total number of raw rows; ids of sampled rows start there.
        parts: number of item parts.
    """
    path, samples_path = plan.work_file("events", bucket), plan.work_file("samples", bucket)
    marker = path.with_suffix(".json")
    if (finished := find_finished(marker, path, samples_path)) is not None:
        return finished
    rows = _index_rows(read_table(plan.work_file("filtered", bucket)), rule, users, items)
    if plan.dataset.feedback == "implicit":
        rows = _add_negatives(plan, rows, len(items), pool, num_rows)
    order = np.lexsort((rows["row_id"], rows["timestamp"], rows["user_idx"]))
    rows = {name: values[order] for name, values in rows.items()}
    real = rows["sampled"] == 0
    real_train = (rows["split"] == 0) & real
    rows["user_in_train"] = np.isin(rows["user_idx"], rows["user_idx"][real_train]).astype(np.int8)
    write_table(samples_path, pa.table(rows))
    columns = {name: rows[name] for name in EVENTS.names[:5]}
    columns |= {"in_train": real_train.astype(np.int8), "bucket": np.full(len(order), bucket)}
    with PartitionWriter(path, EVENTS, parts) as writer:
        writer.write(pa.table(columns, schema=EVENTS), rows["item_idx"] % parts)
    inside = {name: rows["split"] == index for index, name in enumerate(SPLITS)}
    stats = {name: {"rows": int(mask.sum()), "real_rows": int((mask & real).sum())} for name, mask in inside.items()}
    return finish_task(marker, {"splits": stats})


def _index_rows(raw: Any, rule: SplitRule | None, users: Any, items: Any) -> dict[str, Any]:
    """Return the rows inside a split as arrays, with dense indices instead of ids."""

    def to_indices(ids: Any, table: Any) -> Any:
        return pc.index_in(ids, table).to_numpy().astype(np.int64)

    positions = to_indices(raw.column("user_id"), users.column("id").combine_chunks())
    rows = {
        "user_idx": users.column("idx").to_numpy()[positions].astype(np.int64),
        "item_idx": to_indices(raw.column("item_id"), items),
        "timestamp": raw.column("timestamp").to_numpy(),
        "row_id": raw.column("row").to_numpy(),
        "group_id": raw.column("row").to_numpy(),
        "label": raw.column("label").to_numpy(),
        "sampled": np.zeros(raw.num_rows, np.int8),
    }
    if rule is None:
        rows["split"] = to_indices(raw.column("split"), pa.array(SPLITS)).astype(np.int8)
    else:
        rows["split"] = rule.assign(rows["timestamp"], rows["row_id"])
    return {name: values[rows["split"] != OUTSIDE] for name, values in rows.items()}


def _add_negatives(
    plan: PreprocessPlan, rows: dict[str, Any], num_items: int, pool: EventPool, num_rows: int
) -> dict[str, Any]:
    """Append sampled negatives: a few per positive for training, a full candidate list for validation and test."""
    train = rows["split"] == 0
    counts = np.where(train, plan.dataset.negatives_per_positive, plan.num_candidates - 1)
    owner, drawn, slot = sample_negatives(
        user_idx=rows["user_idx"],
        timestamps=rows["timestamp"],
        row_ids=rows["row_id"],
        counts=counts,
        liked=LikedItems(rows["user_idx"], rows["item_idx"], rows["timestamp"], num_items),
        num_items=num_items,
        seed=plan.seed,
        method=plan.dataset.negative_sampling,
        pool=pool,
    )
    negatives = {name: values[owner] for name, values in rows.items()}
    negatives["item_idx"] = drawn
    negatives["label"], negatives["sampled"] = np.zeros(len(owner), np.int8), np.ones(len(owner), np.int8)
    negatives["group_id"] = rows["row_id"][owner]
    negatives["row_id"] = num_rows + rows["row_id"][owner] * plan.max_negatives_per_row + slot
    return {name: np.concatenate([values, negatives[name]]) for name, values in rows.items()}


STATES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("item_likes", pa.int64()),
        ("item_rows", pa.int64()),
        ("item_in_train", pa.int8()),
    ]
)


def count_items(plan: PreprocessPlan, part: int, parts: int) -> dict[str, Any]:
    """Count the item's likes and rows before each row of an item part, partitioned by the rows' buckets."""
    path = plan.work_file("states", part)
    if (finished := find_finished(path.with_suffix(".json"), path)) is not None:
        return finished
    sources = [plan.work_file("events", bucket) for bucket in range(plan.num_buckets)]
    table = read_partition(sources, part, parts)
    columns = {name: table.column(name).to_numpy() for name in EVENTS.names}
    order = np.lexsort((columns["timestamp"], columns["item_idx"]))
    columns = {name: values[order] for name, values in columns.items()}
    real = 1 - columns["sampled"].astype(np.int64)
    groups = (columns["item_idx"],)
    items, in_train = columns["item_idx"], columns["in_train"] == 1
    states = pa.table(
        {
            "row_id": columns["row_id"],
            "item_likes": count_before(real * columns["label"], groups, columns["timestamp"]),
            "item_rows": count_before(real, groups, columns["timestamp"]),
            "item_in_train": np.isin(items, items[in_train]).astype(np.int8),
        },
        schema=STATES,
    )
    with PartitionWriter(path, STATES, plan.num_buckets) as writer:
        writer.write(states, columns["bucket"])
    return finish_task(path.with_suffix(".json"), {})


def join_bucket(plan: PreprocessPlan, bucket: int, parts: int) -> dict[str, Any]:
    """Write a bucket's table of interactions, and its contexts partitioned by split and shard."""
    path = plan.work_file("contexts", bucket)
    target = plan.data_dir / "interactions" / f"bucket-{bucket:05d}.parquet"
    if (finished := find_finished(path.with_suffix(".json"), path, target)) is not None:
        return finished
    table = read_table(plan.work_file("samples", bucket))
    rows = {name: table.column(name).to_numpy() for name in table.column_names}
    sources = [plan.work_file("states", part) for part in range(parts)]
    states = read_partition(sources, bucket, plan.num_buckets)
    match = np.empty(len(table), np.int64)
    # Both tables have the same row ids, so the n-th smallest ids match.
    match[np.argsort(rows["row_id"])] = np.argsort(states.column("row_id").to_numpy())
    rows |= {name: states.column(name).to_numpy()[match] for name in STATES.names[1:]}
    user = compute_user_state(
        user_idx=rows["user_idx"],
        item_idx=rows["item_idx"],
        timestamps=rows["timestamp"],
        labels=rows["label"],
        sampled=rows["sampled"],
        row_ids=rows["row_id"],
        group_ids=rows["group_id"],
        ties=plan.preprocessing.ties,
    )
    rows |= {"num_likes": user.num_likes, "user_likes": user.user_likes, "user_rows": user.user_rows}
    interactions = {**rows, "split": pa.array(SPLITS).take(pa.array(rows["split"]))}
    with open_atomic(target, "wb") as file:
        pq.write_table(pa.table({name: interactions[name] for name in COLUMNS.names}, schema=COLUMNS), file)
    contexts, shards = _assign_shards(plan, rows, user)
    with PartitionWriter(path, contexts.schema, len(SPLITS) * plan.num_shards) as writer:
        writer.write(contexts, shards)
    return finish_task(path.with_suffix(".json"), {"rows": len(table), "sha256": compute_file_hash(target)})


def _assign_shards(plan: PreprocessPlan, rows: dict[str, Any], user: UserState) -> tuple[Any, IntArray]:
    """Return a bucket's contexts as a table ordered by split, shard, user and likes, and the part of each."""
    num_shards = plan.num_shards
    shards = hash_integers(0, rows["user_idx"], user.num_likes) % np.uint64(num_shards)
    parts = rows["split"].astype(np.int64) * num_shards + shards.astype(np.int64)
    # A user has fewer likes than rows, so this sum orders contexts by user and likes with a single key.
    numbers = find_group_starts(rows["user_idx"]) + user.num_likes
    keys = parts * len(numbers) + numbers
    order = np.lexsort((rows["row_id"], keys))
    firsts = np.flatnonzero(find_group_starts(keys[order]) == np.arange(len(order)))
    starts = order[firsts]
    limits = plan.preprocessing
    history_offsets, history = gather_last(
        user.liked_items, user.history_ends[starts], user.num_likes[starts], limits.max_history_length
    )
    dislike_offsets, dislikes = gather_last(
        user.disliked_items, user.dislike_ends[order], user.dislike_counts[order], limits.max_dislikes
    )
    likes_since = None
    if plan.stores_order:
        _, before = gather_last(
            user.disliked_likes, user.dislike_ends[order], user.dislike_counts[order], limits.max_dislikes
        )
        likes_since = np.repeat(user.num_likes[order], np.diff(dislike_offsets)) - before
    block = ContextBlock(
        user_idx=rows["user_idx"][starts],
        num_likes=user.num_likes[starts],
        history_offsets=history_offsets,
        history_items=history,
        target_offsets=np.append(firsts, len(order)),
        dislike_offsets=dislike_offsets,
        dislike_items=dislikes,
        likes_since=likes_since,
        **{name: rows[name][order] for name in TARGET_FIELDS},
    )
    return to_table(block), parts[starts]


def write_split_shard(plan: PreprocessPlan, split: int, shard: int) -> dict[str, Any]:
    """Pack one shard from all buckets and return its statistics, which are empty if it has no contexts."""
    name = f"{SPLITS[split]}-{shard:05d}.tar"
    marker = plan.work_dir / f"{name}.json"
    finished = find_finished(marker)
    if finished is not None and (not finished or (plan.data_dir / finished["info"]["path"]).exists()):
        return finished
    sources = [plan.work_file("contexts", bucket) for bucket in range(plan.num_buckets)]
    num_shards = plan.num_shards
    block = from_table(read_partition(sources, split * num_shards + shard, len(SPLITS) * num_shards))
    if block.num_contexts == 0:
        return finish_task(marker, {})
    order = np.lexsort((block.num_likes, block.user_idx))
    if np.any(order[1:] < order[:-1]):  # only if the run extends another one
        block = block.take_contexts(order)
    info = asdict(write_shard(plan.data_dir, name, SPLITS[split], block, plan.preprocessing.contexts_per_record))
    times = block.timestamp
    return finish_task(marker, {"info": info, "first": int(times.min()), "last": int(times.max())})
