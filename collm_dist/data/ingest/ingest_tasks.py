"""The first tasks of preprocessing: raw rows, parted by user and cleaned. Each is skipped where its outputs exist.

    read_chunk      a raw file            -> its rows, parted by user bucket; counts
    filter_bucket   a bucket of all files -> rows that pass the filters; what the split rule must know

Only file names and counts travel between tasks, so memory is bounded by a batch of a file, or by a bucket.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.data.ingest.file_readers import BadRows
from collm_dist.data.ingest.interaction_filters import (
    count_items_by_month,
    drop_duplicates,
    select_ids,
    sum_item_counts,
)
from collm_dist.data.ingest.normalize import SCHEMA
from collm_dist.data.ingest.shuffle_files import (
    PartitionWriter,
    find_finished,
    finish_task,
    hash_text,
    read_partition,
    write_table,
)
from collm_dist.data.ingest.source import FileChunk, Source
from collm_dist.data.preprocess_plan import PreprocessPlan
from collm_dist.data.samples.splits import OUTSIDE, SplitRule, get_amazon_book_window


def read_chunk(plan: PreprocessPlan, source: Source, index: int, chunk: FileChunk, forgotten: Any) -> dict[str, Any]:
    """Part a raw file's rows by user bucket; count rows, losses, and rows of each item.

    Args:
        plan, source, index, chunk: which one.
        forgotten: users whose rows are passed over, as an Arrow array.
    """
    path, items_path = plan.work_file("chunk", index), plan.work_file("items", index)
    marker = path.with_suffix(".json")
    if (finished := find_finished(marker, path, items_path)) is not None:
        return finished
    losses, items, rows_read = BadRows(), [], 0
    counts, met = Counter[str](), pa.array([], pa.int32())
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    with PartitionWriter(path, SCHEMA, plan.num_buckets) as writer:
        for batch in source.read_chunk(chunk):
            rows_read += batch.rows_read
            losses.merge(BadRows(batch.bad, batch.bad_examples))
            table = batch.table
            if plan.dataset.split.method == "amazon_book":
                start, _, end = get_amazon_book_window()
                table = table.filter((pc.field("timestamp") >= start) & (pc.field("timestamp") < end))
                counts["outside"] += batch.table.num_rows - table.num_rows
            if len(forgotten):
                places = pc.index_in(table.column("user_id"), forgotten)
                counts["forgotten"] += table.num_rows - places.null_count
                met = pa.concat_arrays([met, places.drop_null().combine_chunks()]).unique()
                table = table.filter(places.is_null())
            if table.num_rows == 0:
                continue
            counts["usable"] += table.num_rows
            parts = hash_text(table.column("user_id").combine_chunks()) % np.uint64(plan.num_buckets)
            writer.write(table, parts.astype(np.int64))
            times = table.column("timestamp").to_numpy()
            first, last = min(first, int(times.min())), max(last, int(times.max()))
            items.append(count_items_by_month(table))
    write_table(items_path, sum_item_counts(items))
    return finish_task(marker, {"rows_read": rows_read, "usable": counts["usable"], "outside": counts["outside"],
                                "forgotten": counts["forgotten"], "forgotten_users": met.to_pylist(),
                                "bad": losses.counts, "examples": losses.examples,
                                "first": int(first), "last": int(last)})  # fmt: skip


def filter_bucket(
    plan: PreprocessPlan,
    bucket: int,
    chunks: list[Path],
    bases: list[int],
    known_items: Any,
    kept_items: Any,
    window: SplitRule | None,
) -> dict[str, Any]:
    """Apply windows, filters and the duplicates rule to a bucket, and tell what split rule and id tables need.

    Args:
        plan, bucket: which one.
        chunks, bases: shuffle files and the row id of the first row of each.
        known_items: ids in the item file, as an Arrow array; None without one.
        kept_items: ids of the items that pass the filter.
        window: calendar windows; rows outside are dropped before anything is derived from them.
    """
    path = plan.work_file("filtered", bucket)
    marker = path.with_suffix(".json")
    outputs = {name: plan.work_file("filtered", bucket, name) for name in ("times", "items", "users")}
    if (finished := find_finished(marker, path, *outputs.values())) is not None:
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
    if known_items is not None:
        keep(pc.is_in(table.column("item_id"), known_items), "unknown item")
    users = table.column("user_id").value_counts()
    counts = pa.table({"id": users.field("values"), "count": users.field("counts")})
    kept_users = select_ids(counts, plan.dataset.min_user_interactions, plan.dataset.max_user_interactions)
    # Both filters look at the same rows: one pass, in which neither sees what the other has dropped.
    keep(pc.is_in(table.column("user_id"), kept_users), "user filter")
    keep(pc.is_in(table.column("item_id"), kept_items), "item filter")
    if plan.dataset.duplicates != "keep":
        before = table.num_rows
        table = drop_duplicates(table, collapse=plan.dataset.duplicates == "collapse")
        dropped["duplicates"] += before - table.num_rows
    write_table(path, table)
    times = table.column("timestamp").value_counts()
    write_table(outputs["times"], pa.table({"time": times.field("values"), "count": times.field("counts")}))
    write_table(outputs["items"], pa.table({"id": table.column("item_id").unique()}))
    write_table(outputs["users"], pa.table({"id": table.column("user_id").unique().sort()}))
    return finish_task(marker, {"rows": table.num_rows, "dropped": dropped})
