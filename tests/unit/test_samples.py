"""Samples against a plain loop over each user's rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_dist.data.negatives import EventPool, LikedItems, sample_negatives
from collm_dist.data.samples import compute_user_state, count_before, gather_last


def make_rows(seed: int, rows: int = 120):
    rng = np.random.default_rng(seed)
    columns = {
        "user_idx": rng.integers(0, 5, rows),
        "item_idx": rng.integers(0, 9, rows),
        "timestamps": rng.integers(0, 12, rows),
        "labels": rng.integers(0, 2, rows).astype(np.int8),
        "sampled": (rng.random(rows) < 0.2).astype(np.int8),
    }
    columns["labels"][columns["sampled"] == 1] = 0
    order = np.lexsort((np.arange(rows), columns["timestamps"], columns["user_idx"]))
    return {name: values[order] for name, values in columns.items()}


def look_back(rows, index: int, ties: str):
    """What a careful reader of the log would say about the user before a row."""
    likes, dislikes, seen = [], [], 0
    strict_likes = 0
    for other in range(len(rows["user_idx"])):
        if rows["user_idx"][other] != rows["user_idx"][index] or rows["sampled"][other]:
            continue
        strictly = rows["timestamps"][other] < rows["timestamps"][index]
        earlier = strictly if ties == "strict" else other < index
        seen += strictly
        strict_likes += strictly and rows["labels"][other] == 1
        if earlier and rows["labels"][other] == 1:
            likes.append(int(rows["item_idx"][other]))
        if strictly and rows["labels"][other] == 0:
            dislikes.append(int(rows["item_idx"][other]))
    return likes, dislikes, seen, strict_likes


@pytest.mark.parametrize("ties", ["strict", "order"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_user_state_equals_a_plain_loop(ties, seed):
    rows = make_rows(seed)
    state = compute_user_state(**rows, ties=ties)
    offsets, history = gather_last(state.liked_items, state.history_ends, state.num_likes, 4)
    dislike_offsets, dislikes = gather_last(state.disliked_items, state.dislike_ends, state.dislike_counts, 3)
    for index in range(len(rows["user_idx"])):
        likes, disliked, seen, strict_likes = look_back(rows, index, ties)
        assert state.num_likes[index] == len(likes)
        assert history[offsets[index] : offsets[index + 1]].tolist() == likes[-4:]
        assert dislikes[dislike_offsets[index] : dislike_offsets[index + 1]].tolist() == disliked[-3:]
        assert state.user_rows[index] == seen
        assert state.user_likes[index] == strict_likes


def test_own_label_and_later_rows_change_nothing():
    rows = make_rows(3)
    before = compute_user_state(**rows, ties="strict")
    for index in np.flatnonzero(rows["sampled"] == 0)[::7]:
        flipped = {**rows, "labels": rows["labels"].copy()}
        flipped["labels"][index] ^= 1
        after = compute_user_state(**flipped, ties="strict")
        same = rows["timestamps"] <= rows["timestamps"][index]
        for name in ("num_likes", "user_likes", "user_rows", "dislike_counts"):
            np.testing.assert_array_equal(getattr(before, name)[same], getattr(after, name)[same])


def test_count_before_is_per_item():
    items, times = np.array([1, 1, 1, 2, 2]), np.array([5, 5, 7, 1, 9])
    assert count_before(np.array([1, 0, 1, 1, 1]), (items,), times).tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("method", ["uniform", "popularity"])
def test_negatives_are_no_likes_no_repeats_and_depend_on_the_row_alone(method):
    rng = np.random.default_rng(0)
    users, items, times = rng.integers(0, 6, 80), rng.integers(0, 30, 80), rng.integers(0, 50, 80)
    order = np.argsort(times, kind="stable")
    pool = EventPool(times[order], items[order])

    def sample(chosen):
        return sample_negatives(
            user_idx=users[chosen],
            timestamps=times[chosen],
            row_ids=chosen,
            counts=np.full(len(chosen), 6),
            liked=LikedItems(users, items, times, 30),
            num_items=30,
            seed=9,
            method=method,
            pool=pool,
        )

    owner, drawn, slot = sample(np.arange(80))
    if method == "uniform":
        assert np.bincount(owner, minlength=80).tolist() == [6] * 80
    for row in range(80):
        own = drawn[owner == row]
        liked = items[(users == users[row]) & (times <= times[row])]
        assert not set(own.tolist()) & set(liked.tolist())
        assert len(set(own.tolist())) == len(own)
    part = np.array([70, 3, 41])
    part_owner, part_drawn, part_slot = sample(part)
    for position, row in enumerate(part):
        assert part_drawn[part_owner == position].tolist() == drawn[owner == row].tolist()
        assert part_slot[part_owner == position].tolist() == slot[owner == row].tolist()


def test_popular_items_are_drawn_more_often():
    times = np.arange(1000)
    items = np.where(times % 10 == 0, 5, 7)
    owner, drawn, _ = sample_negatives(
        user_idx=np.zeros(2000, dtype=np.int64),
        timestamps=np.full(2000, 999),
        row_ids=np.arange(2000),
        counts=np.ones(2000, dtype=np.int64),
        liked=LikedItems(np.array([1]), np.array([0]), np.array([0]), 10),
        num_items=10,
        seed=1,
        method="popularity",
        pool=EventPool(times, items),
    )
    assert len(owner) == 2000
    # 10 % of the events, give or take four standard errors.
    assert abs((drawn == 5).mean() - 0.1) < 4 * np.sqrt(0.09 / 2000)
