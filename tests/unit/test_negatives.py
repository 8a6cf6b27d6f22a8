"""Sampled negatives: allowed items, and determinism by seed and row."""

from __future__ import annotations

import numpy as np
import pytest

from collm_dist.data.samples.event_pool import EventPool
from collm_dist.data.samples.negatives import LikedItems, sample_negatives

NUM_USERS, NUM_ITEMS, COUNT = 6, 15, 60


@pytest.fixture
def clicks() -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    return {
        "user_idx": random.integers(0, NUM_USERS, COUNT),
        "item_idx": random.integers(0, NUM_ITEMS, COUNT),
        "timestamps": random.integers(0, 30, COUNT),
        "row_ids": np.arange(COUNT),
    }


def draw(clicks: dict, chosen: np.ndarray, method: str = "uniform", seed: int = 0, count: int = 4) -> set:
    order = np.lexsort((clicks["row_ids"], clicks["timestamps"]))
    owner, items, slots = sample_negatives(
        user_idx=clicks["user_idx"][chosen],
        timestamps=clicks["timestamps"][chosen],
        row_ids=clicks["row_ids"][chosen],
        counts=np.full(len(chosen), count),
        liked=LikedItems(clicks["user_idx"], clicks["item_idx"], clicks["timestamps"], NUM_ITEMS),
        num_items=NUM_ITEMS,
        seed=seed,
        method=method,
        pool=EventPool(clicks["timestamps"][order], clicks["item_idx"][order]),
    )
    return set(zip(clicks["row_ids"][chosen][owner].tolist(), slots.tolist(), items.tolist(), strict=True))


@pytest.mark.parametrize("method", ["uniform", "popularity"])
def test_negatives_are_new_to_the_user_and_distinct(clicks, method):
    drawn = draw(clicks, np.arange(COUNT), method)
    for row, _, item in drawn:
        user, time = clicks["user_idx"][row], clicks["timestamps"][row]
        mine = (clicks["user_idx"] == user) & (clicks["item_idx"] == item) & (clicks["timestamps"] <= time)
        assert not mine.any()
    assert len({(row, item) for row, _, item in drawn}) == len(drawn)
    assert len({(row, slot) for row, slot, _ in drawn}) == len(drawn)
    if method == "uniform":
        assert len(drawn) == 4 * COUNT


@pytest.mark.parametrize("method", ["uniform", "popularity"])
def test_partitions_and_order_do_not_matter_but_the_seed_does(clicks, method):
    together = draw(clicks, np.arange(COUNT), method)
    apart = set().union(*(draw(clicks, np.flatnonzero(clicks["user_idx"] == user)[::-1], method) for user in range(6)))
    assert together == apart
    assert together != draw(clicks, np.arange(COUNT), method, seed=1)


def test_popularity_draws_from_earlier_events_only(clicks):
    for row, _, item in draw(clicks, np.arange(COUNT), "popularity"):
        earlier = clicks["item_idx"][clicks["timestamps"] < clicks["timestamps"][row]]
        assert len(earlier) == 0 or item in earlier


def test_popularity_follows_the_counts():
    """About three quarters of a thousand draws are the item with three quarters of the events."""
    count = 1000
    log = {"timestamps": np.zeros(4, np.int64), "item_idx": np.array([1, 1, 1, 2])}
    nobody = LikedItems(np.array([0]), np.array([0]), np.array([0]), 3)
    _, items, _ = sample_negatives(
        user_idx=np.ones(count, np.int64), timestamps=np.ones(count, np.int64), row_ids=np.arange(count),
        counts=np.ones(count, np.int64), liked=nobody, num_items=3, seed=0, method="popularity",
        pool=EventPool(log["timestamps"], log["item_idx"]),
    )  # fmt: skip
    assert 0.70 < np.mean(items == 1) < 0.80


def test_a_user_who_likes_everything_gets_none():
    everything = np.arange(3)
    liked = LikedItems(np.zeros(3, np.int64), everything, np.zeros(3, np.int64), 3)
    owner, _, _ = sample_negatives(
        user_idx=np.array([0]), timestamps=np.array([1]), row_ids=np.array([5]), counts=np.array([2]), liked=liked,
        num_items=3, seed=0, method="uniform", pool=EventPool(np.zeros(0, np.int64), np.zeros(0, np.int64)),
    )  # fmt: skip
    assert len(owner) == 0
