"""Contexts as a nested Arrow table, one row per context, to pass them from buckets to shards without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock, IntArray

_TYPES = {"label": pa.int8(), "sampled": pa.int8(), "user_in_train": pa.int8(), "item_in_train": pa.int8()}
_ITEMS = pa.list_(pa.int32())


def build_schema(*, has_order: bool) -> Any:
    """Return the schema of contexts, with or without the order of likes and dislikes."""
    target = [*((name, _TYPES.get(name, pa.int64())) for name in TARGET_FIELDS), ("dislikes", _ITEMS)]
    if has_order:
        target.append(("likes_since", _ITEMS))
    targets = pa.list_(pa.struct(target))
    return pa.schema([("user_idx", pa.int64()), ("num_likes", pa.int64()), ("history", _ITEMS), ("targets", targets)])


def to_table(block: ContextBlock) -> Any:
    """Return a block as a table in the schema of ``build_schema``. Items and offsets must fit in 32 bits."""
    schema = build_schema(has_order=block.likes_since is not None)
    fields = [pa.array(getattr(block, name), _TYPES.get(name, pa.int64())) for name in TARGET_FIELDS]
    fields.append(_to_lists(block.dislike_offsets, pa.array(block.dislike_items, pa.int32())))
    if block.likes_since is not None:
        fields.append(_to_lists(block.dislike_offsets, pa.array(block.likes_since, pa.int32())))
    targets = pa.StructArray.from_arrays(fields, fields=list(schema.field("targets").type.value_type))
    columns = [
        pa.array(block.user_idx),
        pa.array(block.num_likes),
        _to_lists(block.history_offsets, pa.array(block.history_items, pa.int32())),
        _to_lists(block.target_offsets, targets),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _to_lists(offsets: IntArray, values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def from_table(table: Any) -> ContextBlock:
    """Return the block of a table of ``to_table``; items, offsets and flags keep their narrow types."""
    batches = table.combine_chunks().to_batches()
    batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
    history_offsets, history = _from_lists(batch.column("history"))
    target_offsets, targets = _from_lists(batch.column("targets"))
    dislike_offsets, dislikes = _from_lists(targets.field("dislikes"))
    has_order = targets.type.get_field_index("likes_since") >= 0
    return ContextBlock(
        user_idx=batch.column("user_idx").to_numpy(),
        num_likes=batch.column("num_likes").to_numpy(),
        history_offsets=history_offsets,
        history_items=history.to_numpy(),
        target_offsets=target_offsets,
        dislike_offsets=dislike_offsets,
        dislike_items=dislikes.to_numpy(),
        likes_since=_from_lists(targets.field("likes_since"))[1].to_numpy() if has_order else None,
        **{name: targets.field(name).to_numpy() for name in TARGET_FIELDS},
    )


def _from_lists(lists: Any) -> tuple[IntArray, Any]:
    offsets = lists.offsets.to_numpy()
    return offsets - offsets[0] if len(offsets) else np.zeros(1, np.int64), lists.flatten()
