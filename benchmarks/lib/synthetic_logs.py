"""Generated rating logs of any size: skewed popularity and activity, learnable tastes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROWS_PER_FILE, ROWS_PER_GROUP = 500_000, 125_000
ROWS_PER_USER = 50
# Item ranks are shifted (Zipf-Mandelbrot): the first item has about 0.3 % of all rows, as in MovieLens-1M. Plain Zipf
# would give it 10 %, and every user the same few items.
RANK_SHIFT = 50
# Activity follows a power law with this exponent, capped at this many times the mean.
ACTIVITY_EXPONENT, MOST_ACTIVE = 1.5, 100.0
TASTES = 8
FIRST_TIME, SECONDS = 1_640_995_200, 2 * 365 * 86_400  # two years from 2022 on


@dataclass(frozen=True)
class SyntheticLogs:
    """A generated log.

    Attributes:
        interactions: folder of Parquet files ``user_id, item_id, rating, timestamp``; ids are integers, ratings 1 to 5,
            timestamps seconds since 1970.
        items: Parquet file ``item_id, title``.
        num_interactions, num_users, num_items: rows, and the users and items that they are drawn from; some of these
            may not occur.
    """

    interactions: Path
    items: Path
    num_interactions: int
    num_users: int
    num_items: int


def write_synthetic_logs(
    folder: Path,
    num_interactions: int,
    seed: int = 0,
    num_users: int | None = None,
    num_items: int | None = None,
) -> SyntheticLogs:
    """Generate a log file by file, so that memory does not grow with its rows. The same arguments give the same rows.

    Files cover successive parts of the two years; rows within a file are in random order.

    Args:
        folder: where to write; created if missing.
        num_interactions: total number of rows.
        seed: of all random draws.
        num_users: default: one per 50 rows.
        num_items: default: 20 times the root of the rows, which is 20,000 for a million and 110,000 for 30 million.
    """
    num_users = num_users or max(num_interactions // ROWS_PER_USER, 1)
    num_items = num_items or max(round(20 * num_interactions**0.5), 1)
    logs = SyntheticLogs(folder / "interactions", folder / "items.parquet", num_interactions, num_users, num_items)
    logs.interactions.mkdir(parents=True, exist_ok=True)
    world = _World.draw(np.random.default_rng([seed, 0]), num_users, num_items)
    for number, start in enumerate(range(0, num_interactions, ROWS_PER_FILE)):
        stop = min(start + ROWS_PER_FILE, num_interactions)
        times = [FIRST_TIME + SECONDS * row // num_interactions for row in (start, stop)]
        rows = world.draw_rows(np.random.default_rng([seed, 1, number]), stop - start, times[0], times[1])
        pq.write_table(rows, logs.interactions / f"part-{number:05d}.parquet", row_group_size=ROWS_PER_GROUP)
    ids = np.arange(1, num_items + 1)
    titles = [f"The long way home, part {item} ({1930 + item % 90})" for item in ids.tolist()]
    pq.write_table(pa.table({"item_id": ids, "title": titles}), logs.items)
    return logs


@dataclass(frozen=True)
class _World:
    """Distribution of the rows. Shapes: U users, I items, D tastes; position p stands for the id p + 1.

    Attributes:
        activity, popularity: (U,), (I,) cumulative shares of the rows.
        user_tastes, item_tastes: (U, D), (I, D); their dot product is a user's liking for an item.
        user_mood, item_quality: (U,), (I,) offsets of a rating.
    """

    activity: NDArray[np.float64]
    popularity: NDArray[np.float64]
    user_tastes: NDArray[np.float32]
    item_tastes: NDArray[np.float32]
    user_mood: NDArray[np.float32]
    item_quality: NDArray[np.float32]

    @classmethod
    def draw(cls, rng: np.random.Generator, num_users: int, num_items: int) -> _World:
        activity = 1 + rng.pareto(ACTIVITY_EXPONENT, num_users)
        activity = np.minimum(activity, MOST_ACTIVE * activity.mean())
        # Popularity is assigned at random, so ids are not ordered by it.
        popularity = 1 / (RANK_SHIFT + rng.permutation(num_items))
        tastes = [rng.standard_normal((count, TASTES), np.float32) for count in (num_users, num_items)]
        return cls(
            activity=_accumulate(activity),
            popularity=_accumulate(popularity),
            user_tastes=tastes[0],
            item_tastes=tastes[1] / np.float32(TASTES**0.5),
            user_mood=0.5 * rng.standard_normal(num_users, np.float32),
            item_quality=0.5 * rng.standard_normal(num_items, np.float32),
        )

    def draw_rows(self, rng: np.random.Generator, count: int, first_time: int, last_time: int) -> Any:
        """Return a table of ``count`` rows with timestamps in [first, last)."""
        users = np.searchsorted(self.activity, rng.random(count), side="right")
        items = np.searchsorted(self.popularity, rng.random(count), side="right")
        likings = np.einsum("nd,nd->n", self.user_tastes[users], self.item_tastes[items])
        likings += self.user_mood[users] + self.item_quality[items] + rng.standard_normal(count, np.float32)
        return pa.table(
            {
                "user_id": users + 1,
                "item_id": items + 1,
                "rating": np.clip(np.rint(3.5 + likings), 1, 5).astype(np.int8),
                "timestamp": rng.integers(first_time, max(last_time, first_time + 1), count),
            }
        )


def _accumulate(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return cumulative shares; the last is exactly 1, so that no draw exceeds it."""
    shares: NDArray[np.float64] = np.cumsum(weights) / weights.sum()
    shares[-1] = 1.0
    return shares
