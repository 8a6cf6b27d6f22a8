"""First tasks of preprocessing: read raw rows, partition them by user, filter them.

    read_chunk      a raw file            -> its rows, partitioned by user bucket; counts
    filter_bucket   a bucket of all files -> rows that pass the filters; times and ids for the driver

A task is skipped if its outputs exist. Tasks exchange only file names and counts, so memory is bounded by one batch of
a file, or by one bucket.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.data.ingest.file_chunks import FileChunk
from collm_dist.data.ingest.file_readers import BadRows
from collm_dist.data.ingest.id_forms import check_forms, drop_fractions, unify_table
from collm_dist.data.ingest.input_facts import InputFacts, describe_row
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
from collm_dist.data.ingest.source import Source
from collm_dist.data.preprocess_plan import PreprocessPlan
from collm_dist.data.samples.splits import OUTSIDE, SplitRule, get_amazon_book_window


def read_chunk(plan: PreprocessPlan, source: Source, index: int, chunk: FileChunk, forgotten: Any) -> dict[str, Any]:
    """Partition a chunk's rows by user bucket; count rows, bad rows, and rows of each item; note facts of the rows.

    Args:
        plan: settings and folders.
        source: the raw log.
        index, chunk: the chunk and its number.
        forgotten: ids of users whose rows are dropped, as an Arrow array.
    """
    path, items_path = plan.work_file("chunk", index), plan.work_file("items", index)
    marker = path.with_suffix(".json")
    if (finished := find_finished(marker, path, items_path)) is not None:
        return finished
    bad_rows, item_counts, rows_read, facts = BadRows(), [], 0, InputFacts()
    counts, notes, forgotten_users = Counter[str](), Counter[str](), pa.array([], pa.int32())
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    with PartitionWriter(path, SCHEMA, plan.num_buckets) as writer:
        for batch in source.read_chunk(chunk):
            rows_read += batch.rows_read
            bad_rows.merge(BadRows(batch.bad, batch.bad_examples, batch.first_bad))
            notes.update(batch.notes)
            table = batch.table
            if plan.dataset.split.method == "amazon_book":
                start, _, end = get_amazon_book_window()
                table = table.filter((pc.field("timestamp") >= start) & (pc.field("timestamp") < end))
                counts["outside"] += batch.table.num_rows - table.num_rows
            if len(forgotten):
                matches = pc.index_in(drop_fractions(table.column("user_id")), forgotten)
                counts["forgotten"] += table.num_rows - matches.null_count
                forgotten_users = pa.concat_arrays([forgotten_users, matches.drop_null().combine_chunks()]).unique()
                table = table.filter(matches.is_null())
            if table.num_rows == 0:
                continue
            counts["usable"] += table.num_rows
            facts.add(table, batch.ratings, has_times=source.columns.timestamp is not None)
            # 17 and 17.0 come to one bucket; whether they are one user is known only after all rows have been read.
            parts = hash_text(drop_fractions(table.column("user_id")).combine_chunks()) % np.uint64(plan.num_buckets)
            writer.write(table, parts.astype(np.int64))
            times = table.column("timestamp").to_numpy()
            first, last = min(first, int(times.min())), max(last, int(times.max()))
            item_counts.append(count_items_by_month(table))
    write_table(items_path, sum_item_counts(item_counts))
    return finish_task(marker, {"uri": chunk.uri, "rows_read": rows_read, "usable": counts["usable"],
                                "outside": counts["outside"],
                                "forgotten": counts["forgotten"], "forgotten_users": forgotten_users.to_pylist(),
                                "bad": bad_rows.counts, "examples": bad_rows.examples, "notes": notes,
                                "first_bad": bad_rows.first, "facts": asdict(facts),
                                "first": int(first), "last": int(last)})  # fmt: skip


def filter_bucket(
    plan: PreprocessPlan,
    bucket: int,
    chunks: list[Path],
    uris: list[str],
    first_rows: list[int],
    whole: frozenset[str],
    known_items: Any,
    kept_items: Any,
    window: SplitRule | None,
) -> dict[str, Any]:
    """Apply split windows, filters and the duplicates rule to a bucket; write its rows, distinct ids and times.

    Raises DataError if a file has a user in two forms.

    Args:
        plan: settings and folders.
        bucket: number of the user bucket.
        chunks, uris, first_rows: shuffle files, and of each the file that it is from and the id of its first row.
        whole: columns in whose ids 17.0 is 17.
        known_items: ids in the item file as an Arrow array, or None without an item file.
        kept_items: ids of the items that pass the filter.
        window: calendar windows; rows outside are dropped before anything is computed from them.
    """
    path = plan.work_file("filtered", bucket)
    marker = path.with_suffix(".json")
    outputs = {name: plan.work_file("filtered", bucket, name) for name in ("times", "items", "users")}
    if (finished := find_finished(marker, path, *outputs.values())) is not None:
        return finished
    parts = []
    for chunk, first_row in zip(chunks, first_rows, strict=True):
        part = read_partition([chunk], bucket, plan.num_buckets)
        parts.append(part.set_column(0, "row", pc.add(part.column("row"), first_row)))
    if plan.dataset.columns.timestamp is None:  # the order of the rows is all that is known
        parts = [part.set_column(3, "timestamp", part.column("row")) for part in parts]
    if "user_id" in whole:
        check_forms(uris, [part.column("user_id") for part in parts], "user_id")
    table, dropped, examples = unify_table(pa.concat_tables(parts), whole), Counter[str](), dict[str, str]()
    num_events = pc.value_counts(table.column("user_id")).field("counts")
    users = {"users": len(num_events), "single": pc.sum(pc.equal(num_events, 1)).as_py() or 0}

    def keep(mask: Any, cause: str) -> None:
        nonlocal table
        kept = table.filter(mask)
        dropped[cause] += table.num_rows - kept.num_rows
        if kept.num_rows < table.num_rows:
            first = table.slice(pc.index(pc.fill_null(mask, False), False).as_py(), 1)
            examples[cause] = describe_row(first.to_pylist()[0], has_time=plan.dataset.columns.timestamp is not None)
        table = kept

    if window is not None:
        inside = window.assign(table.column("timestamp").to_numpy(), table.column("row").to_numpy()) != OUTSIDE
        keep(pa.array(inside), "outside the split windows")
    if known_items is not None:
        keep(pc.is_in(table.column("item_id"), known_items), "unknown item")
    by_user = table.column("user_id").value_counts()
    counts = pa.table({"id": by_user.field("values"), "count": by_user.field("counts")})
    kept_users = select_ids(counts, plan.dataset.min_user_interactions, plan.dataset.max_user_interactions)
    # One pass: both filters count the same rows, including those that the other filter drops.
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
    return finish_task(marker, {"rows": table.num_rows, "dropped": dropped, "examples": examples, **users})
