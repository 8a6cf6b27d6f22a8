"""The peer of benchmarks/preprocess_scale.py: the same samples with plain pandas and Python loops.

The loop follows the CoLLM authors' notebooks (dataset/*/processing_ood.ipynb in their repository): rows sorted by user
and time, a list for each column and user, then row by row, with a copy of the history so far in every row. It avoids
needless costs of the notebooks: ids are looked up in sets instead of arrays, and a row keeps as much history as ours,
without titles.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

LIKE_THRESHOLD, TRAIN_SHARE, VALID_SHARE = 4, 0.8, 0.1
LISTED = ["item_id", "timestamp", "row_id", "label", "split"]
COLUMNS = ["user_id", *LISTED, "history", "dislikes", "user_likes", "user_rows", "item_likes", "item_rows",
           "user_in_train", "item_in_train"]  # fmt: skip


def preprocess_plainly(interactions: Path, target: Path, max_history: int, max_dislikes: int) -> None:
    """Turn a log into samples and write them to a Parquet file with ``COLUMNS``.

    Args:
        interactions: folder of Parquet files ``user_id, item_id, rating, timestamp``.
        target: the file.
        max_history, max_dislikes: most items of each in a sample.
    """
    data = pd.concat([pd.read_parquet(path) for path in sorted(interactions.iterdir())], ignore_index=True)
    data["row_id"] = data.index
    data["label"] = (data["rating"] >= LIKE_THRESHOLD).astype(int)
    data["split"] = _split(data["timestamp"])
    item_states = _count_items(data)
    train = data[data["split"] == "train"]
    train_users, train_items = set(train["user_id"]), set(train["item_id"])
    by_user = data.sort_values(["user_id", "timestamp", "row_id"]).groupby("user_id").agg(dict.fromkeys(LISTED, list))
    samples: list[tuple[Any, ...]] = []
    for user, *columns in by_user.itertuples():
        in_train = int(user in train_users)
        for sample in _build_samples(columns, max_history, max_dislikes):
            item, _, row = sample[:3]
            samples.append((user, *sample, *item_states[row], in_train, int(item in train_items)))
    pd.DataFrame(samples, columns=COLUMNS).to_parquet(target)


def _split(timestamps: pd.Series[int]) -> pd.Series[str]:
    """Split by time, the earliest share for training; rows of the same second stay together."""
    in_order = timestamps.sort_values(ignore_index=True)
    cuts = [in_order[int(share * len(in_order) + 1e-6)] for share in (TRAIN_SHARE, TRAIN_SHARE + VALID_SHARE)]
    return timestamps.map(lambda time: "train" if time < cuts[0] else "valid" if time < cuts[1] else "test")


def _count_items(data: pd.DataFrame) -> list[tuple[int, int]]:
    """Return likes and rows of each row's item strictly before it, by row id."""
    states, likes, rows = [(0, 0)] * len(data), Counter[int](), Counter[int]()
    in_time = data.sort_values("timestamp")
    events = zip(*(in_time[name].tolist() for name in ("timestamp", "row_id", "item_id", "label")), strict=True)
    for _, same_second in itertools.groupby(events, key=lambda event: event[0]):
        now = list(same_second)
        for _, row, item, _ in now:
            states[row] = (likes[item], rows[item])
        for _, _, item, label in now:
            likes[item] += label
            rows[item] += 1
    return states


def _build_samples(columns: list[list[Any]], max_history: int, max_dislikes: int) -> list[tuple[Any, ...]]:
    """Return a user's samples: the row, and the user's state strictly before it."""
    liked: list[int] = []
    disliked: list[int] = []
    samples = []
    for _, same_second in itertools.groupby(zip(*columns, strict=True), key=lambda row: row[1]):
        now = list(same_second)
        for row in now:
            counts = (len(liked), len(liked) + len(disliked))
            samples.append((*row, liked[-max_history:], disliked[-max_dislikes:], *counts))
        for item, _, _, label, _ in now:
            (liked if label else disliked).append(item)
    return samples
