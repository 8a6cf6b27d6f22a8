"""The split rule of a log whose cut points depend on the filtered rows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.data.ingest.filtered_buckets import SECONDS_PER_DAY, count_rows_by_time, load_filtered_rows
from collm_dist.data.preprocess_plan import PreprocessPlan
from collm_dist.data.samples.splits import (
    SplitRule,
    build_amazon_book_rule,
    build_ratio_rule,
    get_amazon_book_window,
)


def build_split_rule(plan: PreprocessPlan) -> SplitRule | None:
    """Return the split rule for the filtered rows, or None if a column of the log names the split."""
    method = plan.dataset.split.method
    if method == "column":
        return None
    if method == "amazon_book":
        december = pc.field("timestamp") >= get_amazon_book_window()[1]
        rows = pa.concat_tables(
            [
                load_filtered_rows(plan, bucket, ["timestamp", "row"]).filter(december)
                for bucket in range(plan.num_buckets)
            ]
        )
        return build_amazon_book_rule(rows.column("timestamp").to_numpy(), rows.column("row").to_numpy())
    # Rows are counted by day first, and by second only on the days of the cuts.
    coarse = build_ratio_rule(plan.dataset.split, *count_rows_by_time(plan))
    cut_days = [time // SECONDS_PER_DAY for time, _ in coarse.starts]
    return build_ratio_rule(plan.dataset.split, *count_rows_by_time(plan, cut_days))
