"""Results of reading and filtering, as the driver reads them: counts of items, rows of the user buckets."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from collm_dist.data.ingest.id_forms import check_forms, unify_table
from collm_dist.data.ingest.interaction_filters import sum_item_counts
from collm_dist.data.ingest.shuffle_files import read_table
from collm_dist.data.preprocess_plan import PreprocessPlan
from collm_dist.data.shards.context_block import IntArray

SECONDS_PER_DAY = 86_400


def load_item_counts(plan: PreprocessPlan, uris: Sequence[str], whole: Collection[str]) -> Any:
    """Return the table ``id, month, count`` of all files, before the filters.

    Args:
        plan: settings and folders.
        uris: the file that each task of ``read_chunk`` has read.
        whole: columns in whose ids 17.0 is 17.

    Raises:
        DataError: a file has an item in two forms.
    """
    tables = [read_table(plan.work_file("items", index)) for index in range(len(uris))]
    if "item_id" in whole:
        check_forms(uris, [table.column("id") for table in tables], "item_id")
        tables = [unify_table(table, ["id"]) for table in tables]
    return sum_item_counts(tables)


def load_filtered_rows(plan: PreprocessPlan, bucket: int, columns: Sequence[str]) -> Any:
    """Return columns of a bucket's filtered rows as an Arrow table."""
    return read_table(plan.work_file("filtered", bucket)).select(columns)


def load_filtered_ids(plan: PreprocessPlan, bucket: int, kind: Literal["users", "items"]) -> Any:
    """Return the distinct user or item ids of a bucket's filtered rows as an Arrow array."""
    return read_table(plan.work_file("filtered", bucket, kind)).column("id").combine_chunks()


def count_rows_by_time(plan: PreprocessPlan, exact_days: Sequence[int] = ()) -> tuple[IntArray, IntArray]:
    """Count the filtered rows of all buckets by time.

    A log may have as many distinct seconds as rows, so only selected days are counted by the second.

    Args:
        plan: settings and folders.
        exact_days: days since 1970 that are counted by the second; any other day counts as its first second.

    Returns:
        (T,) distinct times in seconds since 1970, ascending, and (T,) numbers of rows.
    """
    total = pa.table({"time": pa.array([], pa.int64()), "count": pa.array([], pa.int64()),
                      "group": pa.array([], pa.int64())})  # fmt: skip
    for bucket in range(plan.num_buckets):
        counts = read_table(plan.work_file("filtered", bucket, "times"))
        times = counts.column("time").to_numpy()
        days = times // SECONDS_PER_DAY
        groups = np.where(np.isin(days, list(exact_days)), times, days * SECONDS_PER_DAY)
        merged = pa.concat_tables([total, counts.append_column("group", pa.array(groups))])
        summed = merged.group_by("group").aggregate([("time", "min"), ("count", "sum")])
        total = summed.rename_columns({"time_min": "time", "count_sum": "count"}).select(total.column_names)
    total = total.sort_by("time")
    return total.column("time").to_numpy(), total.column("count").to_numpy()
