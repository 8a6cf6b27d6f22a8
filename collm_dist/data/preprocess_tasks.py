"""The tasks of preprocessing. Each reads whole files, writes one, and leaves a marker that lets a rerun skip it.

    read_chunk      a raw file            -> its rows, parted by user bucket; counts
    filter_bucket   a bucket of all files -> rows that pass the filters; what the split rule must know
    build_bucket    that bucket           -> samples with the user's state, negatives; events parted by item
    count_items     an item part          -> the item's state before each row, parted by bucket
    join_bucket     a bucket              -> its table of interactions; its contexts, parted by shard
    (data.shard_writer packs a shard)

Only file names and counts travel between tasks, so memory is bounded by a chunk's batch, a bucket, or a shard.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collm_dist.artifacts import compute_file_hash, open_atomic
from collm_dist.config import DatasetConfig, PreprocessingConfig
from collm_dist.data.context_block import TARGET_FIELDS, ContextBlock, concatenate_blocks
from collm_dist.data.hashing import hash_integers
from collm_dist.data.interactions import COLUMNS
from collm_dist.data.negatives import EventPool, LikedItems, sample_negatives
from collm_dist.data.partition import (
    PartitionWriter,
    find_finished,
    finish_task,
    hash_text,
    read_partition,
    read_table,
    write_table,
)
from collm_dist.data.readers import Chunk, Source
from collm_dist.data.readers.files import Losses
from collm_dist.data.readers.normalize import SCHEMA
from collm_dist.data.samples import compute_user_state, count_before, gather_last
from collm_dist.data.shard_reader import decode_block
from collm_dist.data.shard_writer import encode_block, write_shard
from collm_dist.data.splits import OUTSIDE, SPLITS, SplitRule, get_amazon_book_window

POOL_SIZE = 1 << 18


@dataclass(frozen=True)
class Plan:
    """What all tasks share.

    Attributes:
        work, data_dir: folders of intermediate and of final files.
        dataset, preprocessing, seed, num_candidates: settings.
    """

    work: Path
    data_dir: Path
    dataset: DatasetConfig
    preprocessing: PreprocessingConfig
    seed: int
    num_candidates: int

    @property
    def num_buckets(self) -> int:
        """User buckets, which are also the item parts."""
        return self.preprocessing.num_user_buckets

    @property
    def draws_per_row(self) -> int:
        """Row ids set aside for the sampled negatives of one positive."""
        return max(self.dataset.negatives_per_positive, self.num_candidates - 1)


def read_chunk(plan: Plan, source: Source, index: int, chunk: Chunk) -> dict[str, Any]:
    """Part a raw file's rows by user bucket; count rows, losses, and rows of each user and item."""
    path = plan.work / f"chunk-{index:05d}.arrow"
    marker = path.with_suffix(".json")
    if (finished := find_finished(marker)) is not None:
        return finished
    losses, rows, outside, users, items = Losses(), 0, 0, [], []
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    with PartitionWriter(path, SCHEMA, plan.num_buckets) as writer:
        for batch in source.read_chunk(chunk):
            rows += batch.rows_read
            losses.merge(Losses(batch.bad, batch.bad_examples))
            table = batch.table
            if plan.dataset.split.method == "amazon_book":
                start, _, end = get_amazon_book_window()
                table = table.filter((pc.field("timestamp") >= start) & (pc.field("timestamp") < end))
                outside += batch.table.num_rows - table.num_rows
            if table.num_rows == 0:
                continue
            parts = hash_text(table.column("user_id").combine_chunks()) % np.uint64(plan.num_buckets)
            writer.write(table, parts.astype(np.int64))
            times = table.column("timestamp").to_numpy()
            first, last = min(first, int(times.min())), max(last, int(times.max()))
            users.append(table.column("user_id").value_counts())
            items.append(table.column("item_id").value_counts())
    write_table(plan.work / f"users-{index:05d}.arrow", _merge_counts(users))
    write_table(plan.work / f"items-{index:05d}.arrow", _merge_counts(items))
    return finish_task(marker, {"rows_read": rows, "outside": outside, "bad": losses.counts,
                                "examples": losses.examples, "first": int(first), "last": int(last)})  # fmt: skip


def _merge_counts(parts: list[Any]) -> Any:
    """Sum value counts into one table ``id, count``."""
    values = [pa.table({"id": part.field("values"), "count": part.field("counts")}) for part in parts]
    empty = pa.table({"id": pa.array([], pa.string()), "count": pa.array([], pa.int64())})
    return sum_counts(pa.concat_tables([empty, *values]))


