"""Filters and duplicates."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from collm_dist.config import SplitConfig
from collm_dist.data.ingest.interaction_filters import (
    count_items_by_month,
    drop_duplicates,
    select_ids,
    sum_item_counts,
    sum_over_months,
)
from collm_dist.data.samples.splits import build_calendar_rule

DAY = 86400


def test_items_are_counted_within_the_windows_only():
    days = np.array([0, 1, 40, 41, 42, 100])
    table = pa.table({"item_id": ["a", "b", "a", "a", "b", "a"], "timestamp": days * DAY})
    counts = sum_item_counts([count_items_by_month(table), count_items_by_month(table)])
    everywhere = sum_over_months(counts, None)
    assert sorted(zip(*everywhere.to_pydict().values(), strict=True)) == [("a", 8), ("b", 4)]
    split = SplitConfig(method="calendar", train_months=(1, 1), valid_months=(2, 2), test_months=(4, 5))
    inside = sum_over_months(counts, build_calendar_rule(split, 0))
    assert sorted(zip(*inside.to_pydict().values(), strict=True)) == [("a", 4), ("b", 2)]
    assert sum_item_counts([]).num_rows == 0


def test_limits_are_included():
    counts = pa.table({"id": ["a", "b", "c"], "count": [1, 2, 3]})
    assert select_ids(counts, 0, None).to_pylist() == ["a", "b", "c"]
    assert select_ids(counts, 2, None).to_pylist() == ["b", "c"]
    assert select_ids(counts, 2, 2).to_pylist() == ["b"]


def test_duplicates_keep_the_earliest_row_and_the_order_of_the_file():
    table = pa.table(
        {
            "row": pa.array([0, 1, 2, 3, 4]),
            "user_id": ["u", "v", "u", "u", "u"],
            "item_id": ["x", "x", "x", "y", "x"],
            "timestamp": pa.array([9, 1, 5, 2, 5]),
            "label": pa.array([1, 0, 0, 0, 0], pa.int8()),
        }
    )
    first = drop_duplicates(table, collapse=False).to_pydict()
    assert (first["row"], first["label"]) == ([1, 2, 3], [0, 0, 0])
    collapsed = drop_duplicates(table, collapse=True)
    assert (collapsed.to_pydict()["row"], collapsed.to_pydict()["label"]) == ([1, 2, 3], [0, 1, 0])
    assert collapsed.schema == table.schema
