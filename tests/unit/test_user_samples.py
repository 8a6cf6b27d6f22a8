"""State of the user before each row, compared with a loop over rows."""

from __future__ import annotations

import numpy as np
import pytest

from collm_dist.data.prompts.title_lists import take_context_ratings
from collm_dist.data.samples.user_samples import (
    compute_user_state,
    count_before,
    find_group_starts,
    gather_last,
    locate,
)
from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock
from tests.reference.plain_samples import Row, compute_known_before


def make_log(seed: int, count: int = 300) -> list[Row]:
    """Return rows of few users, items and seconds, so that everything repeats."""
    random = np.random.default_rng(seed)
    return [
        Row(
            row,
            f"u{random.integers(7)}",
            f"i{random.integers(9)}",
            int(random.integers(40)),
            int(random.integers(2)),
            str(random.choice(["train", "valid", "test"])),
        )
        for row in range(count)
    ]


def to_arrays(rows: list[Row]) -> dict[str, np.ndarray]:
    """Return rows in the order that the code expects."""
    rows = sorted(rows, key=lambda one: (int(one.user[1:]), one.time, one.row))
    columns = {
        "user_idx": [int(row.user[1:]) for row in rows],
        "item_idx": [int(row.item[1:]) for row in rows],
        "timestamps": [row.time for row in rows],
        "row_ids": [row.row for row in rows],
    }
    arrays = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
    arrays["labels"] = np.array([row.label for row in rows], dtype=np.int8)
    return arrays


@pytest.mark.parametrize("ties", ["strict", "order"])
@pytest.mark.parametrize("seed", range(4))
def test_user_state_equals_a_loop_over_rows(ties, seed):
    rows = make_log(seed)
    known = compute_known_before(rows, ties)
    arrays = to_arrays(rows)
    state = compute_user_state(**arrays, sampled=np.zeros(len(rows), np.int8), group_ids=arrays["row_ids"], ties=ties)
    offsets, history = gather_last(state.liked_items, state.history_ends, state.num_likes, 5)
    dislike_offsets, dislikes = gather_last(state.disliked_items, state.dislike_ends, state.dislike_counts, 3)
    for position, row in enumerate(arrays["row_ids"].tolist()):
        expected = known[row]
        assert state.num_likes[position] == len(expected["history"])
        items = [f"i{item}" for item in history[offsets[position] : offsets[position + 1]]]
        assert items == expected["history"][-5:]
        items = [f"i{item}" for item in dislikes[dislike_offsets[position] : dislike_offsets[position + 1]]]
        assert items == expected["dislikes"][-3:]
        assert (state.user_likes[position], state.user_rows[position]) == (
            expected["user_likes"],
            expected["user_rows"],
        )


@pytest.mark.parametrize("ties", ["strict", "order"])
def test_sampled_rows_share_the_state_of_their_positive_and_change_nothing(ties):
    """A negative has a later row id than its positive, but the positive must not enter its history."""
    rows = [Row(row.row, row.user, row.item, row.time, 1, row.split) for row in make_log(1, 80)]
    arrays = to_arrays(rows)
    alone = compute_user_state(**arrays, sampled=np.zeros(80, np.int8), group_ids=arrays["row_ids"], ties=ties)
    both = {name: np.concatenate([values, values]) for name, values in arrays.items()}
    both["group_ids"] = both["row_ids"].copy()
    both["row_ids"][80:] += 1000
    both["labels"][80:] = 0
    both["sampled"] = np.repeat(np.array([0, 1], np.int8), 80)
    order = np.lexsort((both["row_ids"], both["timestamps"], both["user_idx"]))
    state = compute_user_state(**{name: values[order] for name, values in both.items()}, ties=ties)
    original = order % 80
    for name in ("num_likes", "history_ends", "user_likes", "user_rows"):
        np.testing.assert_array_equal(getattr(state, name), getattr(alone, name)[original])
    np.testing.assert_array_equal(state.liked_items, alone.liked_items)