def sum_counts(table: Any) -> Any:
    """Sum the counts of equal ids in a table ``id, count``."""
    summed = table.group_by("id").aggregate([("count", "sum")])
    return pa.table({"id": summed.column("id"), "count": summed.column("count_sum")})


def load_counts(paths: list[Path]) -> Any:
    """Return ``id, count`` summed over files."""
    return sum_counts(pa.concat_tables([read_table(path) for path in paths]))


def filter_bucket(
    plan: Plan, bucket: int, chunks: list[Path], bases: list[int], known_items: Any, window: SplitRule | None
) -> dict[str, Any]:
    """Apply filters and the duplicates rule to a bucket, and tell what the split rule and the id tables need.

    Args:
        plan, bucket: which one.
        chunks, bases: shuffle files and the row id of the first row of each.
        known_items: ids of the items that may stay (filters, item file), as an Arrow array.
        window: calendar windows; rows outside are dropped before anything is derived from them.
    """
    path = plan.work / f"filtered-{bucket:05d}.arrow"
    if (finished := find_finished(path.with_suffix(".json"))) is not None:
        return finished
    parts = []
    for chunk, base in zip(chunks, bases, strict=True):
        part = read_partition([chunk], bucket, plan.num_buckets)
        parts.append(part.set_column(0, "row", pc.add(part.column("row"), base)))
    table, dropped = pa.concat_tables(parts), Counter[str]()

    def keep(mask: Any, cause: str) -> None:
        nonlocal table
        kept = table.filter(mask)
        dropped[cause] += table.num_rows - kept.num_rows
        table = kept

    if window is not None:
        inside = window.assign(table.column("timestamp").to_numpy(), table.column("row").to_numpy()) != OUTSIDE
        keep(pa.array(inside), "outside the split windows")
    counts = load_counts([plan.work / f"users-{index:05d}.arrow" for index in range(len(chunks))])
    low, high = plan.dataset.min_user_interactions, plan.dataset.max_user_interactions
    if low or high:
        fits = (pc.field("count") >= low) & (pc.field("count") <= (high or np.iinfo(np.int64).max))
        keep(pc.is_in(table.column("user_id"), counts.filter(fits).column("id").combine_chunks()), "user filter")
    keep(pc.is_in(table.column("item_id"), known_items), "item filter or unknown item")
    if plan.dataset.duplicates != "keep":
        before = table.num_rows
        table = _drop_duplicates(table, collapse=plan.dataset.duplicates == "collapse")
        dropped["duplicates"] += before - table.num_rows
    write_table(path, table)
    times = table.column("timestamp").value_counts()
    write_table(
        path.with_suffix(".times.arrow"), pa.table({"id": times.field("values"), "count": times.field("counts")})
    )
    write_table(path.with_suffix(".items.arrow"), pa.table({"id": table.column("item_id").unique()}))
    write_table(path.with_suffix(".users.arrow"), pa.table({"id": table.column("user_id").unique().sort()}))
    return finish_task(path.with_suffix(".json"), {"rows": table.num_rows, "dropped": dropped})


