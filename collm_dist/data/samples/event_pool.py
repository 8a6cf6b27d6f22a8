"""A sample of a log's events, from which negatives are drawn by popularity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.data.ingest.filtered_buckets import load_filtered_rows
from collm_dist.data.preprocess_plan import PreprocessPlan
from collm_dist.data.shards.context_block import IntArray
from collm_dist.random_keys import hash_integers

POOL_SIZE = 1 << 18


@dataclass(frozen=True)
class EventPool:
    """Real events in time order, to draw items in proportion to their popularity at a given time.

    Attributes:
        timestamps, item_idx: (E,) sorted by timestamp, then row id.
    """

    timestamps: IntArray
    item_idx: IntArray


def draw_event_pool(plan: PreprocessPlan, item_ids: Sequence[str]) -> EventPool:
    """Draw up to ``POOL_SIZE`` filtered rows by the hash of their row id; none if negatives are not by popularity."""
    events = pa.table({name: pa.array([], kind) for name, kind in
                       (("timestamp", pa.int64()), ("row", pa.int64()), ("item_id", pa.string()))})  # fmt: skip
    if plan.dataset.feedback == "implicit" and plan.dataset.negative_sampling == "popularity":
        for bucket in range(plan.num_buckets):
            events = pa.concat_tables([events, load_filtered_rows(plan, bucket, events.column_names)])
            hashes = hash_integers(plan.seed, events.column("row").to_numpy())
            events = events.take(pa.array(np.argsort(hashes, kind="stable")[:POOL_SIZE]))
    events = events.sort_by([("timestamp", "ascending"), ("row", "ascending")])
    items = pc.index_in(events.column("item_id"), pa.array(item_ids, pa.string()))
    return EventPool(events.column("timestamp").to_numpy(), items.to_numpy().astype(np.int64))