def test_a_label_changes_nothing_at_its_own_second_or_before():
    arrays = to_arrays(make_log(3))
    zeros = np.zeros(len(arrays["labels"]), np.int8)

    def compute(labels: np.ndarray):
        columns = {**arrays, "labels": labels}
        return compute_user_state(**columns, sampled=zeros, group_ids=arrays["row_ids"], ties="strict")

    before = compute(arrays["labels"])
    for index in range(0, len(zeros), 7):
        flipped = arrays["labels"].copy()
        flipped[index] ^= 1
        after = compute(flipped)
        same = arrays["timestamps"] <= arrays["timestamps"][index]
        for name in ("num_likes", "user_likes", "user_rows", "dislike_counts"):
            np.testing.assert_array_equal(getattr(before, name)[same], getattr(after, name)[same])


def list_rated(state, length: int) -> np.ndarray:
    """Return (N, length) the last rated items before each row, as the prompt has them; -1 = none."""
    count = len(state.num_likes)
    history_offsets, history = gather_last(state.liked_items, state.history_ends, state.num_likes, length)
    offsets, dislikes = gather_last(state.disliked_items, state.dislike_ends, state.dislike_counts, length)
    _, before = gather_last(state.disliked_likes, state.dislike_ends, state.dislike_counts, length)
    zeros = np.zeros(count, dtype=np.int64)
    block = ContextBlock(
        user_idx=zeros, num_likes=state.num_likes, history_offsets=history_offsets, history_items=history,
        target_offsets=np.arange(count + 1), dislike_offsets=offsets, dislike_items=dislikes,
        likes_since=np.repeat(state.num_likes, np.diff(offsets)) - before, **dict.fromkeys(TARGET_FIELDS, zeros),
    )  # fmt: skip
    rated = take_context_ratings(block, length)
    lists = np.full((count, length), -1)
    lists[rated.rows, rated.columns] = rated.values
    return lists


@pytest.mark.parametrize("ties", ["strict", "order"])
def test_rated_items_are_in_their_order(ties):
    rows = make_log(5)
    known, arrays = compute_known_before(rows, ties), to_arrays(rows)
    state = compute_user_state(**arrays, sampled=np.zeros(len(rows), np.int8), group_ids=arrays["row_ids"], ties=ties)
    for row, rated in zip(arrays["row_ids"].tolist(), list_rated(state, 4).tolist(), strict=True):
        found = [(f"i{value // 2}", value % 2) for value in rated if value >= 0]
        assert found == known[row]["rated"][-4:]


def test_a_flipped_label_shows_in_no_rated_list_of_its_second_or_before():
    arrays = to_arrays(make_log(3))
    zeros = np.zeros(len(arrays["labels"]), np.int8)

    def compute(labels: np.ndarray) -> np.ndarray:
        columns = {**arrays, "labels": labels}
        state = compute_user_state(**columns, sampled=zeros, group_ids=arrays["row_ids"], ties="strict")
        return list_rated(state, 10)

    before, num_changed = compute(arrays["labels"]), 0
    for index in range(0, len(zeros), 7):
        flipped = arrays["labels"].copy()
        flipped[index] ^= 1
        changed = (compute(flipped) != before).any(axis=1)
        later = (arrays["timestamps"] > arrays["timestamps"][index]) & (arrays["user_idx"] == arrays["user_idx"][index])
        assert not changed[~later].any()
        num_changed += changed[later].sum()
    assert num_changed > 100


def test_no_rows():
    empty = np.zeros(0, np.int64)
    state = compute_user_state(
        user_idx=empty, item_idx=empty, timestamps=empty, labels=empty.astype(np.int8), sampled=empty.astype(np.int8),
        row_ids=empty, group_ids=empty, ties="order",
    )  # fmt: skip
    offsets, items = gather_last(state.liked_items, state.history_ends, state.num_likes, 5)
    assert offsets.tolist() == [0]
    assert len(items) == 0


def test_groups_and_counts_by_hand():
    groups, times = np.array([0, 0, 0, 1, 1]), np.array([3, 3, 5, 1, 5])
    assert find_group_starts(groups).tolist() == [0, 0, 0, 3, 3]
    assert find_group_starts(groups, times).tolist() == [0, 0, 2, 3, 4]
    assert count_before(np.array([1, 0, 1, 1, 1]), (groups,), times).tolist() == [0, 0, 1, 0, 1]
    assert locate(np.array([7, 3, 5]), np.array([5, 5, 7])).tolist() == [2, 2, 0]