def _drop_duplicates(table: Any, *, collapse: bool) -> Any:
    """Keep the earliest row of each user and item; collapsed, it is a like if any of them was."""
    frame = table.to_pandas().sort_values(["timestamp", "row"], kind="stable")
    pairs = frame.groupby(["user_id", "item_id"], sort=False)
    if collapse:
        frame["label"] = pairs["label"].transform("max").astype("int8")
    kept = frame.drop_duplicates(["user_id", "item_id"], keep="first").sort_values("row")
    return pa.Table.from_pandas(kept, schema=SCHEMA, preserve_index=False)


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
    plan: Plan, bucket: int, rule: SplitRule | None, users: Any, items: Any, pool: EventPool, num_rows: int
) -> dict[str, Any]:
    """Turn a bucket's rows into samples with the user's state, and part its events by item.

    Args:
        plan, bucket: which one.
        rule: where the splits meet; None = the ready column.
        users: table ``id, idx`` of the bucket's users.
        items: Arrow array of item ids in the order of their indices.
        pool: events to draw negatives from by popularity.
        num_rows: raw rows in all; sampled rows get ids from there on.
    """
    path = plan.work / f"events-{bucket:05d}.arrow"
    if (finished := find_finished(path.with_suffix(".json"))) is not None:
        return finished
    raw = read_table(plan.work / f"filtered-{bucket:05d}.arrow")
    positions = pc.index_in(raw.column("user_id"), users.column("id").combine_chunks())
    user_idx = users.column("idx").to_numpy()[positions.to_numpy()] if raw.num_rows else np.zeros(0, np.int64)
    rows = {
        "user_idx": user_idx.astype(np.int64),
        "item_idx": pc.index_in(raw.column("item_id"), items).to_numpy().astype(np.int64),
        "timestamp": raw.column("timestamp").to_numpy(),
        "row_id": raw.column("row").to_numpy(),
        "label": raw.column("label").to_numpy(),
        "sampled": np.zeros(raw.num_rows, np.int8),
    }
    if rule is None:
        rows["split"] = pc.index_in(raw.column("split"), pa.array(SPLITS)).to_numpy().astype(np.int8)
    else:
        rows["split"] = rule.assign(rows["timestamp"], rows["row_id"])
    rows = {name: values[rows["split"] != OUTSIDE] for name, values in rows.items()}
    rows["group_id"] = rows["row_id"]
    if plan.dataset.feedback == "implicit":
        rows = _add_negatives(plan, rows, len(items), pool, num_rows)
    order = np.lexsort((rows["row_id"], rows["timestamp"], rows["user_idx"]))
    rows = {name: values[order] for name, values in rows.items()}
    real_train = (rows["split"] == 0) & (rows["sampled"] == 0)
    rows["user_in_train"] = np.isin(rows["user_idx"], rows["user_idx"][real_train]).astype(np.int8)
    write_table(plan.work / f"samples-{bucket:05d}.arrow", pa.table(rows))
    events = pa.table(
        {**{name: rows[name] for name in EVENTS.names[:5]}, "in_train": real_train.astype(np.int8),
         "bucket": np.full(len(order), bucket)}, schema=EVENTS)  # fmt: skip
    with PartitionWriter(path, EVENTS, plan.num_buckets) as writer:
        writer.write(events, rows["item_idx"] % plan.num_buckets)
    real = rows["sampled"] == 0
    stats = {}
    for index, name in enumerate(SPLITS):
        inside = rows["split"] == index
        stats[name] = {"rows": int(inside.sum()), "real_rows": int((inside & real).sum())}
    return finish_task(path.with_suffix(".json"), {"splits": stats})


def _add_negatives(plan: Plan, rows: dict[str, Any], num_items: int, pool: EventPool, num_rows: int) -> dict[str, Any]:
    """Append sampled negatives: for training a few a positive, to choose and test a full candidate list."""
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
    extra = {name: values[owner] for name, values in rows.items()}
    extra["item_idx"] = drawn
    extra["label"], extra["sampled"] = np.zeros(len(owner), np.int8), np.ones(len(owner), np.int8)
    extra["group_id"] = rows["row_id"][owner]
    extra["row_id"] = num_rows + rows["row_id"][owner] * plan.draws_per_row + slot
    return {name: np.concatenate([values, extra[name]]) for name, values in rows.items()}


STATES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("item_likes", pa.int64()),
        ("item_rows", pa.int64()),
        ("item_in_train", pa.int8()),
    ]
)


def count_items(plan: Plan, part: int) -> dict[str, Any]:
    """Compute what was known of the item before each of a part's rows, and send it back to the rows' buckets."""
    path = plan.work / f"states-{part:05d}.arrow"
    if (finished := find_finished(path.with_suffix(".json"))) is not None:
        return finished
    sources = [plan.work / f"events-{bucket:05d}.arrow" for bucket in range(plan.num_buckets)]
    table = read_partition(sources, part, plan.num_buckets)
    columns = {name: table.column(name).to_numpy() for name in EVENTS.names}
    order = np.lexsort((columns["timestamp"], columns["item_idx"]))
    columns = {name: values[order] for name, values in columns.items()}
    real = 1 - columns["sampled"].astype(np.int64)
    groups = (columns["item_idx"],)
    states = pa.table(
        {
            "row_id": columns["row_id"],
            "item_likes": count_before(real * columns["label"], groups, columns["timestamp"]),
            "item_rows": count_before(real, groups, columns["timestamp"]),
            "item_in_train": np.isin(columns["item_idx"], columns["item_idx"][columns["in_train"] == 1]).astype(
                np.int8
            ),
        },
        schema=STATES,
    )
    with PartitionWriter(path, STATES, plan.num_buckets) as writer:
        writer.write(states, columns["bucket"])
    return finish_task(path.with_suffix(".json"), {})


