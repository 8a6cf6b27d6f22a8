"""Filters of interactions: limits on rows per user and item, and duplicate rows of a user and item."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.data.samples.splits import OUTSIDE, SplitRule


def count_items_by_month(table: Any) -> Any:
    """Return a table ``id, month, count`` of rows per item; ``month`` is the start of the calendar month, in seconds.

    Months are kept apart because the windows of a calendar split are known only after all rows have been read.
    """
    months = pc.floor_temporal(table.column("timestamp").cast(pa.timestamp("s")), unit="month").cast(pa.int64())
    ones = pa.array(np.ones(table.num_rows, dtype=np.int64))
    return sum_item_counts([pa.table({"id": table.column("item_id"), "month": months, "count": ones})])


def sum_item_counts(tables: list[Any]) -> Any:
    """Sum tables ``id, month, count`` into one."""
    empty = pa.table(
        {"id": pa.array([], pa.string()), "month": pa.array([], pa.int64()), "count": pa.array([], pa.int64())}
    )
    summed = pa.concat_tables([empty, *tables]).group_by(["id", "month"]).aggregate([("count", "sum")])
    return pa.table({"id": summed["id"], "month": summed["month"], "count": summed["count_sum"]})


def sum_over_months(counts: Any, window: SplitRule | None) -> Any:
    """Return a table ``id, count`` over all months, or over the months inside the windows of a calendar split."""
    if window is not None:
        months = counts.column("month").to_numpy()
        counts = counts.filter(pa.array(window.assign(months, np.zeros_like(months)) != OUTSIDE))
    summed = counts.group_by("id").aggregate([("count", "sum")])
    return pa.table({"id": summed["id"], "count": summed["count_sum"]})


def count_unknown_items(counts: Any, known: Any) -> dict[str, int]:
    """Return the number of rows of each item that is missing from the item file.

    Args:
        counts: table ``id, month, count``.
        known: Arrow array of the ids in the item file, or None without an item file.
    """
    if known is None:
        return {}
    missing = sum_over_months(counts.filter(pc.invert(pc.is_in(counts.column("id"), known))), None)
    return dict(zip(missing.column("id").to_pylist(), missing.column("count").to_pylist(), strict=True))


def select_ids(counts: Any, low: int, high: int | None) -> Any:
    """Return the ids of a table ``id, count`` with ``low <= count <= high``, as one Arrow array."""
    fits = pc.field("count") >= low
    if high is not None:
        fits = fits & (pc.field("count") <= high)
    return counts.filter(fits).column("id").combine_chunks()


def drop_duplicates(table: Any, *, collapse: bool) -> Any:
    """Keep the earliest row of each user and item, in the table's order.

    Args:
        table: with columns user_id, item_id, timestamp, row and label.
        collapse: the kept row is a like if any of the duplicates is.
    """
    frame = table.to_pandas().sort_values(["timestamp", "row"], kind="stable")
    if collapse:
        frame["label"] = frame.groupby(["user_id", "item_id"], sort=False)["label"].transform("max").astype("int8")
    kept = frame.drop_duplicates(["user_id", "item_id"], keep="first").sort_values("row")
    return pa.Table.from_pandas(kept, schema=table.schema, preserve_index=False)
