"""Rows for the evaluation tests: blocks from flat columns, and independently computed as-of counts."""

import os
from pathlib import Path

import numpy as np
import pytest

from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock

ML1M_DIR = Path(
    os.environ.get("COLLM_ML1M_DIR", Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "ml-1m-collm")
)
needs_ml1m = pytest.mark.skipif(
    not (ML1M_DIR / "interactions.parquet").exists(), reason=f"the released ML-1M split is not in {ML1M_DIR}"
)


def build_block(user_idx, histories=None, num_likes=None, dislikes=None, **targets) -> ContextBlock:
    """Return a block with one context per row; missing columns are 0."""
    user_idx = np.asarray(user_idx, dtype=np.int64)
    count = len(user_idx)
    histories = histories if histories is not None else [[]] * count
    dislikes = dislikes if dislikes is not None else [[]] * count
    flat = {name: np.asarray(targets.pop(name, np.zeros(count)), dtype=np.int64) for name in TARGET_FIELDS}
    assert not targets
    return ContextBlock(
        user_idx=user_idx,
        num_likes=np.asarray(num_likes if num_likes is not None else np.arange(count), dtype=np.int64),
        history_offsets=np.cumsum([0] + [len(history) for history in histories]),
        history_items=np.array([item for history in histories for item in history], dtype=np.int64),
        target_offsets=np.arange(count + 1),
        dislike_offsets=np.cumsum([0] + [len(items) for items in dislikes]),
        dislike_items=np.array([item for items in dislikes for item in items], dtype=np.int64),
        **flat,
    )


def count_strictly_before(keys, timestamps, labels):
    """Return likes and rows of the same key with an earlier timestamp, counted with dictionaries."""
    likes, rows = np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=np.int64)
    known, pending, now = {}, [], None
    for row in np.argsort(timestamps, kind="stable"):
        if timestamps[row] != now:
            for key, label in pending:
                seen = known.setdefault(key, [0, 0])
                seen[0] += label
                seen[1] += 1
            pending, now = [], timestamps[row]
        likes[row], rows[row] = known.get(keys[row], (0, 0))
        pending.append((keys[row], labels[row]))
    return likes, rows


def read_ml1m():
    """Return the columns of the released split, with as-of counts and dense indices."""
    import pandas as pd

    table = pd.read_parquet(ML1M_DIR / "interactions.parquet")
    columns = {
        "user_idx": table.user_id.to_numpy(np.int64) - 1,
        "item_idx": table.item_id.to_numpy(np.int64) - 1,
        "label": table.label.to_numpy(np.int64),
        "timestamp": table.timestamp.to_numpy(np.int64),
        "split": table.split.to_numpy(),
    }
    for kind in ("user", "item"):
        counts = count_strictly_before(columns[f"{kind}_idx"], columns["timestamp"], columns["label"])
        columns[f"{kind}_likes"], columns[f"{kind}_rows"] = counts
    return columns