def join_bucket(plan: Plan, bucket: int) -> dict[str, Any]:
    """Write a bucket's table of interactions, and its contexts parted by split and shard."""
    path = plan.work / f"contexts-{bucket:05d}.arrow"
    if (finished := find_finished(path.with_suffix(".json"))) is not None:
        return finished
    table = read_table(plan.work / f"samples-{bucket:05d}.arrow")
    rows = {name: table.column(name).to_numpy() for name in table.column_names}
    sources = [plan.work / f"states-{part:05d}.arrow" for part in range(plan.num_buckets)]
    states = read_partition(sources, bucket, plan.num_buckets)
    state_rows = states.column("row_id").to_numpy()
    match = np.argsort(state_rows)[np.argsort(np.argsort(rows["row_id"]))]
    for name in STATES.names[1:]:
        rows[name] = states.column(name).to_numpy()[match]
    user = compute_user_state(
        rows["user_idx"], rows["item_idx"], rows["timestamp"], rows["label"], rows["sampled"], plan.preprocessing.ties
    )
    rows.update(num_likes=user.num_likes, user_likes=user.user_likes, user_rows=user.user_rows)
    interactions = {**rows, "split": pa.array(SPLITS).take(pa.array(rows["split"]))}
    target = plan.data_dir / "interactions" / f"bucket-{bucket:05d}.parquet"
    with open_atomic(target, "wb") as file:
        pq.write_table(pa.table({name: interactions[name] for name in COLUMNS.names}, schema=COLUMNS), file)
    blocks = pa.array(_deal_contexts(plan, rows, user), pa.large_binary())
    write_table(path, pa.table({"block": blocks}))
    return finish_task(path.with_suffix(".json"), {"rows": len(table), "sha256": compute_file_hash(target)})


def _deal_contexts(plan: Plan, rows: dict[str, Any], user: Any) -> list[bytes | None]:
    """Return the encoded contexts of each split and shard, in that order; None where there are none."""
    num_shards = plan.preprocessing.num_shards
    order = np.lexsort((rows["row_id"], rows["num_likes"], rows["user_idx"], rows["split"]))
    key = [rows[name][order] for name in ("split", "user_idx", "num_likes")]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = np.any([part[1:] != part[:-1] for part in key], axis=0) if len(order) > 1 else True
    starts = order[fresh]
    limits = plan.preprocessing
    history_offsets, history = gather_last(
        user.liked_items, user.history_ends[starts], user.num_likes[starts], limits.max_history_length
    )
    dislike_offsets, dislikes = gather_last(
        user.disliked_items, user.dislike_ends[order], user.dislike_counts[order], limits.max_dislikes
    )
    block = ContextBlock(
        user_idx=rows["user_idx"][starts],
        num_likes=rows["num_likes"][starts],
        history_offsets=history_offsets,
        history_items=history,
        target_offsets=np.append(np.flatnonzero(fresh), len(order)),
        dislike_offsets=dislike_offsets,
        dislike_items=dislikes,
        **{name: rows[name][order].astype(np.int64) for name in TARGET_FIELDS},
    )
    shard = (hash_integers(0, block.user_idx, block.num_likes) % np.uint64(num_shards)).astype(np.int64)
    place = rows["split"][starts].astype(np.int64) * num_shards + shard
    found = [np.flatnonzero(place == index) for index in range(len(SPLITS) * num_shards)]
    return [encode_block(block.take_contexts(chosen)) if len(chosen) else None for chosen in found]


def write_split_shard(plan: Plan, split: int, shard: int) -> dict[str, Any]:
    """Pack one shard from all buckets; its statistics are empty if it holds nothing."""
    name = f"{SPLITS[split]}-{shard:05d}.tar"
    marker = plan.work / f"{name}.json"
    if (finished := find_finished(marker)) is not None:
        return finished
    blocks = []
    for bucket in range(plan.num_buckets):
        with pa.memory_map(str(plan.work / f"contexts-{bucket:05d}.arrow")) as file:
            cell = pa.ipc.open_file(file).read_all().column("block")[split * plan.preprocessing.num_shards + shard]
            if cell.is_valid:
                blocks.append(decode_block(cell.as_py()))
    if not blocks:
        return finish_task(marker, {})
    block = concatenate_blocks(blocks)
    block = block.take_contexts(np.lexsort((block.num_likes, block.user_idx)))
    info = asdict(write_shard(plan.data_dir, name, SPLITS[split], block, plan.preprocessing.contexts_per_record))
    times = block.timestamp
    return finish_task(marker, {"info": info, "first": int(times.min()), "last": int(times.max())})
